"""Those who use a fleet (fleet.py): producers at ROOT, readers in the middle, a group of member processes at LOCAL.

with Users(fleet, history, "orders", seed=1) as users:
    users.begin()
    ...                 # faults; users.tend() now and then
    users.rest(60.0)    # nobody publishes any more: everything comes to its end
    users.check()
"""

from __future__ import annotations

import random
import threading
from functools import partial
from types import TracebackType

from edgebroker.cli.admin_client import call
from edgebroker.client.producer import Producer
from edgebroker.common.errors import UnreachableError
from tests.kit.waiting import wait_for

from .checker import ConsumerHistory, History, check_groups, read_back
from .crowd import Crowd
from .fleet import Fleet, Node
from .traffic import CLOCK, PARTITIONS, Follower, Writer, send_value

WRITERS, MEMBERS = 2, 2
# So often a member dies, when they are to come and go.
CHURN_SECONDS = 8.0
# Where readers come, one after the other; all but the first find a log that is long already, and read it from its
# beginning while others follow its end.
PLACES = ("pos", "l3", "pos", "l2b")
NEWCOMER_SECONDS = 20.0
# What comes into being while faults happen, and what is put into it.
NEW_TOPICS = ("receipts", "promos", "banners")
NEW_TOPIC_SECONDS, NEW_TOPIC_RECORDS = 15.0, 40


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
        # Those who left are checked already.
        history.consumers.clear()
        self._name = name
        self._readers: list[tuple[Node, Follower]] = []
        self._writers: list[Writer] = []
        # Topics that were made on the way, and the sole producer of all of them.
        self._made: list[str] = []
        self._makers: list[threading.Thread] = []
        self._made_history = History()
        self._producer = Producer(fleet["root"].server, client_id="maker", timeout=90.0)
        self._churned_at = self._came_at = self._made_at = CLOCK.monotonic()

    @property
    def topics(self) -> list[str]:
        """Everything that was published to."""
        return [self._topic, *self._made]

    def begin(self) -> None:
        """Those who read come first, and see all that there is; then there is more of it."""
        root = self._fleet["root"]
        for rank in range(MEMBERS):
            self.crowd.start(f"m{rank}", seed=self._seed + rank)
        self._newcomer()
        if any(self._ends().values()):
            self.crowd.come_to_the_end(30.0)
        before = len(self._history.acks)
        self._writers = [
            Writer(self._history, root.server, f"p{rank}", self._topic, seed=self._seed + rank, pause=self._pause)
            for rank in range(WRITERS)
        ]
        wait_for(lambda: len(self._history.acks) > before + 50, "the first acknowledgements", 30.0)

    def _newcomer(self) -> None:
        """Another reader, with a group of its own."""
        number = len(self._readers)
        node, history = self._fleet[PLACES[number]], ConsumerHistory(f"shelves-{self._name}-{number}")
        self._history.consumers.append(history)
        self._readers.append((node, Follower(history, node.server, self._topic, seed=self._seed + number)))
        self._came_at = CLOCK.monotonic()

    def _make_topic(self) -> None:
        """Another topic, by publishing to it: in a thread, for send() waits while ROOT cannot be reached."""
        number = len(self._made)
        self._made.append(NEW_TOPICS[number])
        self._made_at = CLOCK.monotonic()
        self._makers.append(threading.Thread(target=self._fill, args=(number,), daemon=True))
        self._makers[-1].start()

    def _fill(self, number: int) -> None:
        n = 0
        while n < NEW_TOPIC_RECORDS:
            try:
                topic, partition = NEW_TOPICS[number], n % PARTITIONS
                send_value(self._made_history, self._producer, topic, partition, f"x{number}", n, 200)
                n += 1
            except UnreachableError:
                pass  # as long as it takes

    def tend(self) -> None:
        """Start members again that died; now and then a reader comes, or a topic."""
        self._attend()
        if len(self._made) < len(NEW_TOPICS) and CLOCK.monotonic() - self._made_at > NEW_TOPIC_SECONDS:
            self._make_topic()

    def _attend(self) -> None:
        self.crowd.tend()
        if len(self._readers) < len(PLACES) and CLOCK.monotonic() - self._came_at > NEWCOMER_SECONDS:
            self._newcomer()

    def churn(self) -> None:
        """Start members again that died; now and then a reader comes, or a member dies."""
        self._attend()
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
        for maker in self._makers:
            maker.join(seconds)
        self._producer.close(seconds)
        for topic in self.topics:
            self._fleet.settle(topic, seconds)
        self.crowd.come_to_the_end(seconds)
        for node, follower in self._readers:
            unseen = partial(self._unseen, follower.history)
            try:
                wait_for(lambda unseen=unseen: not unseen(), "a reader has seen everything", seconds)  # type: ignore[misc]
            except TimeoutError as error:
                group = call(node.admin, "GET", f"/v1/groups/{follower.history.group}")
                raise TimeoutError(f"{error}, at {node.directory.name}: not {unseen()}; {group}") from None
        return CLOCK.monotonic() - begun

    def _unseen(self, reader: ConsumerHistory) -> dict[int, int]:
        """The ends that a reader has not come to yet; none when there is a problem with it, which check() tells."""
        seen = {partition: max(offsets) + 1 for partition, offsets in list(reader.seen.items())}
        return {p: end for p, end in self._ends().items() if seen.get(p, 0) < end and not reader.problems}

    def check(self, *, retention: bool = False) -> None:
        """All promises of the checkers, to be called at rest: the readers leave. Raises AssertionError."""
        for _, follower in self._readers:
            follower.stop()
        for name in self.crowd.names():
            self.crowd.leave(name)
        content = read_back(self._fleet["root"], self._topic)
        self._history.check(self._topic, content, "at ROOT", retention=retention)
        assert not self._history.failures, self._history.failures
        for topic in self._made:
            self._made_history.check(topic, read_back(self._fleet["root"], topic), "at ROOT")
        assert not self._made_history.failures, self._made_history.failures
        for node, follower in self._readers:
            alone = History()
            alone.consumers.append(follower.history)
            check_groups(node, alone, self._topic, content)
        self.crowd.check(self._history, "at LOCAL", retention=retention)

    def forget(self) -> None:
        """The groups are deleted, as of applications that are gone for good."""
        call(self._fleet["local"].admin, "DELETE", f"/v1/groups/{self.crowd.group}")
        for node, follower in self._readers:
            call(node.admin, "DELETE", f"/v1/groups/{follower.history.group}")

    def __enter__(self) -> Users:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.drop()
        self._producer.close(0.0)
        for _, follower in self._readers:
            follower.stop()
        self.crowd.__exit__(kind, error, trace)
