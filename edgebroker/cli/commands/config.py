"""`edgebroker config check|show|init`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from edgebroker.cli.config_file import commented_file, to_toml
from edgebroker.common.config import load_config
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
