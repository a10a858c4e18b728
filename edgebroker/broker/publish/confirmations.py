"""What nodes below say that they have durably, for publishes that wait for them (ack level REPLICATED)."""

from __future__ import annotations

from edgebroker.storage.engine import Log


class Confirmations:
    """Owned by the loop thread. Offsets are next offsets, as the children said; of logs that somebody asked about."""

    def __init__(self) -> None:
        self._confirmed: dict[Log, dict[str, tuple[str, int]]] = {}

    def confirm(self, log: Log, uid: str, name: str, offset: int) -> None:
        """A child has everything before `offset`, durably."""
        self._confirmed.setdefault(log, {})[uid] = (name, offset)

    def end(self, log: Log) -> int:
        """The offset that as many children have passed as the topic's settings ask for; -1 when not so many are known.

        `replicas`: how many; `replica_nodes`: only these count, by name or uid, and any without.
        """
        settings = log.settings
        wanted = {name.strip() for name in settings.replica_nodes.split(",")} - {""}
        passed = sorted(
            offset for uid, (name, offset) in self._confirmed.get(log, {}).items() if not wanted or {uid, name} & wanted
        )
        return passed[-settings.replicas] if len(passed) >= settings.replicas else -1

    def forget(self, log: Log) -> None:
        """The log is another one now, or gone."""
        self._confirmed.pop(log, None)
