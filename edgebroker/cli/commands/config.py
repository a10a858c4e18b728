"""`edgebroker config check|show|init`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from edgebroker.cli.command import Parser, json_flag, subcommand, subcommands
from edgebroker.cli.config_file import commented_file, to_toml
from edgebroker.common.config import load_config, warnings
from edgebroker.common.errors import ConfigError


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    check_parser = subcommand(commands, "check", "check a configuration file and report every problem", check)
    check_parser.add_argument("file")
    show_parser = subcommand(commands, "show", "print the configuration in force, with defaults", show)
    show_parser.add_argument("-c", "--config", metavar="FILE", help="configuration file (default: none)")
    json_flag(show_parser)
    init_parser = subcommand(commands, "init", "print a commented configuration file with every key", init)
    init_parser.add_argument("file", nargs="?", help="write it to this file, which must not exist")


def check(options: argparse.Namespace) -> int:
    load_config(Path(options.file))
    _print_warnings()
    print(f"{options.file}: ok", file=sys.stderr)
    return 0


def show(options: argparse.Namespace) -> int:
    config = load_config(Path(options.config) if options.config else None)
    _print_warnings()
    if options.json:
        print(json.dumps(msgspec.to_builtins(config)))
    else:
        print(to_toml(config), end="")
    return 0


def _print_warnings() -> None:
    for warning in warnings():
        print(f"edgebroker: {warning}", file=sys.stderr)


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
        raise ConfigError(f"{path} already exists; choose another name") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return 0
