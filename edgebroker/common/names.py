"""What topics and groups may be called, and how names and texts of others are shown."""

import re

# What the client id of a producer that writes a snapshot of a table begins with.
SNAPSHOT_CLIENTS = "__snapshot-"
# What the root of a fleet has decided: a topic of the broker that every node has.
TRUST_TOPIC = "__trust"
# Who changed what at a node, and who was refused; its own.
AUDIT_TOPIC = "__audit"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")


def is_name(name: str) -> bool:
    """Could a topic be called so? Those of the broker are included."""
    return _NAME.match(name) is not None and name not in (".", "..")


def is_own(name: str) -> bool:
    """Is this a topic that only the broker itself writes?"""
    return name.startswith("__") or name.endswith(".dlq")


def check_topic_name(name: str) -> str:
    """Why this is not a name for a topic that users write to; "" when it is one."""
    if not is_name(name):
        return f"topic names are 1 to 200 of A-Z a-z 0-9 . _ -, and not . or ..; {name!r} is not"
    if name.endswith(".dlq"):
        return f"the suffix .dlq is reserved for dead letters; {name!r} cannot be used"
    if name.startswith("__"):
        return f"the prefix __ is reserved for the broker; {name!r} cannot be used"
    return ""


def check_group_name(name: str) -> str:
    """Why this is not a name for a consumer group; "" when it is one (or empty: a reader without a group)."""
    if name and not _NAME.match(name):
        return f"group names are 1 to 200 of A-Z a-z 0-9 . _ -; {name!r} is not"
    return ""


def printable(text: str) -> str:
    """A text of a peer as a terminal or a log may show it: everything that is not printed as itself is written out.
    These are control characters (a terminal obeys them), line ends (they make false lines), marks that turn the$
    direction of writing, halves of surrogates. A backslash remains one, so this is not to be read back."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
