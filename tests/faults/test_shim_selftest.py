"""Each fault the library can make, on single calls and on every call of the toy."""

import os
import signal
import subprocess
import sys

import pytest

from . import shim
from .conftest import Lab
from .test_faults_selftest import records

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

PRELUDE = """
import ctypes, errno, os, sys, time
root = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
def attempt(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
def syncfs(fd):
    return errno.errorcode[ctypes.get_errno()] if libc.syncfs(fd) else 0
def create(name):
    return os.open(f"{root}/{name}", os.O_RDWR | os.O_CREAT)
fd = create("f")
"""


def program(lab: Lab, code: str, *rules: str, switch: bool = False) -> tuple[int, list[str]]:
    """Exit code and the words printed."""
    result, output = lab.run(PRELUDE + code, rules=list(rules), switch=switch)
    return result, output.split()


@pytest.mark.parametrize(
    ("op", "error", "call"),
    [
        ("write", "ENOSPC", "os.write, fd, b'four'"),
        ("write", "EIO", "os.writev, fd, [b'four']"),
        ("pwrite", "EDQUOT", "os.pwrite, fd, b'four', 0"),
        ("fsync", "EIO", "os.fsync, fd"),
        ("fdatasync", "EIO", "os.fdatasync, fd"),
        ("sync", "EIO", "syncfs, fd"),
        ("ftruncate", "EFBIG", "os.ftruncate, fd, 9"),
        ("fallocate", "ENOSPC", "os.posix_fallocate, fd, 0, 9"),
        ("open", "EROFS", "create, 'new'"),
        ("rename", "EACCES", "os.rename, root + '/f', root + '/g'"),
        ("unlink", "EBUSY", "os.unlink, root + '/f'"),
        ("mkdir", "EMLINK", "os.mkdir, root + '/d'"),
        ("link", "ENOSPC", "os.link, root + '/f', root + '/g'"),
        ("pread", "EIO", "os.pread, fd, 4, 0"),
        ("pread", "EIO", "os.preadv, fd, [bytearray(4)], 0"),
    ],
)
def test_an_error_comes_once_and_changes_nothing(lab: Lab, op: str, error: str, call: str) -> None:
    code = """
        first = attempt(CALL)
        print(first, sorted(set(os.listdir(root)) - {".mark"}), os.fstat(fd).st_size, attempt(CALL) != first)
    """
    code = "\n".join(line.strip() for line in code.splitlines()).replace("CALL", call)
    nth = 2 if op == "open" else 1  # the prelude opens f
    assert program(lab, code, f"{op}::{nth}:{error}") == (0, [error, "['f']", "0", "True"])
    assert sum(shim.count_points(lab.count, fired=True).values()) == 1


def test_short_and_torn_writes(lab: Lab) -> None:
    code = "print(os.write(fd, b'12345678'), os.pwrite(fd, b'abcdefgh', 3), flush=True); os.write(fd, b'tornapart')"
    assert program(lab, code, "write:f$:1:short=3", "pwrite::*:short=2", "write:f$:2:torn=4") == (
        -signal.SIGKILL,
        ["3", "2"],
    )
    assert (lab.root / "f").read_bytes() == b"123torn"


@pytest.mark.parametrize(("action", "left"), [("kill", False), ("kill_after", True)])
def test_kill_before_and_after(lab: Lab, action: str, left: bool) -> None:
    assert program(lab, "os.rename(root + '/f', root + '/g')", f"rename:g$:1:{action}") == (-signal.SIGKILL, [])
    assert (lab.root / "g").exists() is left


def test_skip_is_no_sync_in_the_trace(lab: Lab) -> None:
    assert program(lab, "print(os.fdatasync(fd), os.fsync(fd), syncfs(fd))", "sync:f:*:skip") == (
        0,
        ["None", "None", "0"],
    )
    assert {state.op_index for state in lab.states()} == {0, 1}
    assert shim.count_points(lab.count, "/f") == {"open": 1, "fdatasync": 1, "fsync": 1, "syncfs": 1}


@pytest.mark.parametrize(("nth", "hit"), [("2", "0100"), ("3+", "0011"), ("*", "1111")])
def test_which_calls(lab: Lab, nth: str, hit: str) -> None:
    code = "print(''.join('01'[attempt(os.pwrite, fd, b'x', 0) == 'EIO'] for _ in range(4)))"
    assert program(lab, code, f"pwrite:f:{nth}:EIO", "pwrite:other:*:kill") == (0, [hit])


def test_a_delay_can_be_switched_on(lab: Lab) -> None:
    code = f"""
        def seconds():
            start = time.monotonic()
            os.fdatasync(fd)
            return time.monotonic() - start
        seconds()
        os.close(os.open({str(lab.switch)!r}, os.O_CREAT))
        print(seconds() >= 0.05)
        os.unlink({str(lab.switch)!r})
        seconds()
    """
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    assert program(lab, code, "fdatasync:f:*:delay=50", switch=True) == (0, ["True"])
    assert shim.count_points(lab.count) == {"fdatasync": 1}


def test_a_read_that_may_not_wait_meets_no_slow_disk(lab: Lab) -> None:
    code = "os.write(fd, b'1234'); print(*(attempt(os.preadv, fd, [bytearray(4)], 0, n) for n in (os.RWF_NOWAIT, 0)))"
    assert program(lab, code, "pread:f:*:delay=10") == (0, ["EAGAIN", "4"])


def test_only_the_root_is_touched(lab: Lab) -> None:
    code = (
        "print(attempt(os.pwrite, os.open(root + '.outside', os.O_RDWR | os.O_CREAT), b'x', 0), attempt(create, 'g'))"
    )
    assert program(lab, code, "*::2+:EIO") == (0, ["1", "EIO"])


@pytest.mark.parametrize("action", ["kill", "kill_after", "ENOSPC", "EIO"])
def test_no_fault_point_of_the_toy_loses_a_record(lab: Lab, action: str) -> None:
    """The nth-fault loop: once for each call the toy makes."""
    assert lab.toy() == 0
    points = sum(shim.count_points(lab.count).values())
    assert points == 30
    for nth in range(1, points + 1):
        lab.again()
        assert lab.toy(f"*::{nth}:{action}") != 0
        assert shim.count_points(lab.count, fired=True).total() == 1
        marks = (lab.root / ".mark").read_bytes() if (lab.root / ".mark").exists() else b""
        assert records(lab.root) >= len(marks.rstrip(b"ab"))


@pytest.mark.parametrize(
    "rule",
    [
        *("write:x:1", "wrote:x:1:EIO", "write:x:0:EIO", "write:x:1:EWHAT", "write:x:1:short", "write:x:1:EIO=5"),
        *("fsync:x:1:short=3", "open:x:1:skip", "write:x:1:kill;write:y:1:kill"),
    ],
)
def test_rules_with_mistakes_are_refused(lab: Lab, rule: str) -> None:
    with pytest.raises(ValueError, match=r"not a rule|unknown op|this action"):
        shim.environment([rule], lab.root)


def test_the_library_refuses_them_too(lab: Lab) -> None:
    environment = {**shim.environment([], lab.root), "EB_FAULT": "write:x"}
    result = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, check=False)
    assert result.returncode == 126
    assert b"write:x" in result.stderr
    assert "EB_FAULT" not in os.environ
