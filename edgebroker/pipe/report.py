"""What a node says about itself to the nodes above it, and what they pass on (docs/pipe.md).

A Report is made by the node it is about, at most 2 KB, and travels as it is up to the top. A NodeState is a report with
what the nodes on its way know about the line below it. A Batch carries what changed since the batch before. All JSON.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Annotated

import msgspec
from msgspec import Meta

from edgebroker.common.config import MAX_LABEL_LENGTH, MAX_LABELS
from edgebroker.common.crc32c import crc32c

MAX_REPORT_BYTES = 2048
MOST_TOPICS = 200
# The node above takes a batch in one turn of its loop.
MAX_BATCH_BYTES = 128 << 10
MAX_CANDIDATES = 8
# Of a request to a node below, and of its answer.
MAX_CALL_BYTES, MAX_ANSWER_BYTES = 64 << 10, 4 << 20
# The codes of answers to a batch. It does not follow the one before: everything has to be sent again. Its sender is not
# connected, or from another address.
NEW_SESSION, NOT_A_CHILD = "NEW_SESSION", "NOT_A_CHILD"

Id = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Name = Annotated[str, Meta(max_length=255, pattern=r"\A[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z")]
_Word = Annotated[str, Meta(max_length=MAX_LABEL_LENGTH)]
_Address = Annotated[str, Meta(max_length=300)]
_Number = Annotated[int, Meta(ge=0, le=1 << 62)]
# Far beyond what is sensible, and within what a database, a clock and JSON can carry.
_Seconds = Annotated[float, Meta(ge=-1, le=1e10)]
_Skew = Annotated[int, Meta(ge=-(1 << 53), le=1 << 53)]
_WallMs = Annotated[int, Meta(ge=0, le=1 << 53)]


class GroupReport(msgspec.Struct, frozen=True, array_like=True):
    """What a group has applied of each partition of a topic: what its member says that readers see, else its committed
    offset (-1: nothing yet). `stored` are its committed offsets, where they are other ones."""

    name: str
    applied: list[int]
    refreshing: bool = False
    stored: list[int] = []


class TopicReport(msgspec.Struct, frozen=True, array_like=True):
    """What of a topic has arrived: the durable end of each partition (-1: not here), and what was done with it. `logs`
    is the digest of the log ids: a topic that was made again is another one."""

    name: str
    ends: list[int]
    groups: list[GroupReport] = []
    dead_letters: int = 0
    logs: int = 0


class ResyncReport(msgspec.Struct, frozen=True, array_like=True):
    """How far a node is with a resync: waiting, loading, held (until its hours), shrunk, no_space, switching, done,
    failed, refreshing (a group)."""

    id: Id
    topic: str
    state: str


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node about itself. `boot` is drawn at every start, `number` grows with every report of that run. `address` is
    where children reach its HTTP interface, `parent` the uid of the node it follows ("" while it follows none).
    `managed`: it takes its parents from the registry, and `candidates` is the digest of the list that it has;
    `standby` is the digest of the copy of the registry that it keeps.
    `resyncs` are the last ones. `truncated_records`: records that were truncated since its start, and retained aside.
    `left_out` topics had no room."""

    uid: Id
    name: _Name
    level: Annotated[str, Meta(pattern=r"\A(root|l2|l3|pos|local)\Z")]
    version: _Word
    boot: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    number: _Number
    region: Annotated[str, Meta(max_length=255)] = ""
    labels: Annotated[dict[_Word, _Word], Meta(max_length=MAX_LABELS)] = {}
    address: _Address = ""
    parent: str = ""
    managed: bool = False
    candidates: int = 0
    standby: int = 0
    topics: list[TopicReport] = []
    resyncs: Annotated[list[ResyncReport], Meta(max_length=4)] = []
    problems: Annotated[list[_Word], Meta(max_length=32)] = []
    disk_free_percent: int = 100
    disk_days: int = -1
    truncated_records: int = 0
    left_out: int = 0


class NodeState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A report on its way. `silent`: seconds since the node above it lost it (-1: it is connected). `behind`: seconds
    since the oldest record that it still lacks became durable at the node above it; `skew`: seconds that its wall clock
    is ahead of that of the node above it."""

    report: msgspec.Raw
    silent: _Seconds = -1.0
    behind: _Seconds = 0.0
    skew: _Skew = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/tree/reports. Number 0 starts a session, every other one follows the one before in the same
    `session`. `wall_ms` is the sender's clock. `leaving`: the sender stops."""

    sender: Id
    session: Annotated[str, Meta(max_length=64)]
    number: _Number
    nodes: list[NodeState]
    wall_ms: _WallMs = 0
    leaving: bool = False


