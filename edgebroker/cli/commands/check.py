"""`edgebroker check live|ready|lag|fleet`: a line and an exit code for a monitoring system, as Nagios plug-ins do."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from edgebroker.cli.admin_client import ask, call
from edgebroker.cli.command import Parser, admin_flag, at_least, label_flag, subcommand, subcommands
from edgebroker.cli.commands.tree import label_query
from edgebroker.cli.render import counted, duration
from edgebroker.cli.totals import group_lag
from edgebroker.common.errors import EdgeBrokerError, UnreachableError

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3
FLEET_WORDS = (("silent", "silent"), ("behind", "behind"), ("problems", "with problems"))
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
    fleet_parser = subcommand(commands, "fleet", "check the nodes below", fleet)
    fleet_parser.description = (
        "Check the nodes below: which are silent, behind by a minute, or have problems. Any of them is a warning; from "
        "so many silent nodes on it is critical."
    )
    fleet_parser.add_argument(
        "--critical",
        type=at_least(1),
        default=10,
        metavar="N",
        help="silent nodes that make it critical (default 10)",
    )
    label_flag(fleet_parser)
    admin_flag(fleet_parser)
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


def fleet(options: argparse.Namespace) -> int:
    """Are all nodes below connected, and well?"""
    query = label_query(options.label)

    def probe() -> tuple[int, str]:
        found = call(options.admin, "GET", f"/v1/tree?{query}")
        sums = {
            name: sum(counts[name] for counts in found["levels"].values())
            for name in ("nodes", "silent", "behind", "problems")
        }
        if not sums["nodes"]:
            return UNKNOWN, f"no node below {found['node']} has reported yet"
        bad = [f"{sums[name]} {word}" for name, word in FLEET_WORDS if sums[name]]
        state = CRITICAL if sums["silent"] >= options.critical else WARNING if bad else OK
        names = ", ".join(node["name"] for node in found["worst"][:5])
        text = (
            f"of {counted(sums['nodes'], 'node')} {', '.join(bad)}: {names}" if bad else counted(sums["nodes"], "node")
        )
        data = " ".join(f"{name}={count}" for name, count in sums.items())
        return state, f"{text}, as of {duration(found['evidence_seconds'])} ago | {data}"

    return _report("fleet", probe)


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
