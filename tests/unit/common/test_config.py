"""The configuration: precedence, and every problem found at once with what was probably meant."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgebroker.common.config import (
    DEVELOPMENT,
    INSTALLED,
    Config,
    describe_keys,
    is_insecure,
    is_loopback,
    load_config,
)
from edgebroker.common.errors import ConfigError

ROOT = Path(__file__).parents[3]


def problems(tmp_path: Path, toml: str, environment: dict[str, str] | None = None, **overrides: object) -> list[str]:
    path = tmp_path / "edgebroker.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError) as refused:
        load_config(path, {key.replace("__", "."): value for key, value in overrides.items()}, environment or {})
    return str(refused.value).splitlines()


def test_defaults_are_valid_and_safe() -> None:
    config = load_config(None, None, {})
    assert is_loopback(config.listen.tcp)
    assert is_loopback(config.listen.http)
    assert config.node.name
    assert config.storage.engine == "segment"
    assert config.listen.socket == "edgebroker-data/ctl.sock"
    assert {key for key, *_ in describe_keys()} >= {"node.level", "limits.max_record_bytes"}


def test_every_problem_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        [node]
        levle = "pos"
        level = "poss"
        [listen]
        tcp = 7420
        [storage]
        segment_bytes = 1
        commit_interval_ms = "soon"
        [limit]
        x = 1
        """,
        {"EDGEBROKER_TOPICS_PARTITIONS": "many"},
        log__level="loud",
    )
    assert len(found) == 8
    text = "\n".join(found)
    for words in (
        "node.levle: there is no such key (did you mean level?)",
        "node.level = 'poss': one of root, l2, l3, pos, local is expected (did you mean pos?)",
        "listen.tcp = 7420: a text is expected",
        "storage.segment_bytes = 1: a whole number from 65536 to 1073741824 is expected",
        "storage.commit_interval_ms = 'soon': a whole number from 0 to 1000 is expected",
        "[limit]: there is no such section (did you mean limits?)",
        "EDGEBROKER_TOPICS_PARTITIONS: a whole number is expected, not 'many'",
        "log.level = 'loud'",
    ):
        assert words in text


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "edgebroker.toml"
    path.write_text('[node]\nname = "file"\nlevel = "l2"\ndata_dir = "file"\n')
    environment = {"EDGEBROKER_NODE_NAME": "environment", "EDGEBROKER_NODE_DATA_DIR": "environment"}
    config = load_config(path, {"node.data_dir": "flag"}, environment)
    assert (config.node.level, config.node.name, config.node.data_dir) == ("l2", "environment", "flag")
    assert config.limits == Config().limits


@pytest.mark.parametrize(
    ("variable", "raw", "key", "expected"),
    [
        ("EDGEBROKER_REGISTRY_ENABLED", "true", "registry.enabled", True),
        ("EDGEBROKER_TOPICS_AUTO_CREATE", "0", "topics.auto_create", False),
        ("EDGEBROKER_TOPICS_PARTITIONS", "8", "topics.partitions", 8),
        ("EDGEBROKER_STORAGE_SOFT_FREE_BYTES", "-1", "storage.soft_free_bytes", -1),
        ("EDGEBROKER_STORAGE_ENGINE", "memory", "storage.engine", "memory"),
    ],
)
def test_environment(variable: str, raw: str, key: str, expected: object) -> None:
    config = load_config(None, None, {variable: raw, "EDGEBROKER_SERVER": "not the node's", "HOME": "/"})
    section, _, name = key.partition(".")
    assert getattr(getattr(config, section), name) == expected


def test_environment_problems(tmp_path: Path) -> None:
    assert problems(tmp_path, "", {"EDGEBROKER_TOPICS_AUTO_CREATE": "maybe"}) == [
        "EDGEBROKER_TOPICS_AUTO_CREATE: true or false is expected, not 'maybe'"
    ]
    assert "0 to 1000" in problems(tmp_path, "", {"EDGEBROKER_STORAGE_COMMIT_INTERVAL_MS": "2000"})[0]


OPEN = ["0.0.0.0:7420", "[::]:7420", "192.168.1.5:7420", "broker.example:7420"]


