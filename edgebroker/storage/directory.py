"""The data directory as a whole: its lock, its format version, the node's identity, the mark of a clean stop.

Opening is the only thing that may refuse to start: in use (75), unreadable or unwritable (1), newer format (2).
"""

import os
from pathlib import Path

import msgspec

from edgebroker.common.errors import DataDirectoryError, FormatTooNewError
from edgebroker.storage import files
from edgebroker.version import DATA_FORMAT

RESTORED = "RESTORED"
LOSS_ACCEPTED = b"loss accepted\n"
RESERVE_BYTES = 8 << 20


class Format(msgspec.Struct, forbid_unknown_fields=False):
    """FORMAT: what a release has to understand. An unknown `incompat` flag means: do not touch; an unknown
    `ro_compat` flag: read only; unknown `compat` flags are harmless."""

    version: int
    compat: list[str] = []
    ro_compat: list[str] = []
    incompat: list[str] = []


class NodeFile(msgspec.Struct, forbid_unknown_fields=False):
    """node: made once, changed only by a promotion: then its level counts, not the configured one."""

    uid: str
    level: str
    promoted: bool = False


class DataDirectory:
    """An opened and locked data directory. `was_clean`: the last run ended well, or there was none."""

    def __init__(self, path: Path, level: str) -> None:
        self.path = path
        try:
            files.make_directory(path)
        except OSError as error:
            raise DataDirectoryError(
                f"{path}: cannot be created: {error.strerror}; choose another --data-dir"
            ) from error
        self._lock = files.lock(path / "LOCK")
        try:
            fresh = not (path / "FORMAT").exists()
            self._check_format()
            marked = (path / "CLEAN").exists()
            self.was_clean = marked or fresh
            if marked:
                # First of all: a crash from here on must not look like a clean stop.
                files.remove(path / "CLEAN")
                files.sync_directory(path)
            self.node = self._node(level)
            # What a restore leaves: this node's own logs may lack what others have seen of them.
            self.restored = (path / RESTORED).exists()
            self.loss_accepted = self.restored and (path / RESTORED).read_bytes() == LOSS_ACCEPTED
            for name in ("topics", "quarantine"):
                files.make_directory(path / name)
            self._keep_reserve()
        except PermissionError as error:
            files.close(self._lock)
            raise DataDirectoryError(f"{error.filename}: {error.strerror}; check owner and rights") from error
        except BaseException:
            files.close(self._lock)
            raise

    @property
    def topics(self) -> Path:
        return self.path / "topics"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    def spend_reserve(self) -> bool:
        """Give the reserved space to what must still be written on a full disk. True when there was any."""
        reserve = self.path / "reserve"
        if not reserve.exists():
            return False
        files.remove(reserve)
        return True

    def close(self, *, clean: bool) -> None:
        """Release the lock; with `clean` everything was stored and the next start may rely on it."""
        if clean:
            files.write_durable(self.path / "CLEAN", b"")
        files.close(self._lock)

    def _check_format(self) -> None:
        path = self.path / "FORMAT"
        try:
            found = msgspec.json.decode(path.read_bytes(), type=Format)
        except (FileNotFoundError, msgspec.DecodeError):
            # Absent or torn at the very first start; the segments themselves carry the batch format.
            self._write_full_proof(path, msgspec.json.encode(Format(DATA_FORMAT)) + b"\n")
            return
        unknown = [*found.incompat, *found.ro_compat]
        if found.version > DATA_FORMAT or unknown:
            what = f"format version {found.version}" + (f" with {', '.join(unknown)}" if unknown else "")
            raise FormatTooNewError(
                f"{self.path}: written by a newer release ({what}; this one knows {DATA_FORMAT}); "
                "nothing was changed, install the newer release again"
            )

    def _node(self, level: str) -> NodeFile:
        path = self.path / "node"
        try:
            node = msgspec.json.decode(path.read_bytes(), type=NodeFile)
            if len(bytes.fromhex(node.uid)) == 16:
                return node
        except (FileNotFoundError, msgspec.DecodeError, ValueError):
            pass
        node = NodeFile(os.urandom(16).hex(), level)
        self._write_full_proof(path, msgspec.json.encode(node) + b"\n")
        return node

    def restore_finished(self) -> None:
        """The logs begin new histories; durable when this returns."""
        files.remove(self.path / RESTORED)
        files.sync_directory(self.path)
        self.restored = False

    def change_node(self, node: NodeFile) -> None:
        """Store another level; durable when this returns."""
        files.write_durable(self.path / "node", msgspec.json.encode(node) + b"\n")
        self.node = node

    def _write_full_proof(self, path: Path, data: bytes) -> None:
        try:
            files.write_durable(path, data)
        except OSError as error:
            if error.errno not in files.FULL or not self.spend_reserve():
                raise DataDirectoryError(f"{path}: cannot be written: {error.strerror}") from error
            files.write_durable(path, data)

    def _keep_reserve(self) -> None:
        """Hold a little space back; a disk too full for it is no reason not to start."""
        reserve = self.path / "reserve"
        if reserve.exists():
            return
        free, size = files.free_space(self.path)
        if free < 8 * RESERVE_BYTES or size // 50 < RESERVE_BYTES:
            return
        fd = os.open(reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            os.posix_fallocate(fd, 0, RESERVE_BYTES)
        except OSError:
            files.remove(reserve)
        finally:
            os.close(fd)
