"""Memory and task limits of the shipped units, enforced by a real kernel in a virtual machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import virtual
from .builds import ROOT

SCRIPT = r"""
/root/edgebroker install --role local --id till-17 --start >/dev/null || journalctl -u edgebroker --no-pager -n 30
group=/sys/fs/cgroup$(systemctl show edgebroker -p ControlGroup --value)
echo "max=$(cat $group/memory.max)" "high=$(cat $group/memory.high)" "tasks=$(cat $group/pids.max)"
seq 20000 | sed 's/$/ a price with some more words behind it, so that it has a length/' | edgebroker publish prices
echo "consumed=$(edgebroker consume prices --group g --count 20000 --timeout 60 | wc -l)"
echo "status=$(edgebroker status | head -1)"
echo "current=$(cat $group/memory.current)"
echo "anonymous=$(sed -n 's/^anon //p' $group/memory.stat)"

# Somebody who takes too much within the same limit; MemoryHigh would only make him very slow before.
cd /etc/systemd/system
mkdir -p hog.service.d
sed /MemoryHigh/d edgebroker.service.d/10-limits.conf > hog.service.d/limits.conf
cat > hog.service <<UNIT
[Service]
ExecStart=/bin/bash -c 'sleep 1; x=\$(head -c 400M /dev/zero | tr "\\0" x); echo \${#x}'
UNIT
systemctl daemon-reload
systemctl start hog
for second in $(seq 90); do [ "$(systemctl show hog -p ActiveState --value)" = failed ] && break; sleep 1; done
echo "hog=$(systemctl show hog -p Result --value)"
echo "still=$(systemctl is-active edgebroker)"
"""


@pytest.fixture(scope="module")
def said(program: Path) -> dict[str, str]:
    if why := virtual.unavailable():
        pytest.skip(why)
    text = virtual.run({"/root/edgebroker": program}, SCRIPT)
    print(text)
    return dict(word.partition("=")[::2] for line in text.splitlines() for word in _words(line))


def _words(line: str) -> list[str]:
    return [line] if line.startswith("status=") else line.split()


def test_the_kernel_has_the_limits_of_the_role(said: dict[str, str]) -> None:
    limits = dict(line.split("=") for line in (ROOT / "systemd/local.conf").read_text().splitlines() if "=" in line)
    assert int(said["max"]) == int(limits["MemoryMax"].rstrip("M")) << 20
    assert int(said["high"]) == int(limits["MemoryHigh"].rstrip("M")) << 20
    assert said["tasks"] == "64"


def test_the_node_works_within_them(said: dict[str, str]) -> None:
    assert said["consumed"] == "20000"
    assert said["status"].startswith("HEALTHY: till-17")
    assert int(said["current"]) < int(said["high"])
    assert int(said["anonymous"]) < 40 << 20


def test_whoever_takes_more_is_ended_and_nobody_else(said: dict[str, str]) -> None:
    assert said["hog"] == "oom-kill"
    assert said["still"] == "active"