@pytest.mark.parametrize("key", ["tcp", "pipe"])
@pytest.mark.parametrize("address", OPEN)
def test_clients_and_nodes_may_be_anywhere(tmp_path: Path, key: str, address: str) -> None:
    """Whether a node opens such an address depends on its certificate."""
    path = tmp_path / "edgebroker.toml"
    path.write_text(f'[listen]\n{key} = "{address}"\n')
    assert getattr(load_config(path, None, {}).listen, key) == address


def test_without_tls_is_for_development() -> None:
    assert (is_insecure({}), is_insecure({DEVELOPMENT: "0"}), is_insecure({DEVELOPMENT: "1"})) == (False, False, True)
    with pytest.raises(ConfigError, match="a service or an image does not start with it"):
        is_insecure({DEVELOPMENT: "1", INSTALLED: "1"})


@pytest.mark.parametrize("address", OPEN)
def test_administration_is_never_open(tmp_path: Path, address: str) -> None:
    assert "edgebroker --via NODE" in problems(tmp_path, f'[listen]\nhttp = "{address}"\n', {DEVELOPMENT: "1"})[0]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:7420", "[::1]:7420", "127.1.2.3:0"])
def test_loopback_needs_none(address: str) -> None:
    assert load_config(None, {"listen.tcp": address}, {}).listen.tcp == address


@pytest.mark.parametrize("address", ["7420", "localhost", ":7420", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"])
def test_addresses_that_are_none(tmp_path: Path, address: str) -> None:
    assert "HOST:PORT is expected" in problems(tmp_path, f'[listen]\ntcp = "{address}"\n')[0]


def test_values_that_do_not_fit_each_other(tmp_path: Path) -> None:
    sizes = "max_record_bytes = 100000\nmax_batch_bytes = 8192\n"
    found = problems(tmp_path, f"[limits]\n{sizes}heartbeat_ms = 1000\nidle_timeout_ms = 1500\n")
    assert [line.split(":")[0] for line in found] == ["limits.max_record_bytes", "limits.idle_timeout_ms"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.toml", None, {})
    assert "not valid TOML" in problems(tmp_path, "[node")[0]
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="line 1: the byte 0xff is not UTF-8"):
        load_config(tmp_path / "bytes.toml", None, {})
    (tmp_path / "windows.toml").write_bytes(b'\xef\xbb\xbf[node]\r\nname = "K\xc3\xb6ln"\r\n')
    assert load_config(tmp_path / "windows.toml", None, {}).node.name == "Köln"


@pytest.mark.parametrize("toml", ["node = 3", 'node = "x"', "node = []"])
def test_a_section_must_be_a_table(tmp_path: Path, toml: str) -> None:
    for overrides in ({}, {"node__data_dir": "flag"}):
        assert problems(tmp_path, toml, {"EDGEBROKER_NODE_NAME": "x"}, **overrides) == [
            "node: a table [node] is expected"
        ]


def test_the_socket_follows_systemd(tmp_path: Path) -> None:
    environment = {"RUNTIME_DIRECTORY": "/run/edgebroker:/run/other"}
    assert load_config(None, None, environment).listen.socket == "/run/edgebroker/ctl.sock"
    config = load_config(None, {"listen.socket": "/x.sock"}, environment)
    assert config.listen.socket == "/x.sock"


def test_every_key_is_described() -> None:
    for key, allowed, _, words in describe_keys():
        assert allowed
        assert words or allowed != "a text", key
    assert len({key for key, *_ in describe_keys()}) == len(describe_keys())


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    sections = "node|listen|storage|topics|limits|delivery|pipe|registry|trust|log"
    documented = set(re.findall(rf"`((?:{sections})\.[a-z_]+)`", text))
    assert documented == {key for key, *_ in describe_keys()}


@pytest.mark.parametrize(("name", "found"), [("", "till-17"), ("%H-local", "till-17-local"), ("store-3", "store-3")])
def test_a_name_may_follow_the_host(name: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.uname", lambda: SimpleNamespace(nodename="till-17"))
    assert load_config(None, {"node.name": name}, {}).node.name == found
