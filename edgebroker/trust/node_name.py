"""Who a node is, as its certificate says it: edgebroker://FLEET/LEVEL/REGION/UID."""

from __future__ import annotations

import re
from typing import NamedTuple

from edgebroker.common.levels import LEVELS

SCHEME = "edgebroker://"
# A node may have more than one uid (a copy that it loads beside its data is a child of its own): they differ in these
# first digits only.
OWN_DIGITS = 8
_FLEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_REGION = re.compile(r"([A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*)?\Z")
_UID = re.compile(r"[0-9a-f]{32}\Z")


class NodeName(NamedTuple):
    """`region` goes from the whole to the part, as north/store-12; "" is everywhere."""

    fleet: str
    level: str
    region: str
    uid: str

    def __str__(self) -> str:
        return SCHEME + "/".join(part for part in self if part)

    def has(self, uid: str) -> bool:
        """Is this uid one of the node's?"""
        return uid[OWN_DIGITS:] == self.uid[OWN_DIGITS:]

    def serves(self, other: NodeName) -> bool:
        """May this node be above the other one, and speak for it? It is of a higher level, and its region contains the
        other's."""
        higher = LEVELS.index(self.level) < LEVELS.index(other.level)
        return higher and self.fleet == other.fleet and contains(self.region, other.region)


def contains(region: str, other: str) -> bool:
    """Is the other region the same, or a part of this one?"""
    return not region or other == region or other.startswith(f"{region}/")


def is_fleet_name(text: str) -> bool:
    """Could a fleet be called so?"""
    return _FLEET.match(text) is not None


def parse_node_name(text: str) -> NodeName | None:
    """The name that a URI says; None for one that is not of a node."""
    parts = text.removeprefix(SCHEME).split("/")
    if not text.startswith(SCHEME) or len(parts) < 3 or "" in parts:
        return None
    name = NodeName(parts[0], parts[1], "/".join(parts[2:-1]), parts[-1])
    known = is_fleet_name(name.fleet) and name.level in LEVELS and _UID.match(name.uid)
    return name if known and _REGION.match(name.region) else None


def name_in(shown: object) -> NodeName | None:
    """The name in a certificate, as ssl describes it (getpeercert); None for one that is not a node's."""
    assert isinstance(shown, dict)
    uris = [str(entry[1]) for entry in shown.get("subjectAltName", ()) if entry[0] == "URI"]
    return parse_node_name(uris[0]) if len(uris) == 1 else None


def issuer_in(shown: object) -> int:
    """The number of the issuer of a certificate, as ssl describes it."""
    assert isinstance(shown, dict)
    names = [value for part in shown.get("issuer", ()) for kind, value in part if kind == "commonName"]
    digits = str(names[0]).removeprefix("issuer ") if names else ""
    return int(digits) if digits.isdecimal() else 0
