"""`edgebroker check live|ready|lag`: one line and an exit code for a monitoring system, as Nagios plug-ins have it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from edgebroker.cli.admin_client import ask, call
from edgebroker.cli.command import Parser, admin_flag, subcommand, subcommands
from edgebroker.cli.render import counted
from edgebroker.cli.totals import group_lag
from edgebroker.common.errors import EdgeBrokerError, UnreachableError

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3
WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


def arguments(parser: Parser) -> None:
    parser.description = (
        "Check a node for a monitoring system. Each check prints one line and exits with 0 (ok), 1 (warning), 2 "
        "(critical) or 3 (unknown)."
    )
    commands = subcommands(parser)
    live_parser = subcommand(commands, "live", "check that the node answers", live)
    ready_parser = subcommand(commands, "ready", "check that the node accepts and delivers records", ready)
    ready_parser.description = (
        "Check that the node accepts and delivers records. A missing parent or another problem is a warning."
    )
    lag_parser = subcommand(commands, "lag", "check how far consumer groups are behind", lag)
    lag_parser.add_argument("--group", default="", help="only this group (default: all)")
    lag_parser.add_argument("--records", action="store_true", help="compare records instead of seconds")
    lag_parser.add_argument("--warning", type=float, default=60.0, metavar="N", help="warning from N on (default 60)")
    lag_parser.add_argument(
        "--critical", type=float, default=600.0, metavar="N", help="critical from N on (default 600)"
    )
    for each in (live_parser, ready_parser):
        each.add_argument(
            "--healthcheck", action="store_true", help="exit with 0 or 1 only, as container engines expect"
        )
    for each in (live_parser, ready_parser, lag_parser):
        admin_flag(each)


def live(options: argparse.Namespace) -> int:
    """Does the event loop run?"""

    def probe() -> tuple[int, str]:
        alive = ask(options.admin, "/healthz")[0] == 200
        return (OK, "the node answers") if alive else (CRITICAL, "the node does not answer")

    return _report("live", probe, options.healthcheck)


def ready(options: argparse.Namespace) -> int:
    """Does the node accept and deliver records? A missing parent is a warning."""

    def probe() -> tuple[int, str]:
        code, verdict = ask(options.admin, "/readyz")
        bad = [f"{name}: {why}" for name, why in verdict["checks"].items() if why != "ok"]
        warnings = [f"{name}: {why}" for name, why in verdict["warnings"].items()]
        if code != 200:
            return CRITICAL, "; ".join(bad + warnings)
        return (WARNING, "; ".join(warnings)) if warnings else (OK, "ready")

    return _report("ready", probe, options.healthcheck)


def lag(options: argparse.Namespace) -> int:
    """How far are the groups behind, in seconds or records?"""

    def probe() -> tuple[int, str]:
        groups = call(options.admin, "GET", "/v1/groups")["groups"]
        wanted = [
            group
            for group in groups
            if group["name"] == options.group or (not options.group and not group["name"].startswith("__"))
        ]
        if options.group and not wanted:
            return UNKNOWN, f"group {options.group} does not exist on this node"
        unit = "records" if options.records else "s"
        state, problems, data = OK, [], []
        for group in wanted:
            value = group_lag(group)[0 if options.records else 1]
            found = CRITICAL if value >= options.critical else WARNING if value >= options.warning else OK
            state = max(state, found)
            if found != OK:
                problems.append(f"group {group['name']} is {value:g} {unit} behind")
            limits = f"{options.warning:g};{options.critical:g}"
            data.append(f"'{group['name']}'={value:g}{'' if options.records else 's'};{limits}")
        text = "; ".join(problems) or f"{counted(len(wanted), 'group')} less than {options.warning:g} {unit} behind"
        return state, f"{text} | {' '.join(data)}" if data else text

    return _report("lag", probe)


def _report(name: str, probe: Callable[[], tuple[int, str]], healthcheck: bool = False) -> int:
    """Print the line of a check; its exit code. A node that does not answer is critical.

    Container engines know only 0 and 1 and restart a container at 1: for them a warning counts as healthy.
    """
    try:
        state, text = probe()
    except UnreachableError as error:
        state, text = CRITICAL, str(error)
    except EdgeBrokerError as error:
        state, text = UNKNOWN, str(error)
    print(f"EDGEBROKER {name.upper()} {WORDS[state]}: {text}")
    return int(state not in (OK, WARNING)) if healthcheck else state
