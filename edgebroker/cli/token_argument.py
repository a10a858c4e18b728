"""A join token as it is given on the command line: itself, - for standard input, @FILE."""

from __future__ import annotations

import sys
from pathlib import Path

from edgebroker.common.errors import EdgeBrokerError


def read_token(text: str) -> str:
    """A token as it is given on the command line. Raises EdgeBrokerError for a file that cannot be read."""
    if text == "-":
        return sys.stdin.readline().strip()
    if text.startswith("@"):
        try:
            return Path(text[1:]).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise EdgeBrokerError(f"{text[1:]}: {getattr(error, 'strerror', None) or error}") from error
    return text
