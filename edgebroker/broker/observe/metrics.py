"""Plain counters, one integer each, changed on the loop only. Nothing here costs more than an addition.

/v1/node shows them as they are, /metrics under their names with edgebroker_ before and _total behind
(broker/admin/exposition.py).
"""

from dataclasses import Field, dataclass, field, fields

from edgebroker.common.histogram import Histogram


def _count(text: str) -> int:
    found: int = field(default=0, metadata={"help": text})
    return found


@dataclass(slots=True)
class Metrics:
    """Totals since the node started."""

    accept_rests: int = _count("pauses in accepting connections, for lack of descriptors or at limits.max_connections")
    acks_in: int = _count("acknowledgements of consumers for what they hold")
    assignments: int = _count("partitions granted to consumers")
    bytes_published: int = _count("bytes of record batches taken from producers")
    cold_deliveries: int = _count("reads from the disk that deliveries waited for")
    connections_closed: int = _count("connections of the binary protocol that ended")
    connections_opened: int = _count("connections of the binary protocol that were accepted")
    connections_refused: int = _count("connections refused at limits.max_connections or limits.per_address_connections")
    dead_letter_failures: int = _count("attempts to write a dead letter that failed")
    dead_letters: int = _count("dead letters written")
    deliveries: int = _count("DELIVER frames sent")
    delivery_timeouts: int = _count("leases that timed out")
    frames_refused: int = _count("frames that were too large")
    gaps: int = _count("gaps delivered")
    repair_failures: int = _count("attempts to repair a corrupt range that failed")
    holders_given_up: int = _count("groups and children given up because the disk was full")
    http_requests: int = _count("requests to the admin interface")
    idle_timeouts: int = _count("connections cut for silence")
    in_progress_acks: int = _count("acknowledgements that asked for more time")
    negative_acks: int = _count("records that a consumer refused")
    access_refused: int = _count("clients not let in: without a token, or with one that does not count")
    rights_missing: int = _count("requests refused because who asked lacks a right")
    peers_refused: int = _count("connections not let in: without TLS, or with a certificate that does not count")
    pipe_bytes_in: int = _count("stored bytes taken from the parent")
    pipe_bytes_out: int = _count("stored bytes sent to children")
    pipe_bytes_wasted: int = _count("bytes from the parent that were of no use")
    records_truncated: int = _count("records truncated, and retained aside: the parent's log is another one")
    log_truncations: int = _count("logs truncated because the parent's is another one")
    pipe_failovers: int = _count("changes of parent")
    pipe_frames_out: int = _count("frames with data sent to children")
    pipe_lost: int = _count("connections to the parent that were lost or could not be made")
    pipe_polls: int = _count("polls of children answered")
    pipe_polls_refused: int = _count("polls of children refused")
    pipe_polls_sent: int = _count("polls sent to the parent")
    logs_recreated: int = _count("logs recreated because the parent's is another one")
    joins_issued: int = _count("certificates issued to nodes that joined or renewed theirs")
    joins_refused: int = _count("requests to join that were refused")
    log_gaps: int = _count("gaps in replicated logs: the parent had removed the records before this node had them")
    protocol_errors: int = _count("connections cut for bytes that the protocol does not allow")
    publish_frames: int = _count("PUBLISH frames")
    publish_refused: int = _count("answers to PUBLISH frames that were not OK")
    records_delivered: int = _count("offsets handed over in DELIVER frames")
    records_expired: int = _count("offsets skipped because of message_ttl_ms")
    records_repaired: int = _count("records fetched again and put in")
    records_published: int = _count("records taken from producers")
    redeliveries: int = _count("leases that ended in a failure of any kind")
    refreshes_begun: int = _count("refreshes of consumers begun")
    refreshes_done: int = _count("refreshes of consumers completed")
    reports_received: int = _count("reports of nodes taken from below")
    reports_refused: int = _count("reports of nodes that were not understood")
    reports_sent: int = _count("reports of nodes passed up to the parent")
    refreshes_announced: int = _count("RESET frames sent")
    resyncs_done: int = _count("topics resynced from the parent")
    resyncs_failed: int = _count("resyncs that failed or were aborted")
    revocations: int = _count("partitions taken from a consumer for another one")
    snapshots_completed: int = _count("snapshots of tables completed")
    stale_acks: int = _count("acknowledgements that came too late")
    refused_by_code: dict[str, int] = field(default_factory=dict)
    limits_reached: dict[str, int] = field(default_factory=dict)
    push_latency: Histogram = field(default_factory=Histogram)
    loop_lag: Histogram = field(default_factory=Histogram)

    def refused(self, code_name: str, count: int = 1) -> None:
        """A request was answered with a code other than OK."""
        self.refused_by_code[code_name] = self.refused_by_code.get(code_name, 0) + count

    def snapshot(self) -> dict[str, int | dict[str, int]]:
        """For /v1/node."""
        counters: dict[str, int] = {one.name: getattr(self, one.name) for one in counters_of()}
        return {
            **counters,
            "refused_by_code": dict(self.refused_by_code),
            "limits_reached": dict(self.limits_reached),
        }


def counters_of() -> list[Field[int]]:
    """The plain counters; metadata["help"] says what each counts."""
    return [one for one in fields(Metrics) if "help" in one.metadata]
