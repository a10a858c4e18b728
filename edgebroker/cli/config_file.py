"""Configuration files as text: the values in force, and a commented file with every key."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from edgebroker.common.config import Config, describe_keys


def to_toml(config: Config) -> str:
    lines = []
    for section, table in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_literal(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def commented_file(values: Mapping[str, object] | None = None) -> str:
    """Every key below its description: the keys of `values` are set, all others are comments with their defaults."""
    lines, section = ["# edgebroker configuration. Every key is optional; the values shown are the defaults.", ""], ""
    values = values or {}
    for key, allowed, default, description in describe_keys():
        table, _, name = key.partition(".")
        if table != section:
            section = table
            lines += ["", f"[{section}]"]
        mark, value = ("", values[key]) if key in values else ("# ", default)
        lines += [f"# {description} ({allowed})", f"{mark}{name} = {_literal(value)}"]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    return json.dumps(value)
