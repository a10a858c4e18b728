"""What a principal may do at this node: rules as an operator writes them, and what they come to.

    produce TOPICS            publish to these topics
    consume TOPICS            read them, in every group and without one
    consume TOPICS as GROUPS  read them in these groups only
    create TOPICS             have them created by publishing to them
    view, alter, operate, admin    administration; each has what the ones before it have

TOPICS and GROUPS are names or patterns (*, ?, [...]); %name is the name of the principal, %store the last part of the
node's region. A rule that denies wins over all that allow. Topics that begin with __ are matched by patterns only that
begin so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from typing import NamedTuple

from edgebroker.common.errors import ArgumentError
from edgebroker.common.names import printable

TOPIC_RIGHTS = ("produce", "consume", "create")
ADMIN_RIGHTS = ("view", "alter", "operate", "admin")
MOST_RULE_BYTES = 300
WAYS = "produce TOPICS, consume TOPICS [as GROUPS], create TOPICS, or one of view, alter, operate, admin"
# Answers about names that are remembered; a client may ask about any name.
MOST_REMEMBERED = 4096
_WILD = frozenset("*?[")
_Match = Callable[[str, str], bool]
_PATTERN = re.compile(r"(?:[A-Za-z0-9._*?\[\]!-]|%name|%store){1,200}\Z")


class Rule(NamedTuple):
    """One rule. `topics` and `groups` are patterns, "" where the right has none, or every group counts."""

    right: str
    topics: str = ""
    groups: str = ""

    def __str__(self) -> str:
        text = f"{self.right} {self.topics}" if self.topics else self.right
        return f"{text} as {self.groups}" if self.groups else text


def parse_rule(text: str) -> Rule:
    """A rule as it is written. Raises ArgumentError."""
    words = text.split() if len(text.encode(errors="replace")) <= MOST_RULE_BYTES else []
    right = words[0] if words else ""
    found = None
    if right in ADMIN_RIGHTS and len(words) == 1:
        found = Rule(right)
    elif right in TOPIC_RIGHTS and len(words) == 2:
        found = Rule(right, words[1])
    elif right == "consume" and len(words) == 4 and words[2] == "as":
        found = Rule(right, words[1], words[3])
    if found is None or not all(_PATTERN.match(part) for part in found[1:] if part):
        raise ArgumentError(f"{printable(text[:80])!r} is not a rule: write {WAYS}")
    return found


class Rights:
    """The rights that follow from rules, for a principal of this name at a node of this region. Answers are remembered:
    asking again costs one lookup."""

    def __init__(self, allow: Sequence[Rule], deny: Sequence[Rule], name: str = "", region: str = "") -> None:
        words = {"%name": name, "%store": region.rpartition("/")[2]}
        self._rules, self._words = (allow, deny), words
        # Made when a right is first asked for: to compile patterns takes a while.
        self._topics: dict[str, tuple[_Match, _Match]] = {}
        denied = [ADMIN_RIGHTS.index(rule.right) for rule in deny if rule.right in ADMIN_RIGHTS]
        allowed = [ADMIN_RIGHTS.index(rule.right) for rule in allow if rule.right in ADMIN_RIGHTS]
        self._level = min(max(allowed, default=-1), min(denied, default=len(ADMIN_RIGHTS)) - 1)
        self._remembered: dict[tuple[str, str, str], bool] = {}

    def allows(self, right: str, topic: str = "", group: str = "") -> bool:
        """Is this allowed? `group` matters for `consume` only; "": without a group."""
        if right in ADMIN_RIGHTS:
            return ADMIN_RIGHTS.index(right) <= self._level
        key = (right, topic, group)
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            allowed, denied = self._topics.get(right) or self._prepare(right)
            found = self._remembered[key] = allowed(topic, group) and not denied(topic, group)
        return found

    def _prepare(self, right: str) -> tuple[_Match, _Match]:
        allow, deny = self._rules
        made = self._topics[right] = _matcher(allow, right, self._words), _matcher(deny, right, self._words)
        return made


def missing(name: str, right: str, topic: str = "", group: str = "") -> str:
    """How a principal is told that it lacks a right."""
    if right in ADMIN_RIGHTS:
        return f"{name} may not do this: it needs the right {right}"
    rule = Rule(right, topic, group)
    what = {"produce": "produce to", "consume": "consume", "create": "create"}[right]
    return f"{name} may not {what} {topic}{f' as {group}' if group else ''}: it needs the right {rule}"


def _matcher(rules: Sequence[Rule], right: str, words: Mapping[str, str]) -> _Match:
    """Does one of the rules about this right match a topic and a group?"""
    found = [
        (_pattern(rule.topics, words), _pattern(rule.groups or "*", words), rule.topics.startswith("__"))
        for rule in rules
        if rule.right == right
    ]

    def match(topic: str, group: str) -> bool:
        hidden = topic.startswith("__")
        return any((own or not hidden) and topics(topic) and groups(group) for topics, groups, own in found)

    return match


def _pattern(text: str, words: Mapping[str, str]) -> Callable[[str], bool]:
    for word, value in words.items():
        # A node without a region has no store: nothing is matched then.
        text = text.replace(word, value or "\0")
    if not _WILD.intersection(text):
        return text.__eq__
    if text[-1] == "*" and not _WILD.intersection(text[:-1]):
        beginning = text[:-1]
        return lambda name: name.startswith(beginning)
    match = re.compile(translate(text)).match
    return lambda name: match(name) is not None


EVERYTHING = [*(Rule(right, topics) for right in TOPIC_RIGHTS for topics in ("*", "__*")), Rule("admin")]
"""What programs of the same machine may do, as far as no rule denies it. Topics of the broker itself are refused to
every client, whatever its rights."""
