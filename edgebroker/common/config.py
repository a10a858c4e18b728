"""The configuration: one frozen tree, read once from TOML and environment, checked as a whole.

Precedence: defaults < file < EDGEBROKER_<SECTION>_<KEY> < command-line flags. Every problem is found before anything
is refused: each names its key, what is allowed, and what was probably meant. docs/configuration.md lists every key
(a test holds the two together).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tomli
from msgspec import Meta, Struct

from edgebroker.common.errors import ConfigError
from edgebroker.common.hours import parse_hours

MIB = 1 << 20
# What a node says about itself has to fit into its report.
MAX_LABELS, MAX_LABEL_LENGTH = 8, 40
Level = Literal["root", "l2", "l3", "pos", "local"]
EngineName = Literal["segment", "memory"]

_Bytes = Annotated[int, Meta(ge=0)]
_Ms = Annotated[int, Meta(ge=0)]
_REGION = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


class NodeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[
        str, Meta(max_length=100, description="display name of the node; %H is the host name; empty: that alone")
    ] = ""
    level: Annotated[Level, Meta(description="place of the node in the tree")] = "root"
    region: Annotated[str, Meta(max_length=120, description="where the node stands, from the whole to the part, as `north/store-12`; a pos feeds only nodes of its own region")] = ""  # fmt: skip  # noqa: E501
    labels: Annotated[str, Meta(description="what else is known about the node, as `format=express,wave=1`; at most 8")] = ""  # fmt: skip  # noqa: E501
    data_dir: Annotated[str, Meta(min_length=1, description="where everything is stored")] = "edgebroker-data"


class ListenConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tcp: Annotated[str, Meta(description="HOST:PORT of the binary protocol; port 0 takes a free one")] = (
        "127.0.0.1:7420"
    )
    http: Annotated[str, Meta(description="HOST:PORT of the admin and health interface")] = "127.0.0.1:7421"
    socket: Annotated[str, Meta(description="unix socket of the admin interface; empty: ctl.sock in $RUNTIME_DIRECTORY or data_dir")] = ""  # fmt: skip  # noqa: E501
    allow_insecure: Annotated[bool, Meta(description="allow addresses off loopback without TLS and authentication")] = False  # fmt: skip  # noqa: E501


class StorageConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: Annotated[EngineName, Meta(description="segment: the durable log; memory: for tests, nothing survives a stop")] = "segment"  # fmt: skip  # noqa: E501
    segment_bytes: Annotated[int, Meta(ge=64 << 10, le=1 << 30, description="size at which a segment is sealed")] = 64 * MIB  # fmt: skip  # noqa: E501
    segment_ms: Annotated[_Ms, Meta(description="age at which a segment is sealed; 0: never by age")] = 7 * 86_400_000
    retention_bytes: Annotated[_Bytes, Meta(description="keep at most this much per partition; 0: no limit")] = 0
    retention_ms: Annotated[_Ms, Meta(description="remove segments sealed longer ago than this; 0: never")] = 0
    max_bytes: Annotated[_Bytes, Meta(description="budget of all logs together; 0: only the file system limits")] = 0
    soft_free_bytes: Annotated[int, Meta(ge=-1, description="below this much free space what all live groups have passed is removed early; -1: 5 % or 512 MiB")] = -1  # fmt: skip  # noqa: E501
    hard_free_bytes: Annotated[int, Meta(ge=-1, description="below this much free space producers get DISK_FULL; -1: 2 % or 128 MiB")] = -1  # fmt: skip  # noqa: E501
    commit_interval_ms: Annotated[int, Meta(ge=0, le=1000, description="collect writes this long before a sync (spares flash); 0: sync at once; urgent topics always at once")] = 0  # fmt: skip  # noqa: E501
    read_timeout_ms: Annotated[int, Meta(ge=100, description="a disk read that takes longer is answered STORAGE_TIMEOUT")] = 5000  # fmt: skip  # noqa: E501
    verify_bytes_per_second: Annotated[_Bytes, Meta(description="rate of the background check of stored segments after a start; 0: as fast as it goes")] = 32 * MIB  # fmt: skip  # noqa: E501


class TopicsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    auto_create: Annotated[bool, Meta(description="create a topic at its first PUBLISH")] = True
    kind: Annotated[Literal["stream", "table"], Meta(description="kind of topics created that way")] = "stream"
    partitions: Annotated[int, Meta(ge=1, le=1024, description="partitions of topics created that way")] = 1


class LimitsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_connections: Annotated[int, Meta(ge=1, description="client connections at a time")] = 12_000
    max_record_bytes: Annotated[int, Meta(ge=1024, le=16 * MIB, description="largest record")] = MIB
    max_batch_bytes: Annotated[int, Meta(ge=4096, le=16 * MIB, description="largest record batch, as sent")] = 4 * MIB
    max_inflated_bytes: Annotated[int, Meta(ge=4096, le=256 * MIB, description="largest record batch after decompression")] = 16 * MIB  # fmt: skip  # noqa: E501
    publish_window_batches: Annotated[int, Meta(ge=1, le=65_536, description="unacknowledged batches granted to a producer, and remembered to recognise duplicates")] = 16_384  # fmt: skip  # noqa: E501
    publish_window_bytes: Annotated[int, Meta(ge=64 << 10, description="unacknowledged bytes granted to a producer")] = 8 * MIB  # fmt: skip  # noqa: E501
    consume_window_records: Annotated[int, Meta(ge=1, le=1 << 20, description="records in flight to a consumer that asks for no window of its own")] = 10_000  # fmt: skip  # noqa: E501
    consume_window_bytes: Annotated[int, Meta(ge=64 << 10, le=64 * MIB, description="the same in bytes")] = 8 * MIB
    staged_high_bytes: Annotated[int, Meta(ge=MIB, description="bytes waiting for the disk above which producers are not read")] = 64 * MIB  # fmt: skip  # noqa: E501
    heartbeat_ms: Annotated[int, Meta(ge=100, description="interval of heartbeats to clients")] = 10_000
    idle_timeout_ms: Annotated[int, Meta(ge=200, description="a client that sends nothing for this long is cut")] = (
        30_000
    )
    connect_timeout_ms: Annotated[int, Meta(ge=100, description="time until CONNECT must have come")] = 2_000
    stuck_timeout_ms: Annotated[int, Meta(ge=100, description="a client that takes nothing for this long is cut")] = 10_000  # fmt: skip  # noqa: E501


class DeliveryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    timeout_ms: Annotated[int, Meta(ge=100, description="time in which a consumer must acknowledge, negatively or not, what it was delivered, or say that it is in progress")] = 60_000  # fmt: skip  # noqa: E501
    max_attempts: Annotated[int, Meta(ge=0, le=1_000_000, description="failed attempts after which a record goes to the dead-letter topic; 0: never")] = 5  # fmt: skip  # noqa: E501
    backoff_ms: Annotated[int, Meta(ge=0, le=3_600_000, description="pause after the first failed attempt; it doubles with every further one")] = 500  # fmt: skip  # noqa: E501
    max_backoff_ms: Annotated[int, Meta(ge=0, le=86_400_000, description="longest pause after a failed attempt")] = 30_000  # fmt: skip  # noqa: E501


class PipeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    parents: Annotated[str, Meta(description="HOST:PORT of the parent's HTTP interface; several with commas, the best first; empty: this node has none")] = ""  # fmt: skip  # noqa: E501
    registry: Annotated[str, Meta(description="HOST:PORT of nodes through which the registry can be asked for a parent; several with commas; empty: only pipe.parents counts")] = ""  # fmt: skip  # noqa: E501
    address: Annotated[str, Meta(description="HOST:PORT under which children reach this node; empty: listen.http, with the host name where that listens on all addresses")] = ""  # fmt: skip  # noqa: E501
    topics: Annotated[str, Meta(description="topics to mirror: names or patterns (*, ?, [...]), separated by commas")] = "*"  # fmt: skip  # noqa: E501
    bytes_per_second: Annotated[_Bytes, Meta(description="take at most this much from the parent; 0: no limit")] = 0
    hours: Annotated[str, Meta(description="hours in which topics that are not urgent are taken, by the parent's clock, as `22:00-06:00`; several with commas; empty: always")] = ""  # fmt: skip  # noqa: E501
    max_children: Annotated[
        int, Meta(ge=0, le=100_000, description="children that are fed at a time, and remembered for each log; 0: none")
    ] = 4096


class RegistryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[bool, Meta(description="keep the registry of all nodes here and tell them their parents; at one node, normally the root")] = False  # fmt: skip  # noqa: E501


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="least severe lines that are logged")] = "info"  # fmt: skip  # noqa: E501
    format: Annotated[Literal["auto", "text", "json"], Meta(description="auto: fields to systemd's journal where standard error is that, else text; json: an object a line")] = "auto"  # fmt: skip  # noqa: E501


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole tree; sections are TOML tables."""

    node: NodeConfig = NodeConfig()
    listen: ListenConfig = ListenConfig()
    storage: StorageConfig = StorageConfig()
    topics: TopicsConfig = TopicsConfig()
    limits: LimitsConfig = LimitsConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    pipe: PipeConfig = PipeConfig()
    registry: RegistryConfig = RegistryConfig()
    log: LogConfig = LogConfig()


