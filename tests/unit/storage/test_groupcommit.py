"""The commit thread's extension on its own: which signal means what."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.storage.commit.groupcommit import GroupCommit

Job = tuple[int, int, int, int, int, int, object]


@pytest.fixture
def group() -> Iterator[GroupCommit]:
    made = GroupCommit()
    yield made
    made.close()


def run(group: GroupCommit) -> bool:
    """One run() on a thread; False when it does not return although it was called."""
    thread = threading.Thread(target=group.run, daemon=True)
    thread.start()
    thread.join(5.0)
    if thread.is_alive():  # free it, so that a failure is one failure
        group.call()
        thread.join(5.0)
        return False
    return True


def test_a_call_before_a_group_is_not_forgotten(group: GroupCommit) -> None:
    """Both signals are one to the thread when it was asleep: it works on the group and still returns."""
    group.call()
    group.submit([], False, False)
    assert run(group)
    assert group.collect() is not None


def test_a_call_after_a_group_is_not_forgotten(group: GroupCommit) -> None:
    group.submit([], False, False)
    group.call()
    assert run(group)
    assert group.collect() is not None


def test_a_call_alone_returns_once(group: GroupCommit) -> None:
    group.call()
    assert run(group)
    assert group.collect() is None
    assert group.idle


@pytest.mark.parametrize("sync", [False, True])
def test_errors_are_told_per_file(group: GroupCommit, sync: bool, tmp_path: Path) -> None:
    """A file that cannot be written does not spoil its neighbours; /dev/null takes everything and syncs nothing."""
    good = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    readonly = os.open(tmp_path / "log", os.O_RDONLY)
    full, null = os.open("/dev/full", os.O_RDWR), os.open("/dev/null", os.O_RDWR)
    try:
        data = bytearray(b"batches")
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        jobs: list[Job] = [(fd, 0, address, 7, 0, 0, data) for fd in (good, readonly, full, null)]
        group.submit(jobs, sync, True)
        with pytest.raises(RuntimeError):
            group.submit([], False, False)
        group.call()
        assert run(group)
        outcome = group.collect()
        assert outcome is not None and outcome[0]
    finally:
        for fd in (good, readonly, full, null):
            os.close(fd)
    names = [tuple(os.strerror(number) if number else "" for number in pair) for pair in outcome[1]]
    assert names == [
        ("", ""),
        ("Bad file descriptor", ""),
        ("No space left on device", ""),
        ("", "Invalid argument" if sync else ""),
    ]
    assert (tmp_path / "log").read_bytes() == b"batches"
