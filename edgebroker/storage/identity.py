"""The identity of a log: one small file per partition, replaced durably before anything that depends on it.

line 1   JSON: log_id, origin (node uid), epochs [[epoch, first offset], ...], log_start, chain, settings
line 2   CRC-32C of line 1 as eight hex digits
"""

from collections.abc import Callable
from pathlib import Path

from edgebroker.common.errors import DamagedDataError
from edgebroker.storage.checksummed import read_checked, write_checked
from edgebroker.storage.types import Identity

FILE_NAME = "identity"


def write_identity(directory: Path, identity: Identity, name: str = FILE_NAME) -> None:
    """Replace the identity file; durable when this returns."""
    write_checked(directory / name, identity)


def change_identity(directory: Path, change: Callable[[Identity], Identity]) -> Identity:
    """Read, change, write durably; on the commit thread, where no other change can come in between."""
    identity = change(read_identity(directory))
    write_identity(directory, identity)
    return identity


def read_identity(directory: Path, name: str = FILE_NAME) -> Identity:
    """Raises FileNotFoundError when there is none, DamagedDataError when it is not what was written."""
    identity = read_checked(directory / name, Identity)
    if not identity.epochs:
        raise DamagedDataError(f"{directory / name}: a log without a history")
    return identity
