"""Stand-ins for the frozen program where only the copying of it is looked at: small scripts that answer `version`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from edgebroker.version import DATA_FORMAT


def script(path: Path, version: str = "9.9.9", *, data_format: int = DATA_FORMAT, selftest: int = 0) -> Path:
    """A program of that version; `selftest` is what its self-test ends with."""
    said = json.dumps({"version": version, "data_format": data_format})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncase $1 in version) echo '{said}';; selftest) exit {selftest};; esac\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The running program is taken for this file."""
    path = script(tmp_path / "copied" / "edgebroker")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(path))
    return path
