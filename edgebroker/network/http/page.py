"""Requests that a web page may have made: a browser on the machine reaches every address that the machine reaches.

    foreign_page   Origin or Sec-Fetch-Site say that a page of another site made it
    foreign_name   Host is no name of this node: that of a page, perhaps, which was bound to this address afterwards
                   (DNS rebinding); for such a page the node is of its own site
    any_page      Origin says that a page made it: browsers send it with every method but GET and HEAD

Programs send neither Origin nor Sec-Fetch-Site.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Set

from edgebroker.network.http.server import Request


def foreign_page(request: Request) -> str:
    """Why a request is refused as that of a page of another site; "" when it is not."""
    if request.fetch_site not in ("", "same-origin", "none"):
        return f"a page of another site made this request (sec-fetch-site: {request.fetch_site})"
    if request.origin and request.origin.partition("://")[2].lower() != request.host.lower():
        return f"a page of another site made this request (origin: {request.origin})"
    return ""


def any_page(request: Request) -> str:
    """Why a request is refused that pages have no business to make; "" when it is not."""
    return f"this is for nodes and programs, not for pages (origin: {request.origin})" if request.origin else ""


def foreign_name(request: Request, names: Set[str]) -> str:
    """Why the name by which this node was called is refused; "" when it is an address, localhost, or one of `names`
    (in lower case)."""
    host = _host_of(request.host)
    if host in ("", "localhost") or host in names or _is_ip(host):
        return ""
    return (
        f"{request.host} is not a name of this node; use its address, or add the name to listen.names in its "
        "configuration"
    )


def _host_of(header: str) -> str:
    """The host of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
