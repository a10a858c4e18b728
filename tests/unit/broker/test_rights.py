"""Rules, and what follows from them, against a plain reading of each rule."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.broker.access import rights as rights_module
from edgebroker.broker.access.rights import ADMIN_RIGHTS, TOPIC_RIGHTS, Rights, Rule, missing, parse_rule
from edgebroker.common.errors import ArgumentError

NAMES = st.sampled_from(["prices", "sales", "sales.1", "sales.12", "__audit", "app", "app.x", "store-1", "a", ""])
PATTERNS = st.sampled_from(["*", "prices", "sales*", "sales.?", "[ap]*", "__*", "%name*", "%store", "a"])


def rules(kinds: tuple[str, ...] = (*TOPIC_RIGHTS, *ADMIN_RIGHTS)) -> st.SearchStrategy[Rule]:
    def made(right: str, topics: str, groups: str) -> Rule:
        if right in ADMIN_RIGHTS:
            return Rule(right)
        return Rule(right, topics, groups if right == "consume" else "")

    return st.builds(made, st.sampled_from(kinds), PATTERNS, st.one_of(st.just(""), PATTERNS))


def applies(rule: Rule, right: str, topic: str, group: str, name: str, store: str) -> bool:
    """Is this rule about what is asked? As one would read it."""
    if rule.right in ADMIN_RIGHTS or right in ADMIN_RIGHTS or rule.right != right:
        return False
    if topic.startswith("__") and not rule.topics.startswith("__"):
        return False
    topics, groups = (
        text.replace("%name", name).replace("%store", store or "\0") for text in (rule.topics, rule.groups or "*")
    )
    return fnmatchcase(topic, topics) and fnmatchcase(group, groups)


def level_after(allow: list[Rule], deny: list[Rule]) -> int:
    """How many of the rights of administration are left, from the least on."""
    for most in range(len(ADMIN_RIGHTS), 0, -1):
        has = any(rule.right in ADMIN_RIGHTS and ADMIN_RIGHTS.index(rule.right) >= most - 1 for rule in allow)
        loses = any(rule.right in ADMIN_RIGHTS and ADMIN_RIGHTS.index(rule.right) <= most - 1 for rule in deny)
        if has and not loses:
            return most
    return 0


@given(
    allow=st.lists(rules(), max_size=5),
    deny=st.lists(rules(), max_size=3),
    asked=st.lists(st.tuples(st.sampled_from(TOPIC_RIGHTS), NAMES, NAMES), min_size=1, max_size=6),
    region=st.sampled_from(["", "store-1", "north/store-1"]),
)
def test_what_follows_from_rules(
    allow: list[Rule], deny: list[Rule], asked: list[tuple[str, str, str]], region: str
) -> None:
    found = Rights(allow, deny, "app", region)
    store = "store-1" if region else ""
    for right, topic, group in asked * 2:  # what is remembered is the same
        group = group if right == "consume" else ""
        wanted = any(applies(rule, right, topic, group, "app", store) for rule in allow)
        wanted = wanted and not any(applies(rule, right, topic, group, "app", store) for rule in deny)
        assert found.allows(right, topic, group) == wanted
    level = level_after(allow, deny)
    assert [found.allows(right) for right in ADMIN_RIGHTS] == [rank < level for rank in range(len(ADMIN_RIGHTS))]


@given(rules())
def test_a_rule_is_read_as_it_is_written(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule
    assert parse_rule("  ".join(str(rule).split())) == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "produce",
        "produce a b",
        "produce a as b",
        "consume a as",
        "consume a in b",
        "admin x",
        "root",
        "view *",
        "produce pri/ces",
        "produce %node",
        "consume a as b/c",
        "produce \x1b[31m",
        "produce " + "a" * 300,
        "consume " + "a*" * 90 + " as " + "b" * 201,
    ],
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not a rule: write produce TOPICS, consume TOPICS") as refused:
        parse_rule(text)
    assert "\x1b" not in str(refused.value)


def test_many_names_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights_module, "MOST_REMEMBERED", 10)
    found = Rights([Rule("produce", "a*")], [], "app")
    for number in range(100):
        assert found.allows("produce", f"a{number}")
        assert not found.allows("produce", f"b{number}")
        assert len(found._remembered) <= 10


def test_how_it_is_told() -> None:
    assert missing("till", "produce", "prices") == "till may not produce to prices: it needs the right produce prices"
    assert missing("till", "consume", "prices", "g") == (
        "till may not consume prices as g: it needs the right consume prices as g"
    )
    assert missing("till", "operate") == "till may not do this: it needs the right operate"
