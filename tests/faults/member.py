"""One member of a consumer group as a process of its own: handles records and writes down what it did.

    python -m tests.faults.member '{"server": ..., "topic": ..., "group": ..., "client_id": ..., "journal": ..., ...}'

Every line of the journal is one write, so that it survives a kill of the process: monotonic nanoseconds, what, values.

    h partition lease offset producer n     a record was handled (written before it is acknowledged)
    s partition lease offset                the broker confirmed that everything before is stored as acknowledged
    x partition lease offset                a poison record is about to end this process
    g partition first last reason           a gap        a partition / r partition      assigned, revoked
    ! text                                  what ended it
    b                                       it has begun, and listens to SIGTERM
    e                                       it left its group in peace (SIGTERM)
"""

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgebroker.client.consumer import Consumer
from edgebroker.common.errors import EdgeBrokerError, GapError
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock, sleep
from edgebroker.common.types import TopicPartition

from .checker import origin_of

POISON = "bad"


@dataclass
class Options:
    """What a member is to do. `pause`: longest time for a record; `hang`: now and then one takes so long (seconds);
    `refuse`: how often it says that it could not; `window`: records in flight; `often`: how often it acknowledges in
    the middle of a delivery."""

    server: str
    topic: str
    group: str
    client_id: str
    journal: str
    seed: int = 0
    pause: float = 0.0
    hang: float = 0.0
    refuse: float = 0.0
    window: int = 0
    acks: bool = True
    often: float = 0.1


class Member(Consumer):
    """A consumer that knows under which lease it was handed what it handles."""

    lease = 0

    def __init__(self, options: Options) -> None:
        self._directives, self._rng = options, random.Random(options.seed)
        self._journal = os.open(options.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        self._clock = SystemClock()
        self.stopping = False
        super().__init__(
            options.server,
            [options.topic],
            options.group,
            client_id=options.client_id,
            auto_ack=False,
            window_records=options.window,
            on_gap=self._on_a_gap,
            on_assigned=self._on_coming,
            on_revoked=self._on_going,
        )
        hand_out = self._receiver._hand_out

        def noted(item: Any, state: Any) -> None:
            self.lease = item.deliver.lease
            hand_out(item, state)

        self._receiver._hand_out = noted  # type: ignore[method-assign]

    def note(self, *fields: object) -> None:
        line = " ".join(map(str, (int(self._clock.monotonic() * 1e9), *fields)))
        os.write(self._journal, line.encode() + b"\n")

    def _on_a_gap(self, gap: GapError) -> None:
        self.note("g", gap.partition, gap.first, gap.last, gap.reason)

    def _on_coming(self, keys: Sequence[TopicPartition]) -> None:
        for key in keys:
            self.note("a", key.partition)

    def _on_going(self, keys: Sequence[TopicPartition]) -> None:
        for key in keys:
            self.note("r", key.partition)
        self._ack_handed()

    def _ack_handed(self) -> None:
        """All that was handed out was handled."""
        if self._directives.acks:
            for key, offset in self.next_offsets().items():
                self.ack_to(*key, offset)

    def work(self) -> None:
        while not self.stopping:
            records = self.poll(0.1)
            if records:
                self._handle(records, self.lease)
            else:
                self._ack_handed()
            if self._directives.acks and self._rng.random() < 0.1:
                self._store()

    def _handle(self, records: list[Record], lease: int) -> None:
        """One delivery; with acknowledgements in the middle of it, and one record that is refused, now and then."""
        options, rng = self._directives, self._rng
        for record in records:
            producer, n = origin_of(record.value or b"")
            if producer == POISON:
                self.note("x", record.partition, lease, record.offset)
                os.kill(os.getpid(), signal.SIGKILL)
            if rng.random() < options.refuse:
                self.nack(record, "refused")
                return
            if options.pause:
                sleep(rng.uniform(0.0, options.pause))
            if options.hang and rng.random() < 0.002:
                sleep(options.hang)
            self.note("h", record.partition, lease, record.offset, producer, n)
            if options.acks and rng.random() < options.often:
                self.ack(record)
        if options.acks and rng.random() < 0.9:
            self.ack(records[-1])

    def _store(self) -> None:
        try:
            self.commit(0.5)
        except TimeoutError:
            return
        with self._subscriber.changed:
            states = [(key.partition, state.lease, state.stored) for key, state in self._subscriber.partitions.items()]
        for partition, lease, stored in states:
            if lease and stored >= 0:
                self.note("s", partition, lease, stored)

    def finish(self) -> None:
        """Say what was handled before, then leave."""
        self._ack_handed()
        self.close()
        self.note("e")


def main() -> None:
    member = Member(Options(**json.loads(sys.argv[1])))

    def stop(*_: object) -> None:
        member.stopping = True

    signal.signal(signal.SIGTERM, stop)
    member.note("b")
    try:
        member.work()
        member.finish()
    except (EdgeBrokerError, ValueError) as error:
        member.note("!", repr(error))
        raise


if __name__ == "__main__":
    main()
