"""Tenants: who share a node each get so much of it, and no more.

A tenant is a name; topics, groups and applications called NAME, or with a name that begins with `NAME.`, are its own.
Its quota comes with the topic __trust, as `tenant/NAME`:

    stored bytes, partitions, groups, connections    above it, what would be more is refused (OVERLOADED)
    bytes in a second, in and out                    above it, its connections are not read, or sent nothing, until
                                                     there may be more
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from edgebroker.broker.core import Core
from edgebroker.broker.trust.trust_topic import Quota, TrustTopic
from edgebroker.common.runtime.scheduler import Scheduler, in_turns

MOST_TENANTS = 64
# How often what is stored is added up.
SAMPLE_SECONDS = 2.0


class Bucket:
    """So many bytes a second (0: any number), a second's worth at once."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.rate = 0
        self._left, self._since = float("inf"), now()
        self.total = 0

    def take(self, size: int) -> float:
        """Note bytes; for how many seconds no more are to follow."""
        self.total += size
        if not self.rate:
            return 0.0
        now = self._now()
        self._left = min(float(self.rate), self._left + (now - self._since) * self.rate) - size
        self._since = now
        return max(0.0, -self._left / self.rate)


class Tenant:
    """What a tenant may have, and has. `stored_bytes` and the like are as of the last sample."""

    def __init__(self, name: str, now: Callable[[], float]) -> None:
        self.name, self.quota = name, Quota()
        self.received, self.sent = Bucket(now), Bucket(now)
        self.connections = self.stored_bytes = self.partitions = self.groups = 0

    def set(self, quota: Quota) -> None:
        """Its quota is another one now."""
        self.quota = quota
        self.received.rate, self.sent.rate = quota.in_bytes_per_second, quota.out_bytes_per_second

    def refusal(self, what: str, more: int) -> str:
        """Why it may not have so many more connections, stored_bytes, partitions or groups; "" when it may."""
        has, most = getattr(self, what), getattr(self.quota, what)
        if not most or has + more <= most:
            return ""
        return f"the tenant {self.name} has {has} of the {most} {what} of its quota (edgebroker tenant list)"


class Tenants:
    """Owned by the loop thread."""

    def __init__(self, core: Core, topic: TrustTopic, scheduler: Scheduler) -> None:
        self._core, self._topic, self._scheduler = core, topic, scheduler
        self._tenants: dict[str, Tenant] = {}
        self._sampling = False
        topic.changed.append(self._decided)

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._tenants.values()))

    def open(self) -> None:
        """Take over what was in force."""
        quotas = self._topic.quotas()
        for name in self._tenants.keys() - quotas.keys():
            self._tenants.pop(name).set(Quota())  # who is connected is not limited any more
        for name, quota in list(quotas.items())[:MOST_TENANTS]:
            if name not in self._tenants:
                self._tenants[name] = Tenant(name, self._scheduler.now)
            self._tenants[name].set(quota)
        if self._tenants and not self._sampling:
            self._sampling = True
            self._sample()

    def of(self, name: str) -> Tenant | None:
        """Whose a topic, a group or an application of this name is."""
        return self._tenants.get(name.partition(".")[0]) if self._tenants else None

    def refusal(self, name: str, what: str, more: int) -> str:
        """Why there may not be so much more for whose this name is (Tenant.refusal); "" when there may."""
        tenant = self.of(name) if more else None
        return tenant.refusal(what, more) if tenant is not None else ""

    def _decided(self, keys: Sequence[str]) -> None:
        if any(key.startswith("tenant/") for key in keys):
            self.open()

    def _sample(self) -> None:
        if not self._tenants:
            self._sampling = False
            return
        stored, partitions, groups = Counter[str](), Counter[str](), Counter[str]()

        def add_up() -> Iterator[None]:
            for log in list(self._core.engine.logs()):
                owner = log.topic.partition(".")[0]
                stored[owner] += log.size_bytes
                partitions[owner] += 1
                yield
            for group in self._core.groups.all():
                groups[group.name.partition(".")[0]] += 1
                yield

        def added_up() -> None:
            for name, tenant in self._tenants.items():
                tenant.stored_bytes, tenant.partitions, tenant.groups = stored[name], partitions[name], groups[name]
            self._scheduler.call_later(SAMPLE_SECONDS, self._sample)

        in_turns(self._scheduler, add_up(), added_up)


class Share:
    """The part of a tenant that one connection has. `wake` is called when it may be sent more."""

    def __init__(self, tenant: Tenant, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self.tenant, self._scheduler, self._wake = tenant, scheduler, wake
        self._waits = False
        tenant.connections += 1

    def leave(self) -> None:
        """The connection is over."""
        self.tenant.connections -= 1

    @property
    def may_send(self) -> bool:
        return not self._waits

    def sent(self, size: int) -> None:
        """Bytes were sent; may_send is False until there may be more."""
        seconds = self.tenant.sent.take(size)
        if seconds and not self._waits:
            self._waits = True
            self._scheduler.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._waits = False
        self._wake()
