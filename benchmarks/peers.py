"""What other brokers reached: from the last run of the peer bench, recorded in peers.json with its date and machine.

Without that file the figures of an earlier machine are used, and marked so.
"""

import json
from pathlib import Path

FILE = Path(__file__).parent / "peers.json"
EARLIER = {
    "date": "an earlier machine",
    "publish_unsynced": 567_000.0,
    "publish_synced": 178_000.0,
    "drain": 12_400_000.0,
    "push_synced_p99_us": 558.0,
    "one_by_one_synced_p50_us": 264.0,
}


def load() -> dict[str, float | str]:
    """Rates in records a second, latencies in microseconds; the best of all peers for each kind of work."""
    if FILE.exists():
        found: dict[str, float | str] = json.loads(FILE.read_text())
        return found
    return dict(EARLIER)
