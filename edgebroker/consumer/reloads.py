"""Which topics are loaded again, and when readers see them.

All partitions of a topic, and all topics that are to change together, are switched together: when one of them is loaded
again, the others are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock, second_of_day
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.common.types import TopicPartition
from edgebroker.consumer.database import Loading
from edgebroker.consumer.declare.application import Topic
from edgebroker.consumer.subscriptions import Asked, Subscriptions

ASK_AGAIN_SECONDS = 1.0


class Reloads:
    """Belongs to the thread that polls. `activation` says when readers see what was loaded: now, within hours, or by
    activate()."""

    def __init__(
        self, topics: Mapping[str, Topic], subscriptions: Subscriptions, activation: str, clock: Clock
    ) -> None:
        self._topics, self._subscriptions, self._clock = topics, subscriptions, clock
        # Topics to ask for; of those that were asked for, the partitions that are loaded, and those that cannot be.
        self._incomplete = set[str]()
        self._asked: dict[str, Asked] = {}
        self._ask_due = 0.0
        # Topics that are rebuilt from the copy: no one has to be asked for them.
        self._rebuilt = set[str]()
        # Partitions whose refresh is to be announced again, from its beginning.
        self._to_announce: set[TopicPartition] = set()
        self._activation, self._activated = activation, set[str]()

    def together(self, topic: str) -> list[str]:
        """The topics that are switched in one step with this one, itself among them."""
        found, added = [topic], True
        while added:
            others = {
                name
                for name, one in self._topics.items()
                if name not in found and (any(name in self._topics[mine].together for mine in found)
                                          or any(mine in one.together for mine in found))
            }  # fmt: skip
            found += sorted(others)
            added = bool(others)
        return found

    # ---- what is asked for ----

    def want(self, topics: Iterable[str]) -> None:
        """Have topics loaded again; those that were asked for already go on."""
        self._incomplete.update(topic for topic in topics if topic not in self._asked and topic not in self._rebuilt)

    def rebuild(self, topics: Iterable[str]) -> None:
        """Topics are rebuilt from the copy."""
        self._rebuilt.update(topics)

    def end_rebuild(self, topic: str) -> None:
        """A topic is not rebuilt any more: the broker loads it."""
        self._rebuilt.discard(topic)

    def want_again(self, topic: str) -> None:
        """Have a topic loaded again, at most once in a while: what was asked for before may have been of another."""
        now = self._clock.monotonic()
        if topic not in self._asked or now >= self._ask_due:
            self._asked.pop(topic, None)
            self._incomplete.add(topic)

    def announce_again(self, key: TopicPartition) -> None:
        """What was loaded of a partition does not count: its refresh has to be announced again."""
        self._to_announce.add(key)

    def ask(self) -> None:
        """Ask the broker for what is wanted and was not asked for yet."""
        while self._to_announce:
            self._subscriptions.announce_again(self._to_announce.pop())
        now = self._clock.monotonic()
        if now < self._ask_due:
            return
        for topic in list(self._incomplete):
            held = self._subscriptions.held(topic)
            if not held:
                continue
            self._ask_due = now + ASK_AGAIN_SECONDS
            asked = self._asked[topic] = self._subscriptions.load_again(topic)
            if held <= asked.loading | asked.refused:
                self._incomplete.discard(topic)

    def is_refused(self, key: TopicPartition) -> bool:
        """Was a partition asked for that cannot be loaded?"""
        asked = self._asked.get(key.topic)
        return asked is not None and key.partition in asked.refused

    @property
    def asked(self) -> list[str]:
        """The topics that were asked for and are not switched yet."""
        return list(self._asked)

    # ---- when readers see it ----

    def is_whole(self, topic: str, loading: set[int]) -> bool:
        """Are all partitions of a topic loaded again that can be?"""
        if topic in self._rebuilt:
            return True
        asked, held = self._asked.get(topic), self._subscriptions.held(topic)
        if asked is None or not held <= asked.loading | asked.refused:
            self._incomplete.add(topic)
            return False
        return asked.loading <= loading

    def is_caught_up(self, topic: str, loading: Mapping[int, Loading]) -> bool:
        """Is loaded what the broker has, as far as it has said so?"""
        ends = self._subscriptions.ends()
        return all(
            one.position.next_offset >= ends.get(TopicPartition(topic, partition), 0)
            for partition, one in loading.items()
        )

    def may_switch(self, topics: Sequence[str]) -> bool:
        """Is it time to show what was loaded?"""
        if self._activation == "command":
            return self._activated.issuperset(topics)
        return self._activation == "now" or parse_hours(self._activation).open(second_of_day(self._clock.wall_ms()))

    def activate(self, topics: Sequence[str]) -> tuple[Outcome, str]:
        """Show these topics, which are loaded again and wait for it."""
        if not topics:
            return Outcome.CONFLICT, "nothing is loaded that waits to be shown"
        self._activated.update(*(self.together(topic) for topic in topics))
        self._subscriptions.switch(topics)
        return Outcome.OK, ""

    def switched(self, topic: str) -> None:
        """Readers see what was loaded."""
        self._asked.pop(topic, None)
        self._rebuilt.discard(topic)
        self._activated.discard(topic)