class Heard(msgspec.Struct, frozen=True):
    """The answer to a batch: lost nodes of it that are connected elsewhere."""

    elsewhere: list[str] = []


class ParentAssignment(msgspec.Struct, frozen=True, kw_only=True, tag="parents"):
    """Where a node shall look for its parent: HTTP addresses, the best first. `drain`: leave a parent that is not in
    the list even if it works, and take an empty list for an answer."""

    uid: Id
    candidates: Annotated[list[_Address], Meta(max_length=MAX_CANDIDATES)]
    drain: bool = False


class ResyncDirective(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="resync"):
    """What a node shall resync from its parent: a topic ("" all that it mirrors), or with `group` have that group
    refresh it. `in_place`: without a copy beside it, for want of space. `force`: even if the new copy has less than
    90 % of the records. `accept`: even if the parent's is another log. `hours`: switch only then, by its own clock."""

    id: Id
    uid: Id
    topic: Annotated[str, Meta(max_length=200)] = ""
    group: Annotated[str, Meta(max_length=255)] = ""
    in_place: bool = False
    force: bool = False
    accept: bool = False
    hours: Annotated[str, Meta(max_length=200)] = ""


class StandbyDirective(msgspec.Struct, frozen=True, kw_only=True, tag="standby"):
    """A child shall keep a copy of the registry: the one of this digest is there now."""

    uid: Id
    digest: int


class AdminCall(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """A request for the admin routes of a node; `target` is the path with the query."""

    uid: Id
    id: Id
    method: Annotated[str, Meta(pattern=r"\A[A-Z]{1,10}\Z")]
    target: Annotated[str, Meta(max_length=4096)]
    body: Annotated[bytes, Meta(max_length=MAX_CALL_BYTES)] = b""


class AdminAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/tree/answers: what a node answers to an AdminCall."""

    id: Id
    status: Annotated[int, Meta(ge=200, le=599)]
    content_type: Annotated[str, Meta(max_length=200, pattern=r"\A[\x20-\x7e]*\Z")]
    body: Annotated[bytes, Meta(max_length=MAX_ANSWER_BYTES)]


Directive = ParentAssignment | ResyncDirective | StandbyDirective | AdminCall


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/registry: a node that has no parent asks for its candidates. `path` are the nodes that have
    passed the question on."""

    report: Report
    path: Annotated[list[Id], Meta(max_length=16)] = []


def digest_of_logs(log_ids: list[str]) -> int:
    """Tells the logs of a topic apart from those of another one of its name."""
    return crc32c("".join(log_ids).encode())


def digest(candidates: list[str]) -> int:
    """Tells lists of candidates apart; 0 for an empty one."""
    return crc32c(msgspec.json.encode(candidates)) if candidates else 0


def within_limit(report: Report) -> Report:
    """The report with as many topics as fit into MAX_REPORT_BYTES: those where something is waiting go first."""
    if len(msgspec.json.encode(report)) <= MAX_REPORT_BYTES:
        return report
    bare = msgspec.structs.replace(report, topics=[], left_out=report.left_out + len(report.topics))
    left = MAX_REPORT_BYTES - len(msgspec.json.encode(bare)) - len('"topics":[],')
    kept = []
    for topic in sorted(report.topics, key=rank):
        size = len(msgspec.json.encode(topic)) + 1
        if size > left:
            continue  # one that is too big hides no other
        left -= size
        kept.append(topic)
    return msgspec.structs.replace(bare, topics=kept, left_out=bare.left_out - len(kept))


class RankedTopics:
    """The MOST_TOPICS of many that matter most; no more have room in a report."""

    def __init__(self) -> None:
        self._found: list[tuple[tuple[bool, bool, str], TopicReport]] = []
        self._count = 0

    def add(self, topic: TopicReport) -> None:
        self._count += 1
        self._found.append((rank(topic), topic))
        if len(self._found) >= 2 * MOST_TOPICS:
            self._found = sorted(self._found, key=itemgetter(0))[:MOST_TOPICS]

    def best(self) -> list[TopicReport]:
        """By name."""
        best = [topic for _, topic in sorted(self._found, key=itemgetter(0))[:MOST_TOPICS]]
        return sorted(best, key=lambda topic: topic.name)

    @property
    def left_out(self) -> int:
        return max(0, self._count - MOST_TOPICS)


def rank(topic: TopicReport) -> tuple[bool, bool, str]:
    """Topics with dead letters go first, then those where something is waiting."""
    waiting = any(one < end for group in topic.groups for one, end in zip(group.applied, topic.ends, strict=True))
    return not topic.dead_letters, not waiting, topic.name
