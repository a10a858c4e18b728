"""`edgebroker token`: tokens with which machines join the fleet, and those of applications; at its root."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, at_least, duration, json_flag, subcommand, subcommands
from edgebroker.cli.csv_file import read_rows
from edgebroker.cli.render import print_table
from edgebroker.common.errors import ConfigError
from edgebroker.common.levels import LEVELS
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.runtime.durable import write_durable
from edgebroker.trust.directory import PRIVATE_MODE
from edgebroker.trust.messages import ROOT_PATH

STORE_USES, JOIN_SECONDS = 50, 30 * 86_400.0


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    create_parser = subcommand(commands, "create", "create a token, or one for each store of a file", create)
    kind = create_parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--join", action="store_true", help="a token with which machines join")
    kind.add_argument(
        "--app", metavar="NAME", help="the credentials of an application: a token, and the certificate of the fleet"
    )
    create_parser.add_argument("--region", default="", help="region that it is for, and all that is in it")
    create_parser.add_argument(
        "--expires", type=duration, metavar="TIME", help="for how long (default 30d to join, else without end)"
    )
    create_parser.add_argument(
        "--allow", action="append", default=[], metavar="RULE", help="what the application may do: 'produce sales.*'"
    )
    create_parser.add_argument("--file", metavar="FILE", help="write the credentials there, for this user to read")
    create_parser.add_argument("--level", default="pos,local", help="levels that it is for (default pos,local)")
    create_parser.add_argument(
        "--stores", metavar="FILE", help="CSV with a column `region`, and perhaps `uses`: a token for each line"
    )
    create_parser.add_argument(
        "--uses", type=at_least(1), default=0, help=f"how many machines may use it (default 1; of a store {STORE_USES})"
    )
    create_parser.add_argument("--label", default="", help="what it is for, as it is listed")
    create_parser.add_argument("--hold", action="store_true", help="machines wait for `edgebroker node approve`")
    list_parser = subcommand(commands, "list", "list tokens, and how often they were used", list_tokens)
    revoke_parser = subcommand(
        commands, "revoke", "revoke a token; machines that have joined stay, applications are cut", revoke
    )
    revoke_parser.add_argument("id", metavar="ID", help="as `token list` shows it")
    for each in (create_parser, list_parser, revoke_parser):
        admin_flag(each)
        json_flag(each)


def create(options: argparse.Namespace) -> int:
    return _create_app(options) if options.app else _create_join(options)


def _expires_ms(seconds: float) -> int:
    return SystemClock().wall_ms() + int(seconds * 1000) if seconds else 0


def _create_app(options: argparse.Namespace) -> int:
    wanted = {"allow": options.allow, "region": options.region, "expires_ms": _expires_ms(options.expires or 0.0)}
    if options.stores or options.hold or options.uses or options.label:
        raise ConfigError("--stores, --uses, --label and --hold are for tokens to join with")
    file = Path(options.file) if options.file else None
    if file is not None and file.exists():
        raise ConfigError(f"{file} exists: name a file that does not")
    made = call(options.admin, "POST", api_path("access", options.app, "tokens"), wanted)
    root = b64decode(call(options.admin, "GET", ROOT_PATH)["root"]).decode()
    text = f"{made['token']}\n{root.strip()}\n"
    if file is not None:
        try:
            write_durable(file, text.encode(), mode=PRIVATE_MODE)
        except OSError as error:
            call(options.admin, "DELETE", api_path("trust", "tokens", made["id"]))
            raise ConfigError(f"{file}: {error.strerror}") from error
    if options.json:
        print(json.dumps({"id": made["id"], **({"file": str(file)} if file is not None else {"credentials": text})}))
    elif file is not None:
        print(f"{file}: token {made['id']} of {options.app}")
    else:
        print(text, end="")
    return 0


def _create_join(options: argparse.Namespace) -> int:
    if options.allow or options.file:
        raise ConfigError("--allow and --file are for the credentials of an application (--app NAME)")
    levels = [level.strip() for level in options.level.split(",")]
    if unknown := [level for level in levels if level not in LEVELS[1:]]:
        raise ConfigError(f"--level {unknown[0]}: levels of a token are {', '.join(LEVELS[1:])}")
    expires = _expires_ms(JOIN_SECONDS if options.expires is None else options.expires)
    common = {"levels": levels, "label": options.label, "expires_ms": expires, "hold": options.hold}
    if options.stores:
        stores = _stores(options.stores, options.uses or STORE_USES)
    else:
        stores = [{"region": options.region, "uses": options.uses or 1}]
    made = call(options.admin, "POST", "/v1/trust/tokens", {"tokens": [{**common, **store} for store in stores]})
    tokens = made["tokens"]
    if options.json:
        print(json.dumps([{**store, "token": token} for store, token in zip(stores, tokens, strict=True)]))
    elif options.stores:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["region", "uses", "token"])
        writer.writerows([store["region"], store["uses"], token] for store, token in zip(stores, tokens, strict=True))
    else:
        print(tokens[0])
    return 0


def _stores(path: str, uses: int) -> list[dict[str, Any]]:
    """The rows of a CSV file. Raises ConfigError for one that is not as it should be."""
    found = []
    for line, fields in read_rows(path, "region"):
        region, count = fields["region"].strip(), fields.get("uses", "").strip() or str(uses)
        if not region or not (count.isascii() and count.isdigit() and int(count)):
            raise ConfigError(f"{path}, line {line}: no region, or uses that are not a number")
        found.append({"region": region, "uses": int(count)})
    if not found:
        raise ConfigError(f"{path} has no stores; a line with a region is expected for each")
    return found


def list_tokens(options: argparse.Namespace) -> int:
    tokens = call(options.admin, "GET", "/v1/trust/tokens")["tokens"]
    principals = call(options.admin, "GET", "/v1/access")["principals"]
    apps = [{**token, "app": one["name"], "region": one["region"]} for one in principals for token in one["tokens"]]
    if options.json:
        print(json.dumps(tokens + apps))
        return 0
    rows = [
        (
            token["id"],
            ",".join(token["levels"]),
            token["region"] or "(all)",
            f"{token['used']} of {token['uses']}",
            _until(token["expires_ms"]),
            token["label"] or "-",
        )
        for token in tokens
    ] + [
        (token["id"], f"app {token['app']}", token["region"] or "(all)", "-", _until(token["expires_ms"]), "-")
        for token in apps
    ]
    print_table(("id", "for", "region", "used", "expires", "label"), rows)
    return 0


def _until(expires_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(expires_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M") if expires_ms else "never"


def revoke(options: argparse.Namespace) -> int:
    call(options.admin, "DELETE", api_path("trust", "tokens", options.id))
    print(json.dumps({"revoked": options.id}) if options.json else f"token {options.id} is revoked")
    return 0
