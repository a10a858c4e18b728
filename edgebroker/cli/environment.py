"""The environment of this process and of those that it starts. No other file of cli/ reads os.environ."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

PREFIX = "EDGEBROKER_"


def current() -> Mapping[str, str]:
    return os.environ


def variable(name: str, default: str) -> str:
    """The value of EDGEBROKER_<name>, or the default where it is not set, or empty."""
    return os.environ.get(PREFIX + name) or default


def for_another_node(settings: Mapping[str, str]) -> dict[str, str]:
    """Our environment without the configuration of our own node, and with `settings`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**inherited, **settings}


def for_other_programs() -> dict[str, str]:
    """Our environment without what the loader of a frozen program added to it.

    With those variables another program would load our libraries, and another release of this one would take our
    unpacked files for its own.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith("_PYI_")}
    if getattr(sys, "frozen", False):
        found["PYINSTALLER_RESET_ENVIRONMENT"] = "1"
        found.pop("LD_LIBRARY_PATH", None)
        if original := found.pop("LD_LIBRARY_PATH_ORIG", ""):
            found["LD_LIBRARY_PATH"] = original
    return found
