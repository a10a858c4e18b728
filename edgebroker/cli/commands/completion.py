"""`edgebroker completion SHELL`: what the shell has to know to complete our commands, made by shtab."""

from __future__ import annotations

import argparse

import shtab

from edgebroker.cli.main import build_parser


def completion(options: argparse.Namespace) -> int:
    print(shtab.complete(build_parser(), options.shell))
    return 0
