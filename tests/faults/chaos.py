"""A schedule of faults from a seed, and the hand that carries it out on a fleet (fleet.py).

    chaos = Chaos(fleet, seed=7, seconds=120.0, topic="orders")
    chaos.run()
    chaos.over()        # wires mended, nodes awake and started: from here on everything must come to rest
    print(chaos.story)  # what was done when

The schedule depends on the seed and the arguments alone; what it meets (the byte to flip, the order of two starts) may
differ between runs.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .fleet import LINES, MIRRORS, PLAN, Fleet
from .traffic import CLOCK, pass_time

# How often each kind is drawn. A node is killed and started again, or stands still; a bit of a sealed segment flips
# under a node, which is started again a while later, or any bit of its logs while it is down (rot); its wire is pulled
# out or narrow, its connections are reset; what it and one of its parents send each other is swallowed.
KINDS = {"kill": 4, "freeze": 3, "flip": 3, "rot": 2, "unplug": 3, "narrow": 2, "swallow": 3, "reset": 2}
# Seconds that each lasts.
LASTS = {
    "kill": (0.1, 8.0),
    "freeze": (0.3, 12.0),
    "flip": (0.5, 6.0),
    "rot": (0.1, 4.0),
    "unplug": (0.3, 12.0),
    "narrow": (4.0, 15.0),
    "swallow": (1.0, 20.0),
    "reset": (0.0, 0.0),
}
# Two of the same group at the same place would end each other.
_OF_THE_PROCESS = ("kill", "freeze", "flip", "rot")


class Fault(NamedTuple):
    """Something that begins at a time, lasts, and ends; `other` is the second end of a line."""

    at: float
    kind: str
    where: str
    seconds: float
    other: str = ""

    def __str__(self) -> str:
        other = f"-{self.other}" if self.other else ""
        return f"{self.at:6.1f} {self.kind} {self.where}{other} for {self.seconds:.1f} s"


def draw(
    seed: int,
    seconds: float,
    *,
    kinds: Mapping[str, int] = KINDS,
    pause: float = 2.0,
    restartable: Sequence[str] = tuple(PLAN),
) -> list[Fault]:
    """A schedule: something begins every `pause` seconds on average. Only `restartable` nodes are restarted."""
    rng = random.Random(seed)
    busy: dict[tuple[str, str, str], float] = {}
    found = []
    at = rng.uniform(0.0, pause)
    while at < seconds:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        low, high = LASTS[kind]
        lasts = min(rng.uniform(low, high), seconds / 3)
        fault = Fault(at, kind, *_place(kind, rng, restartable, lasts))
        group = "process" if kind in _OF_THE_PROCESS else kind
        key = (group, fault.where, fault.other)
        if busy.get(key, 0.0) <= at:
            busy[key] = at + lasts
            found.append(fault)
        at += rng.expovariate(1.0 / pause)
    return found


def _place(kind: str, rng: random.Random, restartable: Sequence[str], lasts: float) -> tuple[str, float, str]:
    if kind == "swallow":
        where, other = rng.choice(LINES)
        return where, lasts, other
    if kind in ("kill", "flip", "rot"):
        # What ROOT holds is held by nobody else when it is new: nothing of it may be damaged.
        return rng.choice([name for name in restartable if kind == "kill" or name in MIRRORS]), lasts, ""
    return rng.choice(list(PLAN)), lasts, ""


class Chaos:
    """Carries a schedule out, in the caller's thread."""

    def __init__(self, fleet: Fleet, schedule: Sequence[Fault], *, seed: int, topic: str) -> None:
        self.fleet, self.schedule, self._topic = fleet, schedule, topic
        self._rng = random.Random(seed)
        self._begun = CLOCK.monotonic()
        self.counts: Counter[str] = Counter()
        self._lines: list[str] = []
        # Nodes with a flipped byte that were not started since.
        self._flipped: set[str] = set()

    @property
    def story(self) -> str:
        """What was done, with the time at which it really was."""
        return "\n".join(self._lines)

    def _note(self, text: str) -> None:
        self._lines.append(f"{CLOCK.monotonic() - self._begun:6.1f} {text}")

    def run(self, tend: Callable[[], None] = lambda: None) -> None:
        """All of the schedule; `tend` is called again and again."""
        self._begun = CLOCK.monotonic()
        # The number breaks ties: faults themselves are not compared.
        due = [(fault.at, number, False, fault) for number, fault in enumerate(self.schedule)]
        heapq.heapify(due)
        while due:
            at, number, ends, fault = heapq.heappop(due)
            while (left := at - (CLOCK.monotonic() - self._begun)) > 0:
                pass_time(min(left, 0.25))
                tend()
            if ends:
                self._end(fault)
            else:
                self.counts[fault.kind] += 1
                self._begin(fault)
                heapq.heappush(due, (at + fault.seconds, number, True, fault))

    def _begin(self, fault: Fault) -> None:
        node, wires = self.fleet[fault.where], self.fleet.wires
        self._note(f"{fault.kind} {fault.where}{'-' if fault.other else ''}{fault.other} for {fault.seconds:.1f} s")
        match fault.kind:
            case "kill":
                node.kill()
            case "freeze":
                node.freeze()
            case "flip":
                self._flip(fault.where, _sealed)
            case "rot":
                node.kill()
                self._flip(fault.where, _segments)
            case "unplug":
                wires.unplug(fault.where)
            case "narrow":
                wires.narrow(fault.where)
            case "swallow":
                wires.swallow(fault.where, fault.other)
            case "reset":
                wires.reset(fault.where)

    def _end(self, fault: Fault) -> None:
        node, wires = self.fleet[fault.where], self.fleet.wires
        match fault.kind:
            case "kill" | "rot":
                self._start(fault.where)
            case "freeze":
                node.thaw()
            case "flip":
                self._restart(fault.where)
            case "unplug":
                wires.plug(fault.where)
            case "narrow":
                wires.widen(fault.where)
            case "swallow":
                wires.release(fault.where, fault.other)

    def _start(self, name: str) -> None:
        if not self.fleet[name].alive:
            self.fleet[name].start()
            self._flipped.discard(name)
            self._note(f"{name} is started")

    def _restart(self, name: str) -> None:
        """Now and then as it should be."""
        node = self.fleet[name]
        if node.alive and self._rng.random() < 0.5:
            damaged = "damaged" in node.problems()
            code = node.stop()
            # A node that knows of damage is to check its logs at the next start: its stop is not called clean.
            assert code == 0 or damaged, f"{name} stopped with {code}"
        node.kill()
        self._start(name)

    def _flip(self, name: str, segments: Callable[[Path], list[Path]]) -> None:
        """A bit of one of these segments."""
        found = [path for directory in self.fleet[name].logs(self._topic) for path in segments(directory)]
        found = [path for path in found if path.exists() and path.stat().st_size]
        if not found:
            return
        path = self._rng.choice(found)
        try:
            with path.open("r+b") as file:
                position = self._rng.randrange(path.stat().st_size)
                file.seek(position)
                byte = file.read(1)[0]
                file.seek(position)
                file.write(bytes([byte ^ 1 << self._rng.randrange(8)]))
        except FileNotFoundError:
            return  # retention was faster
        self._flipped.add(name)
        self._note(f"byte {position} of {path.relative_to(self.fleet.directory)}")

    def over(self) -> None:
        """Nothing happens any more, and whatever can be repaired from outside is."""
        self.fleet.wires.mend()
        for name, node in self.fleet.nodes.items():
            node.thaw()
            if name in self._flipped:
                self._restart(name)
            else:
                self._start(name)
        self._note("over")


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


def _sealed(directory: Path) -> list[Path]:
    """Those that are not written any more."""
    return _segments(directory)[:-1]
