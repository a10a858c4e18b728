"""The consumer's part of a snapshot refresh: RESET accepted, records loaded, switched once, READY sent.

    RESET -> begin() -> load(), again and again, also behind the target -> switch(), until it is not too early -> READY

Runs in the thread that polls. A staging store that raises ends the attempt: the broker then announces the refresh
again, and begin() says how far the store has come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgebroker.client.consume.subscriber import Subscriber
from edgebroker.client.refresh import Refresh, Staging
from edgebroker.common.errors import AnswerError, Code, ResetRequiredError, UnreachableError
from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.records import Record
from edgebroker.common.types import Start, TopicPartition
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Answer, Ready, Reset


class RefreshLoader:
    """The refreshes of one consumer, at most one in each partition."""

    def __init__(self, subscriber: Subscriber, staging: Staging | None) -> None:
        self._subscriber, self._staging = subscriber, staging
        self._refreshes: dict[TopicPartition, Refresh] = {}
        # reset_id -> next offset of those that were switched: announced again, they are only confirmed.
        self._switched: dict[str, int] = {}

    def request(self, key: TopicPartition, timeout: float | None) -> None:
        """Ask the broker for a refresh. Raises AnswerError, UnreachableError, TimeoutError."""
        ask = Reset(frames.NO_RESET, NO_LOG_ID, *key, 0, 0)
        answer = self._ask(lambda correlation: frames.write_reset(correlation, ask), timeout)
        if answer.code is not Code.OK:
            raise AnswerError(answer.code, answer.message)

    def loading(self, key: TopicPartition) -> bool:
        """Do the records of this partition belong to a refresh?"""
        return key in self._refreshes

    def forget(self, key: TopicPartition) -> None:
        """The partition is not held any more."""
        self._refreshes.pop(key, None)

    def begin(self, reset: Reset) -> None:
        """Accept an announced refresh from where the staging store is. Raises ResetRequiredError without one."""
        key = TopicPartition(reset.topic, reset.partition)
        if self._staging is None:
            raise ResetRequiredError(reset.topic, reset.partition, reset.log_id, reset.from_offset)
        refresh = Refresh(
            reset_id=reset.reset_id.hex(),
            log_id=reset.log_id,
            topic=reset.topic,
            partition=reset.partition,
            from_offset=reset.from_offset,
            target=reset.target,
        )
        if refresh.reset_id in self._switched:
            refresh.next_offset = self._switched[refresh.reset_id]
        else:
            try:
                refresh.next_offset = self._staging.begin(refresh)
            except BaseException:
                self._restart(key)
                raise
        accept = reset._replace(from_offset=refresh.next_offset)
        self._subscriber.request(lambda correlation: frames.write_reset(correlation, accept), lambda answer: None)
        self._refreshes[key] = refresh
        if refresh.complete:
            self._finish(key, refresh)

    def load(self, key: TopicPartition, records: list[Record], next_offset: int, epoch: int) -> None:
        """Put the records of one delivery into the staging store; switch when enough is there."""
        assert self._staging is not None
        refresh = self._refreshes[key]
        refresh.next_offset, refresh.epoch = next_offset, epoch
        try:
            self._staging.load(refresh, records)
        except BaseException:
            self._restart(key)
            raise
        self._subscriber.acknowledge(key, next_offset)
        if refresh.complete:
            self._finish(key, refresh)

    def switch(self) -> None:
        """Ask the staging store again about all refreshes for which it was too early."""
        before = -1
        while before != len(self._refreshes):  # one that is switched may be what others waited for
            before = len(self._refreshes)
            for key, refresh in list(self._refreshes.items()):
                if refresh.complete:
                    self._switch(key, refresh)

    def _finish(self, key: TopicPartition, refresh: Refresh) -> None:
        self._switch(key, refresh)
        if key not in self._refreshes:
            self.switch()

    def _switch(self, key: TopicPartition, refresh: Refresh) -> None:
        """Switch, once for a refresh, and send READY; unanswered, the broker announces it again after a reconnect."""
        assert self._staging is not None
        if refresh.reset_id not in self._switched:
            try:
                if self._staging.switch(refresh) is False:
                    return
            except BaseException:
                self._restart(key)
                raise
            self._switched[refresh.reset_id] = refresh.next_offset
        self._subscriber.end_refresh(key)
        self._refreshes.pop(key, None)
        ready = Ready(bytes.fromhex(refresh.reset_id), *key, refresh.next_offset)
        self._subscriber.request(lambda correlation: frames.write_ready(correlation, ready), lambda answer: None)

    def _restart(self, key: TopicPartition) -> None:
        """The staging store failed: subscribe again, so that the broker announces the refresh again."""
        self._refreshes.pop(key, None)
        self._subscriber.seek(Wanted(*key, Start.COMMITTED, NO_LOG_ID, -1, 0))

    def _ask(self, write: Callable[[int], bytes], timeout: float | None) -> Answer:
        found: list[Answer | None] = []
        done = threading.Event()

        def answered(answer: Answer | None) -> None:
            found.append(answer)
            done.set()

        self._subscriber.request(write, answered)
        if not done.wait(timeout):
            raise TimeoutError(f"the broker did not answer within {timeout:g} s")
        if found[0] is None:
            raise self._subscriber.last_error or UnreachableError(f"no broker at {self._subscriber.link.server}")
        return found[0]
