"""The demonstration, as `make run` starts it."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_everything_holds() -> None:
    command = [sys.executable, "-m", "edgebroker", "demo", "--json", "--rate", "10000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["problems"] == []
    assert result["tree"]["same_bytes"] is True
    assert result["one"]["distinct"] == result["tree"]["distinct"] == 30_000
