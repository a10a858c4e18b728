"""The configuration of an application: defaults < a TOML file < EDGEBROKER_APP_* < flags, all problems at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import tomli
from msgspec import Struct

from edgebroker.common.config import DEVELOPMENT, about, is_insecure, is_loopback, parse_labels, split_list
from edgebroker.common.errors import ConfigError
from edgebroker.common.names import check_group_name
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.common.runtime.text_file import read_text

ENV_PREFIX = "EDGEBROKER_APP_"
DEFAULT, FILE, ENVIRONMENT, FLAG = "default", "file", "environment", "flag"


# fmt: off
class AppConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, about("name of the application; empty: that of its file or type")] = ""
    type: Annotated[Literal["", "store", "table", "stdout"], about(
        "an application without a file: store (the latest value of each key), table (with columns), stdout (a line of "
        "JSON for each record)")] = ""
    topics: Annotated[str, about("topics that an application without a file reads, with commas between them")] = ""
    columns: Annotated[str, about(
        "columns of type table: NAME and text, integer, real, boolean or json, ? for one that may be missing; commas "
        "between them")] = ""
    indexes: Annotated[str, about("indexes of type table: columns with commas, semicolons between indexes")] = ""
    node: Annotated[str, about(
        "name of the node that this instance belongs to, for its groups and for {node} in topics; empty: the host name")
        ] = ""
    labels: Annotated[str, about(
        "labels of the node, for {label.NAME} in topics: NAME=VALUE, with commas between them")] = ""
    server: Annotated[str, about(
        "HOST:PORT of the broker; several with commas, the best first")] = "127.0.0.1:7420"
    credentials: Annotated[str, about(
        "file with the credentials for a broker of another machine, as `edgebroker token create --app` writes them; "
        "empty: that of EDGEBROKER_CREDENTIALS, or none")] = ""
    data_dir: Annotated[str, about("where the local database is; empty: edgebroker-NAME in the current directory")] = ""
    activate_refresh: Annotated[str, about(
        "when readers see a topic that was loaded again: now, within hours (22:00-04:00), or command "
        "(POST /v1/activate)")] = "now"
    copy: Annotated[Literal["auto", "on", "off"], about(
        "keep a copy of topics as they are at the broker, for their history and to build views again; auto: unless the "
        "broker is on this machine")] = "auto"
    copy_bytes: Annotated[int, msgspec.Meta(ge=64 << 20), about(
        "bytes of the copy of all topics; its oldest records go when it has more")] = 1 << 30
    copy_hours: Annotated[float, msgspec.Meta(ge=0, le=1_000_000), about(
        "hours that the copy keeps records; 0: as long as there is room")] = 0.0
    http: Annotated[str, about(
        "HOST:PORT at which it answers over HTTP; none: only at the unix socket http.sock in its data directory")
        ] = "127.0.0.1:7430"
    static_dir: Annotated[str, about("a directory whose files it answers with, at / and below; empty: none")] = ""
    stop_timeout: Annotated[float, msgspec.Meta(ge=0, le=3600), about(
        "seconds in which it finishes what it has begun when it is stopped; then it ends")] = 10.0
    force: Annotated[bool, about(
        "show a topic that was loaded again although it has fewer than nine tenths of its rows")] = False
    log_level: Annotated[Literal["debug", "info", "warning", "error"], about("lowest severity that is logged")] = "info"
    log_format: Annotated[Literal["auto", "text", "json"], about(
        "auto: fields to systemd's journal if standard error is connected to it, else text; json: one object per line")
        ] = "auto"
# fmt: on


def has_copy(config: AppConfig) -> bool:
    """Is a copy of topics kept?"""
    if config.copy == "auto":
        servers = split_list(config.server)
        return not all(server.startswith("unix:") or is_loopback(server) for server in servers)
    return config.copy == "on"


class LoadedConfig(NamedTuple):
    """`sources` says where each value is from: default, file, environment or flag."""

    config: AppConfig
    sources: dict[str, str]


def load_app_config(
    source: str,
    path: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Read file, environment and flags for the application in a file or module. Raises ConfigError with every problem
    found."""
    fields = {field.name: field for field in msgspec.structs.fields(AppConfig)}
    values: dict[str, Any] = {}
    sources = dict.fromkeys(fields, DEFAULT)
    problems: list[str] = []
    for name, value in (_read(path) if path is not None else {}).items():
        if name not in fields:
            problems.append(f"{path}: there is no key {name}; keys are {', '.join(fields)}")
            continue
        values[name], sources[name] = value, FILE
    for name in fields:
        found = (environment or {}).get(ENV_PREFIX + name.upper())
        if found:
            values[name], sources[name] = found, ENVIRONMENT
        given = (flags or {}).get(name)
        if given is not None:
            values[name], sources[name] = given, FLAG
    for name, value in values.items():
        try:
            values[name] = msgspec.convert(value, fields[name].type, strict=sources[name] != ENVIRONMENT)
        except msgspec.ValidationError as error:
            problems.append(f"{_spelled(name, sources[name])} = {value!r}: {error}")
    if not problems:
        config = _filled(msgspec.convert(values, AppConfig), source)
        problems = [f"{_spelled(name, sources[name])}: {why}" for name, why in _wrong(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return LoadedConfig(config, sources)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomli.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _filled(config: AppConfig, source: str) -> AppConfig:
    name = config.name or Path(source).stem.rpartition(".")[2] or config.type or "application"
    node = config.node or os.uname().nodename.partition(".")[0]
    return msgspec.structs.replace(config, name=name, node=node, data_dir=config.data_dir or f"edgebroker-{name}")


def _wrong(config: AppConfig) -> list[tuple[str, str]]:
    found = [(name, check_group_name(getattr(config, name))) for name in ("name", "node")]
    try:
        parse_labels(config.labels)
    except ValueError as error:
        found.append(("labels", str(error)))
    if config.activate_refresh not in ("now", "command"):
        try:
            parse_hours(config.activate_refresh or "-")
        except ValueError as error:
            found.append(("activate_refresh", f"{error}, or use now or command"))
    if config.static_dir and not Path(config.static_dir).is_dir():
        found.append(("static_dir", f"{config.static_dir!r}: there is no such directory"))
    host, _, port = config.http.rpartition(":")
    if config.http == "none":
        pass
    elif not host or not port.isdecimal() or int(port[:6]) > 65535:
        found.append(("http", f"{config.http!r}: HOST:PORT is expected, for example 127.0.0.1:7430, or none"))
    elif not is_loopback(config.http) and not is_insecure():
        found.append(
            (
                "http",
                f"{config.http!r}: other machines could read everything without TLS and authentication; listen on "
                f"127.0.0.1, or, to develop, set {DEVELOPMENT}=1",
            )
        )
    return [(name, why.replace("group names are", "it is")) for name, why in found if why]


def _spelled(name: str, source: str) -> str:
    """A key as it was given."""
    return {ENVIRONMENT: ENV_PREFIX + name.upper(), FLAG: f"--{name.replace('_', '-')}"}.get(source, name)
