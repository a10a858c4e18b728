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
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.common.runtime.text_file import read_text

MIB = 1 << 20
# What a node says about itself has to fit into its report.
MAX_LABELS, MAX_LABEL_LENGTH = 8, 40
Level = Literal["root", "l2", "l3", "pos", "local"]
EngineName = Literal["segment", "memory"]

_Bytes = Annotated[int, Meta(ge=0)]
_Ms = Annotated[int, Meta(ge=0)]
_REGION = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


def about(description: str, **bounds: Any) -> Meta:
    """What a key is for, as `edgebroker config init` and docs/configuration.md say it, and the values it may have."""
    return Meta(description=description, **bounds)


# fmt: off
class NodeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, about("display name of the node; %H is the host name; empty: that alone", max_length=100)] = ""
    level: Annotated[Level, about("level of the node in the tree")] = "root"
    region: Annotated[str, about(
        "where the node is, from the whole to the part, as `north/store-12`; a pos serves only nodes of its own "
        "region", max_length=120)] = ""
    labels: Annotated[str, about("what else is known about the node, as `format=express,wave=1`; at most 8")] = ""
    data_dir: Annotated[str, about("where everything is stored", min_length=1)] = "edgebroker-data"


class ListenConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tcp: Annotated[str, about("HOST:PORT of the binary protocol; port 0 takes a free one")] = "127.0.0.1:7420"
    http: Annotated[str, about("HOST:PORT of the admin and health interface; always on loopback")] = "127.0.0.1:7421"
    pipe: Annotated[str, about("HOST:PORT for the nodes below; empty: this node takes none")] = ""
    unix: Annotated[str, about(
        "unix socket for clients on this machine; empty: clients.sock in $RUNTIME_DIRECTORY or data_dir")] = ""
    socket: Annotated[str, about(
        "unix socket of the admin interface; empty: ctl.sock in $RUNTIME_DIRECTORY or data_dir")] = ""
    names: Annotated[str, about(
        "names by which the admin interface may be called, beside addresses, localhost, and the names of the node and "
        "its machine; several with commas")] = ""


class StorageConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: Annotated[EngineName, about(
        "segment: the durable log; memory: for tests, nothing survives a stop")] = "segment"
    segment_bytes: Annotated[int, about("size at which a segment is sealed", ge=64 << 10, le=1 << 30)] = 64 * MIB
    segment_ms: Annotated[_Ms, about("age at which a segment is sealed; 0: never by age")] = 7 * 86_400_000
    retention_bytes: Annotated[_Bytes, about("keep at most this much per partition; 0: no limit")] = 0
    retention_ms: Annotated[_Ms, about("remove segments sealed longer ago than this; 0: never")] = 0
    max_bytes: Annotated[_Bytes, about("budget of all logs together; 0: only the file system limits")] = 0
    soft_free_bytes: Annotated[int, about(
        "below this much free space, segments that all live groups have passed are removed early; -1: 5 % or 512 MiB",
        ge=-1)] = -1
    hard_free_bytes: Annotated[int, about(
        "below this much free space, producers get DISK_FULL; -1: 2 % or 128 MiB", ge=-1)] = -1
    on_full: Annotated[Literal["drop_consumed", "refuse"], about(
        "when space is wanted: drop_consumed removes what all holders have passed, and gives up who is silent; refuse "
        "keeps everything within its retention, and refuses producers")] = "drop_consumed"
    hold_ms: Annotated[_Ms, about(
        "a group or child that is silent this long holds back nothing any more when space is wanted")] = 7 * 86_400_000
    hold_bytes: Annotated[_Bytes, about(
        "a silent group or child holds back at most this much of a log; 0: no limit")] = 0
    deleted_retention_ms: Annotated[_Ms, about(
        "keep the files of deleted topics this long, for edgebroker topic undelete; less when space is wanted; 0: "
        "remove them at once")] = 86_400_000
    commit_interval_ms: Annotated[int, about(
        "collect writes this long before a sync (spares flash); 0: sync at once; urgent topics always at once",
        ge=0, le=1000)] = 0
    read_timeout_ms: Annotated[int, about("a disk read that takes longer is answered STORAGE_TIMEOUT", ge=100)] = 5000
    verify_bytes_per_second: Annotated[_Bytes, about(
        "rate of the background check of stored segments after a start; 0: as fast as it goes")] = 32 * MIB


class TopicsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    auto_create: Annotated[bool, about(
        "create a topic at its first PUBLISH; where the node has a parent and this is not set: false")] = True
    kind: Annotated[Literal["stream", "table"], about("kind of topics created that way")] = "stream"
    partitions: Annotated[int, about("partitions of topics created that way", ge=1, le=1024)] = 1


class LimitsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_connections: Annotated[int, about("client connections at a time", ge=1)] = 12_000
    per_address_connections: Annotated[int, about(
        "client connections at a time from one address of another machine", ge=1)] = 1_000
    max_partitions: Annotated[int, about(
        "partitions of all topics, above which clients can create none; what comes from the parent does not count as "
        "created", ge=1)] = 10_000
    max_groups: Annotated[int, about("consumer groups, above which clients can begin none", ge=1)] = 10_000
    max_committed_offsets: Annotated[int, about(
        "committed offsets of all groups, one for each partition of each, above which no group begins in further "
        "partitions", ge=1)] = 100_000
    max_subscribed_partitions: Annotated[int, about(
        "partitions that all consumers together subscribe to, each counted once for each consumer; from one address of "
        "another machine a quarter of them", ge=4)] = 50_000
    max_record_bytes: Annotated[int, about("largest record", ge=1024, le=16 * MIB)] = MIB
    max_batch_bytes: Annotated[int, about("largest record batch, as sent", ge=4096, le=16 * MIB)] = 4 * MIB
    max_inflated_bytes: Annotated[int, about(
        "largest record batch after decompression", ge=4096, le=256 * MIB)] = 16 * MIB
    publish_window_batches: Annotated[int, about(
        "unacknowledged batches granted to a producer, and remembered to recognise duplicates",
        ge=1, le=65_536)] = 16_384
    publish_window_bytes: Annotated[int, about("unacknowledged bytes granted to a producer", ge=64 << 10)] = 8 * MIB
    consume_window_records: Annotated[int, about(
        "records in flight to a consumer that asks for no window of its own", ge=1, le=1 << 20)] = 10_000
    consume_window_bytes: Annotated[int, about("the same in bytes", ge=64 << 10, le=64 * MIB)] = 8 * MIB
    receive_bytes: Annotated[int, about(
        "bytes of frames and requests that are not complete, or wait for their turn, of all connections; above it, the "
        "connection that takes longest to complete what it began is closed", ge=8 * MIB)] = 32 * MIB
    staged_high_bytes: Annotated[int, about(
        "bytes waiting for the disk above which producers are not read", ge=MIB)] = 64 * MIB
    replicated_timeout_ms: Annotated[int, about(
        "time in which nodes below must have a record that is published with the ack level replicated", ge=100)] = 5_000
    heartbeat_ms: Annotated[int, about("interval of heartbeats to clients", ge=100)] = 10_000
    idle_timeout_ms: Annotated[int, about("a client that sends nothing for this long is disconnected", ge=200)] = 30_000
    connect_timeout_ms: Annotated[int, about("time until CONNECT must have arrived", ge=100)] = 2_000
    stuck_timeout_ms: Annotated[int, about(
        "a client that takes nothing for this long is disconnected", ge=100)] = 10_000


class DeliveryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    timeout_ms: Annotated[int, about(
        "time in which a consumer must acknowledge what it was delivered, negatively or not, or report that it is in "
        "progress", ge=100)] = 60_000
    max_attempts: Annotated[int, about(
        "failed attempts after which a record goes to the dead-letter topic; 0: never", ge=0, le=1_000_000)] = 5
    backoff_ms: Annotated[int, about(
        "pause after the first failed attempt; it doubles with every further one", ge=0, le=3_600_000)] = 500
    max_backoff_ms: Annotated[int, about("longest pause after a failed attempt", ge=0, le=86_400_000)] = 30_000


class PipeConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    parents: Annotated[str, about(
        "HOST:PORT of the parent's listen.pipe; several with commas, the best first; empty: this node has none",
        )] = ""
    registry: Annotated[str, about(
        "HOST:PORT of nodes through which the registry can be asked for a parent; several with commas; empty: only "
        "pipe.parents counts")] = ""
    address: Annotated[str, about(
        "HOST:PORT at which children reach this node; empty: listen.pipe, with the host name where that listens on all "
        "addresses")] = ""
    topics: Annotated[str, about("topics to replicate: names or patterns (*, ?, [...]), separated by commas")] = "*"
    bytes_per_second: Annotated[_Bytes, about("take at most this much from the parent; 0: no limit")] = 0
    hours: Annotated[str, about(
        "transfer window: the hours in which topics that are not urgent are taken, by the parent's clock, as "
        "`22:00-06:00`; several with commas; empty: always")] = ""
    max_children: Annotated[int, about(
        "children that are served at a time, and remembered for each log; 0: none", ge=0, le=100_000)] = 4096


class RegistryConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: Annotated[bool, about(
        "keep the registry of all nodes here and assign their parents; at one node, normally the root")] = False
    standbys: Annotated[str, about(
        "names of children that keep a copy of the registry, for the day when this node is lost; several with commas; "
        "empty: the first eight hubs")] = ""


class TrustConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    fleet: Annotated[str, about(
        "name of the fleet: a root creates it when it has none; other nodes join only this one; empty: any",
        max_length=63)] = ""
    token_file: Annotated[str, about(
        "file with a token to join with; it is read once, then overwritten and removed")] = ""
    grace_days: Annotated[int, about(
        "nodes whose certificate expired up to so many days ago are let in; 0: however long ago",
        ge=0, le=36_500)] = 400


class LogConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], about("lowest severity that is logged")] = "info"
    format: Annotated[Literal["auto", "text", "json"], about(
        "auto: fields to systemd's journal if standard error is connected to it, else text; json: one object per line",
        )] = "auto"
# fmt: on


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
    trust: TrustConfig = TrustConfig()
    log: LogConfig = LogConfig()


SECTIONS: dict[str, type[Struct]] = {field.name: field.type for field in msgspec.structs.fields(Config)}
ENV_PREFIX = "EDGEBROKER_"
# For the development of applications and of edgebroker itself: listen off loopback without TLS. What is INSTALLED, a
# service or an image, does not obey it.
DEVELOPMENT, INSTALLED = "EDGEBROKER_DEVELOPMENT_INSECURE", "EDGEBROKER_INSTALLED"
# What Kubernetes and Docker set for a service or container whose name begins with ours.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?|NAME)\Z")


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
            tree = tomli.loads(read_text(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except tomli.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error
    _merge_environment(tree, environment, problems)
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
    _follow_parent(tree)
    problems += _check_tree(tree)
    if problems:
        raise ConfigError("\n".join(problems))
    config = msgspec.convert(tree, Config)
    problems = _check_meaning(config) + _check_listeners(config.listen)
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
        section, key, fields = _variable(variable)
        if key not in fields or not raw:
            continue  # other programs have such variables as well, and an empty one is not set
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


def _variable(name: str) -> tuple[str, str, dict[str, msgspec.structs.FieldInfo]]:
    """Which section and key an environment variable is about, and the fields of that section; "" for one that is not
    about the node."""
    section, _, key = name.removeprefix(ENV_PREFIX).lower().partition("_")
    if not name.startswith(ENV_PREFIX) or section not in SECTIONS:
        return "", "", {}
    return section, key, {field.name: field for field in msgspec.structs.fields(SECTIONS[section])}


def warnings(environment: Mapping[str, str] | None = None) -> list[str]:
    """Environment variables that look like settings of the node and are none."""
    found = []
    for variable in os.environ if environment is None else environment:
        section, key, fields = _variable(variable)
        if section and key not in fields and not _SERVICE_LINK.search(variable):
            known = _hint(key, list(fields))
            found.append(f"environment variable {variable} is ignored: [{section}] has no key {key}{known}")
    return found


def _follow_parent(tree: dict[str, Any]) -> None:
    """A node that has a parent gets its topics from there: a slip of the pen at a till makes none, unless that is
    wanted."""
    pipe, topics = tree.get("pipe"), tree.setdefault("topics", {})
    follows = isinstance(pipe, dict) and bool(pipe.get("parents") or pipe.get("registry"))
    if follows and isinstance(topics, dict):
        topics.setdefault("auto_create", False)


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
    for key in ("parents", "registry", "address"):
        for address in split_list(getattr(config.pipe, key)):
            if not is_address(address):
                problems.append(f"pipe.{key}: {address!r}: HOST:PORT is expected, for example hub.example:7422")
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


def _check_listeners(listen: ListenConfig) -> list[str]:
    problems = []
    for key in ("tcp", "http", "pipe"):
        address = getattr(listen, key)
        host, colon, port = address.rpartition(":")
        if key == "pipe" and not address:
            continue
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            problems.append(f"listen.{key} = {address!r}: HOST:PORT is expected, for example 127.0.0.1:7420")
        elif not is_loopback(address) and key == "http":
            problems.append(
                f"listen.http = {address!r}: administration is on loopback only; listen on 127.0.0.1, and reach it "
                "from another machine with ssh, or from a node above with edgebroker --via NODE"
            )
    return problems


def is_insecure(environment: Mapping[str, str] | None = None) -> bool:
    """May this process listen off loopback without TLS? Only to develop: raises ConfigError where it is installed."""
    environment = os.environ if environment is None else environment
    if environment.get(DEVELOPMENT, "") not in ("1", "true"):
        return False
    if environment.get(INSTALLED):
        raise ConfigError(f"{DEVELOPMENT} is for development; a service or an image does not start with it: remove it")
    return True


def _fill(config: Config, environment: Mapping[str, str]) -> Config:
    name = (config.node.name or "%H").replace("%H", os.uname().nodename)
    node = msgspec.structs.replace(config.node, name=name)
    runtime = environment.get("RUNTIME_DIRECTORY", "")
    base = Path(runtime.split(":")[0]) if runtime else Path(node.data_dir)
    listen = msgspec.structs.replace(
        config.listen,
        socket=config.listen.socket or str(base / "ctl.sock"),
        unix=config.listen.unix or str(base / "clients.sock"),
    )
    return msgspec.structs.replace(config, node=node, listen=listen)


def split_list(text: str) -> list[str]:
    """The parts of a text between its commas."""
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
