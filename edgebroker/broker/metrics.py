"""Plain counters, one integer each, changed on the loop only. Nothing here costs more than an addition."""

from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Metrics:
    """Totals since the node started."""

    accept_rests: int = 0
    acks_in: int = 0
    assignments: int = 0
    bytes_published: int = 0
    cold_deliveries: int = 0
    connections_closed: int = 0
    connections_opened: int = 0
    connections_refused: int = 0
    dead_letter_failures: int = 0
    dead_letters: int = 0
    deliveries: int = 0
    delivery_timeouts: int = 0
    frames_refused: int = 0
    gaps: int = 0
    healing_failures: int = 0
    http_requests: int = 0
    idle_timeouts: int = 0
    in_progress_acks: int = 0
    negative_acks: int = 0
    pipe_bytes_in: int = 0
    pipe_bytes_out: int = 0
    pipe_bytes_wasted: int = 0
    pipe_cuts: int = 0
    pipe_failovers: int = 0
    pipe_frames_out: int = 0
    pipe_lost: int = 0
    pipe_polls: int = 0
    pipe_polls_refused: int = 0
    pipe_polls_sent: int = 0
    pipe_restarts: int = 0
    protocol_errors: int = 0
    publish_frames: int = 0
    publish_refused: int = 0
    records_delivered: int = 0
    records_expired: int = 0
    records_healed: int = 0
    records_published: int = 0
    redeliveries: int = 0
    refreshes_begun: int = 0
    refreshes_done: int = 0
    reports_heard: int = 0
    reports_refused: int = 0
    reports_sent: int = 0
    resets_announced: int = 0
    resets_done: int = 0
    resets_failed: int = 0
    revocations: int = 0
    snapshots_completed: int = 0
    stale_acks: int = 0
    refused_by_code: dict[str, int] = field(default_factory=dict)

    def refused(self, code_name: str, count: int = 1) -> None:
        """A request was answered with a code other than OK."""
        self.refused_by_code[code_name] = self.refused_by_code.get(code_name, 0) + count

    def snapshot(self) -> dict[str, object]:
        """For /v1/node."""
        return asdict(self)
