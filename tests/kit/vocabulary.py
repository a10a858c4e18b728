"""The vocabulary of docs/glossary.md as a test sees it: the retired terms of a text, and the texts that users meet."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"

# One pattern for each row of the table "Retired terms", under the very words of its first cell.
RETIRED = {
    "begin anew, begun anew, afresh": r"\banew\b|\bafresh\b",
    "heal, healing, healed": r"\bheal(s|ed|ing)?\b",
    "set aside, cut off (of a log)": r"\bset(s|ting)? aside\b|\bcut(s|ting)? off\b",
    "hole, wound": r"\bholes?\b|\bwound(s|ed)?\b",
    "stands at, stands before, stands above": r"\b(stands?|stood) (at|before|above|below|behind)\b",
    "place (of a group)": r"\bgroups?'s? places?\b|\bplaces? of (a |the |consumer |its )*groups?\b",
    "hung": r"\bhung\b",
    "nobody, somebody, whoever": r"\b(nobody|somebody|whoever)\b",
    "vouch": r"\bvouch(es|ed|ing)?\b",
    "divide (partitions)": r"\bdivid(e|es|ed|ing)\b|\bdivision\b",
    "word from the top, orders": r"\bwords? from the top\b|\borders\b",
    'is no X (for "is not an X")': r"(?<!there )\b(is|are) no (?!longer\b|more\b)",
    "fed, feeds (a child)": r"\bfed\b|\bfeeds\b",
    "letter, lettering": r"(?<!dead )(?<!dead-)\bletter(s|ed|ing)?\b",
}

# What is not prose of ours: a table of meta.db, a batch that is incomplete, and letters of the alphabet.
NAMES = re.compile(r"`holes`|\b(INTO|FROM|EXISTS) holes\b|^holes$|the batch is cut off|\bletters(?=,? (and )?digits)")


class Use(NamedTuple):
    """A retired term in a text."""

    term: str
    line: int
    text: str


def retired_terms() -> list[str]:
    """The first column of the glossary's table of retired terms."""
    rows = re.findall(r"^\| (.+?) \|", GLOSSARY.read_text().partition("## Retired terms")[2], re.MULTILINE)
    return [row for row in rows if row != "retired"]


def uses(text: str) -> list[Use]:
    """The retired terms in a text, also where a line break parts the words."""
    text = NAMES.sub("", text)
    plain = re.sub(r"\s", " ", text).lower()
    return [
        Use(term, text.count("\n", 0, match.start()) + 1, match[0])
        for term, pattern in RETIRED.items()
        for match in re.finditer(pattern, plain)
    ]


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that is not a docstring: what it may print, log, answer or name."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def uses_in_strings(path: Path) -> list[Use]:
    """The retired terms in the strings of a module, with the lines on which the strings begin."""
    return [Use(use.term, line, use.text) for line, text in strings(path) for use in uses(text)]
