"""Addresses that are not listened to for a while: those from which too many came that were not known.

Five failures within a minute: a minute; when it goes on after that, 2, 4, ... 60 minutes. Never this machine itself,
and not an address from which an application with a good token came within the last hour: behind it there may be many,
of which one has a token that was revoked. Of IPv6 the first 64 bits count, which is what a site has.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable
from typing import NamedTuple

from edgebroker.common.runtime.newest import Newest
from edgebroker.network.io.listener import host_of, is_local

log = logging.getLogger(__name__)

MOST_FAILURES, WITHIN_SECONDS = 5, 60.0
FIRST_SECONDS, LONGEST_SECONDS = 60.0, 3600.0
MOST_ADDRESSES = 4096


class _Record(NamedTuple):
    """`failures` since `since`; not listened to until `until`, which was the `times`-th time."""

    failures: int = 0
    since: float = 0.0
    until: float = 0.0
    times: int = 0


class Bans:
    """Owned by the loop thread. The addresses that failed last are remembered."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._records = Newest[str, _Record](MOST_ADDRESSES)
        self._good = Newest[str, float](MOST_ADDRESSES)

    def refuses(self, peer: str) -> bool:
        """Is this address not to be listened to now?"""
        return self._now() < self._records.get(_site_of(peer), _Record()).until

    def known(self, peer: str) -> None:
        """Somebody at this address has a good token."""
        self._good.put(_site_of(peer), self._now())

    def failed(self, peer: str) -> None:
        """Somebody at this address is not known."""
        if is_local(peer):
            return
        host, now = _site_of(peer), self._now()
        if host in self._good and now - self._good[host] < LONGEST_SECONDS:
            return
        known = self._records.get(host, _Record())
        if now - known.since > WITHIN_SECONDS:
            lapsed = now - known.until > LONGEST_SECONDS
            known = known._replace(failures=0, since=now, times=0 if lapsed else known.times)
        known = known._replace(failures=known.failures + 1)
        if known.failures >= MOST_FAILURES:
            seconds = min(LONGEST_SECONDS, FIRST_SECONDS * 2**known.times)
            known = known._replace(failures=0, since=now, until=now + seconds, times=min(known.times + 1, 10))
            log.warning("%s is not listened to for %d s: too many tokens from there are not known", host, seconds)
        self._records.put(host, known)


def _site_of(peer: str) -> str:
    """What is banned as a whole."""
    host = host_of(peer)
    if not host.startswith("["):
        return host
    try:
        return str(ipaddress.ip_network((host.strip("[]").partition("%")[0], 64), strict=False))
    except ValueError:
        return host
