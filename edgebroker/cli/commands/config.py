"""`edgebroker config check|show|init`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgebroker.common.config import Config, describe_keys, load_config
from edgebroker.common.errors import ConfigError


def check(options: argparse.Namespace) -> int:
    load_config(Path(options.file))
    print(f"{options.file}: ok", file=sys.stderr)
    return 0


def show(options: argparse.Namespace) -> int:
    config = load_config(Path(options.config) if options.config else None)
    if options.json:
        print(json.dumps(msgspec.to_builtins(config)))
    else:
        print(to_toml(config), end="")
    return 0


def init(options: argparse.Namespace) -> int:
    text = commented_file()
    if not options.file:
        print(text, end="")
        return 0
    path = Path(options.file)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{path} exists and is left as it is; choose another name") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return 0


def to_toml(config: Config) -> str:
    lines = []
    for section, table in msgspec.to_builtins(config).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_value(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def commented_file(values: Mapping[str, object] | None = None) -> str:
    """Every key with its meaning above it: those of `values` set, the others commented out with their defaults."""
    lines, section = ["# edgebroker configuration. Every key is optional; the values shown are the defaults.", ""], ""
    values = values or {}
    for key, allowed, default, description in describe_keys():
        table, _, name = key.partition(".")
        if table != section:
            section = table
            lines += ["", f"[{section}]"]
        mark, value = ("", values[key]) if key in values else ("# ", default)
        lines += [f"# {description} ({allowed})", f"{mark}{name} = {_value(value)}"]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    return json.dumps(value)
