"""Topics that a broker does not have yet: a terminal starts before its first records have come.

CONNECT tells of topics whether they exist. The ones that do not are asked about again every second, and the broker
shows its operator who waits for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from edgebroker.client.link import Link
from edgebroker.common.errors import AnswerError, Code
from edgebroker.network.io.loop import Loop, TimerHandle
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Answer, Connect

log = logging.getLogger(__name__)

ASK_SECONDS = 1.0


class MissingTopics:
    """Belongs to the I/O thread. `found` gets topics that exist, `failed` an error that waiting does not mend."""

    def __init__(
        self,
        loop: Loop,
        link: Link,
        found: Callable[[Sequence[str]], None],
        failed: Callable[[AnswerError], None],
    ) -> None:
        self._loop, self._link, self._found, self._failed = loop, link, found, failed
        self._names: list[str] = []
        self._timer: TimerHandle | None = None
        # All topics were there when a subscription was refused: it was sent once more.
        self._retrying = False

    def refused(self, topics: Sequence[str], error: AnswerError) -> None:
        """A subscription to these topics was refused with UNKNOWN_TOPIC, as a whole: find out which of them the broker
        lacks, and wait for those. When it has all of them, after another try too, something else is missing: the error
        counts."""

        def answered(there: list[str], missing: list[str]) -> None:
            if missing:
                self._wait_for(missing)
                self._go_on(there)
            elif self._retrying:
                self._failed(error)
            else:
                self._retrying = True  # they may have come meanwhile
                self._found(there)

        self._ask(list(topics), answered)

    def accepted(self) -> None:
        """A subscription was accepted."""
        self._retrying = False

    def deleted(self, topics: Sequence[str], error: AnswerError) -> None:
        """Some of these topics, which were subscribed to, are gone; the others are still subscribed to. The caller is
        told; if it polls on, they are waited for."""

        def answered(there: list[str], missing: list[str]) -> None:
            self._wait_for(missing)
            self._go_on([])

        self._failed(error)
        self._ask(list(topics), answered)

    def forget(self) -> None:
        """The connection is over; the next one begins with all topics."""
        self._names, self._retrying = [], False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for(self, missing: list[str]) -> None:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        what, verb, them = ("topic", "does", "it") if len(missing) == 1 else ("topics", "do", "them")
        log.warning("%s %s %s not exist at %s yet; waiting for %s", what, names, verb, self._link.server, them)
        self._names += [name for name in missing if name not in self._names]

    def _go_on(self, there: list[str]) -> None:
        if there:
            self._found(there)
        if self._names and self._timer is None:
            self._timer = self._loop.call_later(ASK_SECONDS, self._again)

    def _again(self) -> None:
        self._timer = None

        def answered(there: list[str], missing: list[str]) -> None:
            if there:
                log.info("there now: %s", ", ".join(there[:10]))
            self._names = [name for name in self._names if name not in there]
            self._go_on(there)

        self._ask(self._names, answered)

    def _ask(self, names: list[str], done: Callable[[list[str], list[str]], None]) -> None:
        """Ask which of these exist; done(those that do, those that do not). One question after the other."""
        there: set[str] = set()

        def ask(first: int) -> None:
            link, correlation = self._link, self._link.next_correlation()
            asked = names[first : first + frames.MOST_TOPICS]
            connect = Connect(frames.PROTOCOL_VERSION, 0, link.client_id, link.token, -1, -1, asked)

            def answered(answer: Answer, body: memoryview) -> None:
                if answer.code is not Code.OK:
                    self._failed(AnswerError(answer.code, answer.message))
                    return
                grants = frames.read_grants(body, answer.extra_start)
                there.update(topic.name for topic in grants.topics if topic.code is Code.OK)
                if first + len(asked) < len(names):
                    ask(first + len(asked))
                else:
                    done([name for name in names if name in there], [name for name in names if name not in there])

            link.request(correlation, frames.write_connect(correlation, connect), answered)

        ask(0)