SECTIONS: dict[str, type[Struct]] = {field.name: field.type for field in msgspec.structs.fields(Config)}
ENV_PREFIX = "EDGEBROKER_"


def load_config(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Read file, environment and flags ("section.key" -> value). Raises ConfigError with every problem found."""
    environment = os.environ if environment is None else environment
    tree: dict[str, Any] = {}
    problems: list[str] = []
    if path is not None:
        try:
            tree = tomli.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    _merge_environment(tree, environment, problems)
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
    problems += _check_tree(tree)
    if problems:
        raise ConfigError("\n".join(problems))
    config = msgspec.convert(tree, Config)
    problems = _check_meaning(config)
    if problems:
        raise ConfigError("\n".join(problems))
    return _fill(config, environment)


def is_address(text: str) -> bool:
    """HOST:PORT?"""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536


def is_loopback(address: str) -> bool:
    """True when only this machine can reach HOST:PORT."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _merge_environment(tree: dict[str, Any], environment: Mapping[str, str], problems: list[str]) -> None:
    for variable, raw in environment.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        section, _, key = variable[len(ENV_PREFIX) :].lower().partition("_")
        if section not in SECTIONS:
            continue  # EDGEBROKER_ variables of clients and tools are not the node's
        fields = {field.name: field for field in msgspec.structs.fields(SECTIONS[section])}
        if key not in fields:
            problems.append(f"{variable}: [{section}] has no key {key}{_hint(key, list(fields))}")
            continue
        value: object = raw
        kind = _plain_type(fields[key].type)
        if kind is int:
            try:
                value = int(raw)
            except ValueError:
                problems.append(f"{variable}: a whole number is expected, not {raw!r}")
                continue
        elif kind is bool:
            if raw.lower() not in ("true", "false", "1", "0"):
                problems.append(f"{variable}: true or false is expected, not {raw!r}")
                continue
            value = raw.lower() in ("true", "1")
        if not isinstance(tree.setdefault(section, {}), dict):
            continue
        tree[section][key] = value


def _check_tree(tree: dict[str, Any]) -> list[str]:
    problems = []
    for section, table in tree.items():
        if section not in SECTIONS:
            problems.append(f"[{section}]: there is no such section{_hint(section, list(SECTIONS))}")
            continue
        if not isinstance(table, dict):
            problems.append(f"{section}: a table [{section}] is expected")
            continue
        fields = {field.name: field for field in msgspec.structs.fields(SECTIONS[section])}
        for key, value in table.items():
            if key not in fields:
                problems.append(f"{section}.{key}: there is no such key{_hint(key, list(fields))}")
                continue
            try:
                msgspec.convert(value, fields[key].type)
            except msgspec.ValidationError as error:
                problems.append(f"{section}.{key} = {value!r}: {_explain(fields[key].type, error, value)}")
    return problems


def _check_meaning(config: Config) -> list[str]:
    problems = []
    for key in ("tcp", "http"):
        address = getattr(config.listen, key)
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            problems.append(f"listen.{key} = {address!r}: HOST:PORT is expected, for example 127.0.0.1:7420")
        elif not is_loopback(address) and not config.listen.allow_insecure:
            problems.append(
                f"listen.{key} = {address!r}: other machines could read and write everything, there is no TLS or "
                "authentication yet; listen on 127.0.0.1, or set listen.allow_insecure = true"
            )
    for key in ("parents", "registry", "address"):
        for address in split_list(getattr(config.pipe, key)):
            if not is_address(address):
                problems.append(f"pipe.{key}: {address!r}: HOST:PORT is expected, for example hub.example:7421")
    if config.node.region and not _REGION.fullmatch(config.node.region):
        problems.append(f"node.region = {config.node.region!r}: names with slashes between them, as north/store-12")
    try:
        parse_labels(config.node.labels)
    except ValueError as error:
        problems.append(f"node.labels: {error}")
    try:
        parse_hours(config.pipe.hours)
    except ValueError as error:
        problems.append(f"pipe.hours: {error}")
    for key in ("parents", "registry"):
        if getattr(config.pipe, key) and config.node.level == "root":
            problems.append(f"pipe.{key}: a root node has no parent; set node.level to l2, l3, pos or local")
        if getattr(config.pipe, key) and config.storage.engine != "segment":
            problems.append(f"pipe.{key}: only the segment engine can mirror a parent; set storage.engine = segment")
    if config.registry.enabled and config.storage.engine != "segment":
        problems.append("registry.enabled: a node in memory keeps no registry; set storage.engine = segment")
    limits = config.limits
    if limits.max_record_bytes > limits.max_batch_bytes:
        problems.append("limits.max_record_bytes: a record cannot be larger than limits.max_batch_bytes")
    if limits.idle_timeout_ms < 2 * limits.heartbeat_ms:
        problems.append("limits.idle_timeout_ms: at least two heartbeats (limits.heartbeat_ms) must fit into it")
    return problems


def _fill(config: Config, environment: Mapping[str, str]) -> Config:
    name = (config.node.name or "%H").replace("%H", os.uname().nodename)
    node = msgspec.structs.replace(config.node, name=name)
    runtime = environment.get("RUNTIME_DIRECTORY", "")
    listen = config.listen
    if not listen.socket:
        base = Path(runtime.split(":")[0]) if runtime else Path(node.data_dir)
        listen = msgspec.structs.replace(listen, socket=str(base / "ctl.sock"))
    return msgspec.structs.replace(config, node=node, listen=listen)


def split_list(text: str) -> list[str]:
    """What stands between the commas of a text."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_labels(text: str) -> dict[str, str]:
    """NAME=VALUE, with commas between them. Raises ValueError for what is none, or too much."""
    labels = {}
    for part in split_list(text):
        name, equals, value = part.partition("=")
        if not equals or not name or not value or max(len(name), len(value)) > MAX_LABEL_LENGTH:
            raise ValueError(f"{part!r}: NAME=VALUE is expected, each at most {MAX_LABEL_LENGTH} characters")
        labels[name.strip()] = value.strip()
    if len(labels) > MAX_LABELS:
        raise ValueError(f"at most {MAX_LABELS} labels, not {len(labels)}")
    return labels


def _plain_type(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def allowed(annotation: Any) -> str:
    """What a key may hold, in words."""
    plain = _plain_type(annotation)
    if get_origin(plain) is Literal:
        return "one of " + ", ".join(get_args(plain))
    if plain is bool:
        return "true or false"
    if plain is int:
        low, high = None, None
        for meta in getattr(annotation, "__metadata__", ()):
            if isinstance(meta, Meta):
                low = meta.ge if meta.ge is not None else low
                high = meta.le if meta.le is not None else high
        bounds = (f" from {low}" if low is not None else "") + (f" to {high}" if high is not None else "")
        return "a whole number" + bounds
    return "a text"


def _explain(annotation: Any, error: msgspec.ValidationError, value: object) -> str:
    plain = _plain_type(annotation)
    hint = ""
    if get_origin(plain) is Literal and isinstance(value, str):
        hint = _hint(value, list(get_args(plain)))
    return f"{allowed(annotation)} is expected{hint}"


def _hint(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word, known, 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else f" (known: {', '.join(known)})"


def describe_keys() -> list[tuple[str, str, object, str]]:
    """(section.key, allowed, default, description) of every key, for `config init`, the docs and their test."""
    rows = []
    for section, struct in SECTIONS.items():
        hints = get_type_hints(struct, include_extras=True)
        for field in msgspec.structs.fields(struct):
            metas = getattr(hints[field.name], "__metadata__", ())
            words = [meta.description for meta in metas if isinstance(meta, Meta) and meta.description]
            rows.append(
                (f"{section}.{field.name}", allowed(hints[field.name]), field.default, words[-1] if words else "")
            )
    return rows
