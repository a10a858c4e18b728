"""Make the file calls of a child process fail, hang or kill it, on demand: see fault.c for the rules.

    subprocess.run(command, env=environment(["fdatasync:.log:3:EIO"], data_directory))

A rule is ``op:part of the path:nth:action``. A nth-fault loop first lets a run count its calls
(`environment([], root, count=file)`, then `count_points(file)`) and then runs once for each of them with
``*::N:kill`` or any other action. Files named ``.mark`` under the root are notes of the program to the trace.
"""

import errno
import functools
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "fault.c", _HERE / "fault_calls.h")
_MARK_HEADER = struct.Struct("<cBHHxxqQQ")

_WRITES = {"write", "pwrite"}
_SYNCS = {"fsync", "fdatasync", "syncfs", "sync"}
_OTHERS = {"ftruncate", "fallocate", "open", "rename", "unlink", "mkdir", "link", "pread", "*"}
OPS = _WRITES | _SYNCS | _OTHERS
_RULE = re.compile(r"(?P<op>[a-z*]+):(?P<path>[^:;]*):(?P<nth>\*|[1-9][0-9]*\+?):(?P<action>[A-Za-z0-9_]+)(?P<k>=\d+)?")


def available() -> bool:
    """Whether this machine can build and preload the library: Linux, glibc and gcc."""
    try:
        return library().exists()
    except (OSError, subprocess.CalledProcessError):
        return False


@functools.cache
def library() -> Path:
    """The built library; built again when its source is newer than what an earlier run left."""
    gcc = shutil.which("gcc")
    if gcc is None:
        raise FileNotFoundError("gcc is needed to build the fault library")
    directory = Path(tempfile.gettempdir()) / f"edgebroker-faults-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    owner = directory.lstat()
    if owner.st_uid != os.getuid() or not stat.S_ISDIR(owner.st_mode):
        raise PermissionError(f"{directory} belongs to somebody else")
    stamp = "-".join(str(source.stat().st_mtime_ns) for source in _SOURCES)
    built = directory / f"fault-{stamp}.so"
    if not built.exists():
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".so", delete=False) as target:
            command = [gcc, "-shared", "-fPIC", "-O2", "-o", target.name, str(_SOURCES[0]), "-lpthread"]
        subprocess.run(command, check=True, capture_output=True)
        os.rename(target.name, built)
    return built


def _check(rule: str) -> None:
    """Refuse a rule that could never do what it says: a test with a typo in it would prove nothing."""
    found = _RULE.fullmatch(rule)
    if found is None:
        raise ValueError(f"not a rule (op:path:nth:action): {rule!r}")
    op, action, has_number = found["op"], found["action"], found["k"] is not None
    if op not in OPS:
        raise ValueError(f"unknown op in {rule!r}; known: {', '.join(sorted(OPS))}")
    if action in ("short", "torn", "delay"):
        fits = has_number and (action == "delay" or op in _WRITES)
    elif action == "skip":
        fits = not has_number and op not in ("open", "pread", "*")
    else:
        fits = not has_number and (action in ("kill", "kill_after") or hasattr(errno, action))
    if not fits:
        raise ValueError(f"this action does not exist or does not suit the op: {rule!r}")


def environment(
    rules: list[str],
    root: str | os.PathLike[str],
    switch: str | os.PathLike[str] | None = None,
    count: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """The environment for a child process: this one's, the library and what it shall do.

    switch: rules are in force only while this file exists. count: file for count_points(); trace: file for
    crashstates.states(). Both are appended to, so that several processes can share them.
    """
    for rule in rules:
        _check(rule)
    result = {name: value for name, value in os.environ.items() if not name.startswith(("EB_FAULT", "EB_TRACE"))}
    result["LD_PRELOAD"] = ":".join(filter(None, [result.get("LD_PRELOAD"), str(library())]))
    result["EB_FAULT_ROOT"] = os.path.realpath(root)
    if rules:
        result["EB_FAULT"] = ";".join(rules)
    for name, path in (("EB_FAULT_SWITCH", switch), ("EB_FAULT_COUNT", count), ("EB_TRACE", trace)):
        if path is not None:
            result[name] = os.path.realpath(path)
    return result


def count_points(path: str | os.PathLike[str], where: str = "", *, fired: bool = False) -> Counter[str]:
    """How often each op was called on a path with `where` in it; with `fired` only calls that met a rule."""
    points: Counter[str] = Counter()
    for line in Path(path).read_text(errors="surrogateescape").splitlines() if os.path.exists(path) else ():
        op, _, place = line.partition(" ")
        name, hit, _ = op.partition("!")
        if where in place and (hit or not fired):
            points[name] += 1
    return points


def mark(trace: str | os.PathLike[str], data: bytes) -> None:
    """Add a mark to a trace from outside the traced process, for example when a client got its acknowledgement."""
    with open(trace, "ab", buffering=0) as file:
        file.write(_MARK_HEADER.pack(b"a", 0, 0, 0, 0, 0, len(data)) + data)
