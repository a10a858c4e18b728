"""Those who use a fleet (fleet.py): producers at ROOT, a reader at POS, a group of member processes at LOCAL.

with Users(fleet, history, "orders", seed=1) as users:
    users.begin()
    ...                 # faults; users.tend() now and then
    users.rest(60.0)    # nobody publishes any more: everything comes to its end
    users.check()
"""

from __future__ import annotations

import random
from types import TracebackType

from edgebroker.cli.adminclient import call

from .checker import ConsumerHistory, History, check_groups, read_back
from .crowd import Crowd
from .fleet import Fleet
from .traffic import CLOCK, Follower, Writer, until

WRITERS, MEMBERS = 2, 2
# So often a member dies, when they are to come and go.
CHURN_SECONDS = 8.0


class Users:
    """A context manager that lets go of all of them. `name` tells this crew's groups from those of others."""

    def __init__(
        self, fleet: Fleet, history: History, topic: str, *, seed: int, name: str = "1", pause: float = 0.12
    ) -> None:
        self._fleet, self._history, self._topic, self._seed, self._pause = fleet, history, topic, seed, pause
        self._rng = random.Random(seed)
        self.directory = fleet.directory / f"users-{name}"
        self.directory.mkdir()
        self.crowd = Crowd(self.directory, fleet["local"], topic, f"tills-{name}")
        self.shelf = ConsumerHistory(f"shelves-{name}")
        # Those who left are checked already.
        history.consumers[:] = [self.shelf]
        self._follower: Follower | None = None
        self._writers: list[Writer] = []
        self._churned_at = CLOCK.monotonic()

    def begin(self) -> None:
        """Those who read come first, and see all that there is; then there is more of it."""
        root, pos = self._fleet["root"], self._fleet["pos"]
        for rank in range(MEMBERS):
            self.crowd.start(f"m{rank}", seed=self._seed + rank)
        self._follower = Follower(self.shelf, pos.server, self._topic, seed=self._seed)
        if any(self._ends().values()):
            self.crowd.come_to_the_end(30.0)
        before = len(self._history.acks)
        self._writers = [
            Writer(self._history, root.server, f"p{rank}", self._topic, seed=self._seed + rank, pause=self._pause)
            for rank in range(WRITERS)
        ]
        until(lambda: len(self._history.acks) > before + 50, 30.0, "the first acknowledgements")

    def tend(self) -> None:
        """Start members again that died."""
        self.crowd.tend()

    def churn(self) -> None:
        """The same; and now and then a member dies."""
        self.crowd.tend()
        names = self.crowd.names()
        if names and CLOCK.monotonic() - self._churned_at > CHURN_SECONDS:
            self._churned_at = CLOCK.monotonic()
            self.crowd.kill(self._rng.choice(names))

    def _ends(self) -> dict[int, int]:
        parts = self._fleet["root"].partitions(self._topic)
        return {part["partition"]: part["durable_end"] for part in parts if part["durable_end"] > part["log_start"]}

    def rest(self, seconds: float) -> float:
        """Everything published is acknowledged, everywhere, and handled; how long that took. TimeoutError, or what a
        reader found to be wrong."""
        begun = CLOCK.monotonic()
        for writer in self._writers:
            writer.stop(seconds)
        self._fleet.settle(self._topic, seconds)
        self.crowd.come_to_the_end(seconds)
        until(lambda: not self._unseen() or bool(self.shelf.problems), seconds, "the reader at POS has seen everything")
        return CLOCK.monotonic() - begun

    def _unseen(self) -> dict[int, int]:
        """The ends that the reader at POS has not come to yet."""
        seen = {partition: max(offsets) + 1 for partition, offsets in list(self.shelf.seen.items())}
        return {partition: end for partition, end in self._ends().items() if seen.get(partition, 0) < end}

    def check(self, *, retention: bool = False) -> None:
        """All promises of the checkers, to be called at rest: the readers leave. Raises AssertionError."""
        assert self._follower is not None
        self._follower.stop()
        for name in self.crowd.names():
            self.crowd.leave(name)
        content = read_back(self._fleet["root"], self._topic)
        self._history.check(self._topic, content, "at ROOT", retention=retention)
        assert not self._history.failures, self._history.failures
        check_groups(self._fleet["pos"], self._history, self._topic, content)
        self.crowd.check(self._history, "at LOCAL", retention=retention)

    def forget(self) -> None:
        """The groups are deleted, as of applications that are gone for good."""
        call(self._fleet["local"].admin, "DELETE", f"/v1/groups/{self.crowd.group}")
        call(self._fleet["pos"].admin, "DELETE", f"/v1/groups/{self.shelf.group}")

    def __enter__(self) -> Users:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.drop()
        if self._follower is not None:
            self._follower.stop()
        self.crowd.__exit__(kind, error, trace)
