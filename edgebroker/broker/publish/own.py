"""What the broker itself publishes, to topics that clients cannot write to: dead letters, records of trust."""

from __future__ import annotations

from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.common.errors import Code
from edgebroker.common.messages import PublishRun
from edgebroker.common.outcome import Done, Outcome, outcome_of
from edgebroker.common.spans import ANSWER, pack_span
from edgebroker.common.types import AckLevel


class OwnPublisher:
    """The publisher of one batch."""

    producer_id = -1

    def __init__(self, client_id: str, done: Done) -> None:
        self.client_id, self._done = client_id, done

    def answered(self, spans: bytes, answers: bytes) -> None:
        _, code, reason = ANSWER.unpack(answers)
        if code == Code.OK:
            self._done(Outcome.OK, "")
        else:
            self._done(outcome_of(Code(code)), EXPLANATION.get(Reason(reason), "it was not stored"))

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self._done(outcome, why)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        self._done(outcome_of(Code(code)), why)

    def hold(self) -> None:
        """One batch is not a flood."""

    def release(self) -> None:
        """It was not held."""


def publish_own(publishing: Publishing, client_id: str, topic: str, data: bytes, done: Done) -> None:
    """Publish a batch to partition 0 of a topic that exists: done(OK, "") once it is durable."""
    run = PublishRun(AckLevel.DURABLE, topic, 0, memoryview(data), pack_span(1, 0, len(data)))
    publishing.submit(OwnPublisher(client_id, done), run, internal=True)
