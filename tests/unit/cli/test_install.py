"""install and uninstall into an image (--root): what is written where, and what is left alone.

In the running system the same is done by tests/appliance.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgebroker.cli.main import main
from edgebroker.common.config import load_config
from edgebroker.trust.token import make_token
from tests.kit.programs import frozen, script

__all__ = ["frozen"]
CONFIG, UNITS = "etc/edgebroker/edgebroker.toml", "etc/systemd/system"
PARENT = "http://store-3:7421"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.mkdir()
    return path


def install(image: Path, *arguments: str) -> int:
    return main(["install", "--root", str(image), *arguments])


def uninstall(image: Path, *arguments: str) -> int:
    return main(["uninstall", "--root", str(image), *arguments])


def files(image: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(image)): path for path in image.rglob("*") if path.is_file() or path.is_symlink()}
    return {name: os.readlink(p).encode() if p.is_symlink() else p.read_bytes() for name, p in sorted(found.items())}


def test_everything_is_where_systemd_looks(frozen: Path, image: Path) -> None:
    assert install(image, "--role", "pos", "--id", "store-3", "--parent", "http://hub/", "--region", "north") == 0
    config = load_config(image / CONFIG, environment={})
    assert (config.node.name, config.node.level, config.node.region) == ("store-3", "pos", "north")
    assert config.node.data_dir == "/var/lib/edgebroker"
    assert config.pipe.parents == "hub:7422"
    assert (config.listen.tcp, config.listen.http) == ("127.0.0.1:7420", "127.0.0.1:7421")
    assert (image / "opt/edgebroker/current/edgebroker").read_bytes() == frozen.read_bytes()
    command = image / "usr/local/bin/edgebroker"
    assert 'exec /opt/edgebroker/current/edgebroker "$@"' in command.read_text()
    assert os.access(command, os.X_OK)
    unit = (image / UNITS / "edgebroker.service").read_text()
    assert "ExecStart=/opt/edgebroker/current/edgebroker serve --config /etc/edgebroker/edgebroker.toml" in unit
    assert (image / UNITS / "edgebroker@.service").is_file()
    assert "MemoryMax=" in (image / UNITS / "edgebroker.service.d/10-limits.conf").read_text()
    assert (image / CONFIG).stat().st_mode & 0o777 == 0o640


def test_the_second_role_of_a_machine_is_a_node_beside_the_first(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    install(image, "--role", "local", "--labels", "till=17")
    config = load_config(image / "etc/edgebroker/local.toml", environment={})
    assert config.pipe.parents == "127.0.0.1:7422"
    assert (config.listen.tcp, config.listen.http) == ("127.0.0.1:7430", "127.0.0.1:7431")
    assert config.node.data_dir == "/var/lib/edgebroker-local"
    assert config.node.name.endswith("-local")
    assert (image / UNITS / "edgebroker@local.service.d/10-limits.conf").is_file()
    assert load_config(image / CONFIG, environment={}).node.level == "pos"


def test_again_it_changes_nothing(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    before = files(image)
    capsys.readouterr()
    install(image, "--role", "pos", "--parent", PARENT)
    assert files(image) == before
    assert capsys.readouterr().out == ""


def test_what_was_changed_by_hand_is_kept(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    path = image / CONFIG
    mine = path.read_text() + "# mine\n"
    path.write_text(mine)
    assert install(image, "--role", "pos", "--parent", "http://other:7421") == 1
    assert path.read_text() == mine
    assert load_config(path.with_name("edgebroker.toml.new"), environment={}).pipe.parents == "other:7421"
    assert "it was edited by hand; the new version goes to edgebroker.toml.new" in capsys.readouterr().out


def test_what_could_not_be_put_in_is_no_success(frozen: Path, image: Path) -> None:
    """Whoever deploys must not believe that it is there."""
    install(image, "--role", "pos", "--parent", PARENT)
    path = image / CONFIG
    path.write_text(path.read_text() + "# mine\n")
    assert install(image, "--role", "pos") == 0
    for _ in range(2):
        assert install(image, "--role", "pos", "--region", "north") == 1


def test_a_dry_run_shows_the_difference(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    capsys.readouterr()
    install(image, "--role", "pos", "--region", "south/store-4", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"would update {image / CONFIG}", '    -# region = ""', '    +region = "south/store-4"']


@pytest.mark.parametrize("verb", [("install", "--role", "pos"), ("uninstall",)])
def test_an_image_that_is_not_there(frozen: Path, image: Path, verb: tuple[str, ...]) -> None:
    assert main([*verb, "--root", str(image / "typo")]) == 2
    assert files(image) == {}


def test_what_nobody_changed_is_brought_up_to_date(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    install(image, "--role", "pos", "--parent", "http://other:7421")
    assert load_config(image / CONFIG, environment={}).pipe.parents == "other:7421"


def test_the_default_file_of_the_package_counts_as_untouched(frozen: Path, image: Path) -> None:
    path = image / CONFIG
    path.parent.mkdir(parents=True)
    path.write_text('# Defaults of some release.\n[node]\ndata_dir = "/var/lib/edgebroker"\n')
    install(image, "--role", "pos", "--parent", PARENT)
    assert load_config(path, environment={}).node.level == "pos"


def test_a_dry_run_writes_nothing(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(image, "--role", "root", "--dry-run") == 0
    assert files(image) == {}
    assert f"would write {image}/{CONFIG}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--parent", "ftp://hub:7421"), "not https://HOST:PORT"),
        (("--parent", "hub:99999"), "HOST:PORT"),
        (("--instance", "../etc"), "lower-case letters"),
        (("--instance", "edgebroker"), "not edgebroker"),
        (("--region", "a b"), "region"),
        (("--labels", "nonsense"), "labels"),
        (("--bind", "0.0.0.0:7420"), "without a port"),
        (("--bind", "10.0.0.300"), "IP address"),
        (("--parent", "foo:bar"), "HOST:PORT"),
        (("--parent", "http://hub:7421/path"), "HOST:PORT"),
        (("--parent", "hub north"), "HOST:PORT"),
        (("--start",), "an image starts its nodes when it boots"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    frozen: Path, image: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], why: str
) -> None:
    assert install(image, "--role", "pos", *arguments) == 2
    assert why in capsys.readouterr().err
    assert files(image) == {}


def test_from_source_it_says_what_to_do(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install(image, "--role", "pos") == 2
    assert "make freeze" in capsys.readouterr().err
    assert files(image) == {}


def test_other_machines_get_clients_and_nodes_but_no_administration(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--bind", "127.0.0.7")
    config = load_config(image / CONFIG, environment={})
    assert (config.listen.tcp, config.listen.pipe) == ("127.0.0.7:7420", "127.0.0.7:7422")
    assert config.listen.http == "127.0.0.1:7421", "administration stays here"


TOKEN = str(make_token(bytes(16)))


def test_a_token_is_for_the_node_alone(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file that the unit takes away, and nowhere else: not in the configuration, not on the screen."""
    assert install(image, "--role", "pos", "--parent", "https://hub", "--token", TOKEN.lower()) == 0
    path = image / "etc/edgebroker/edgebroker.token"
    assert (path.read_text(), path.stat().st_mode & 0o777) == (f"{TOKEN}\n", 0o600)
    config = load_config(image / CONFIG, environment={})
    assert (config.trust.token_file, config.pipe.parents) == ("/var/lib/edgebroker/token", "hub:7422")
    held = [name for name, data in files(image).items() if TOKEN.encode() in data]
    assert held == ["etc/edgebroker/edgebroker.token"]
    assert TOKEN not in capsys.readouterr().out
    assert "/etc/edgebroker/edgebroker.token" in (image / UNITS / "edgebroker.service").read_text()


def test_a_token_from_a_file(frozen: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "stick"
    path.write_text(f"  {TOKEN}\n")
    assert install(image, "--role", "local", "--instance", "b", "--token", f"@{path}") == 0
    assert (image / "etc/edgebroker/b.token").read_text() == f"{TOKEN}\n"
    for wrong, why in (("EB1XY", "not a join token"), (f"@{tmp_path}/none", "No such file")):
        assert install(image, "--role", "pos", "--token", wrong) != 0
        assert why in capsys.readouterr().err


def test_a_root_creates_its_fleet(frozen: Path, image: Path) -> None:
    assert install(image, "--role", "root", "--fleet", "acme", "--bind", "0.0.0.0") == 0
    config = load_config(image / CONFIG, environment={})
    assert (config.trust.fleet, config.listen.pipe) == ("acme", "0.0.0.0:7422")


def test_uninstall_takes_away_what_was_written_and_keeps_the_data(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    install(image, "--role", "local")
    data = image / "var/lib/edgebroker/node"
    data.parent.mkdir(parents=True)
    data.write_text("records")
    uninstall(image, "--instance", "local")
    assert (image / UNITS / "edgebroker.service").exists()
    uninstall(image)
    left = set(files(image))
    assert json.loads((image / "etc/edgebroker/.installed.json").read_text()).keys() == {
        "etc/edgebroker/edgebroker.toml", "etc/edgebroker/local.toml"
    }  # fmt: skip
    configs = {f"etc/edgebroker/{name}" for name in ("edgebroker.toml", "local.toml", ".installed.json")}
    assert left == {*configs, "var/lib/edgebroker/node"}
    assert install(image, "--role", "pos", "--parent", PARENT) == 0, "and back"


def test_purging_has_to_be_meant(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    (image / "var/lib/edgebroker").mkdir(parents=True)
    assert uninstall(image, "--purge") == 2
    assert "--yes" in capsys.readouterr().err
    assert (image / "var/lib/edgebroker").exists()
    assert uninstall(image, "--purge", "--yes") == 0
    assert not (image / "var/lib/edgebroker").exists()
    assert files(image) == {}


def test_a_unit_that_was_changed_by_hand_stays(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    unit = image / UNITS / "edgebroker.service"
    unit.write_text(unit.read_text() + "# mine\n")
    uninstall(image)
    assert unit.read_text().endswith("# mine\n")


def test_the_folder_form_is_copied_whole(frozen: Path, image: Path) -> None:
    (frozen.parent / "_internal").mkdir()
    (frozen.parent / "_internal" / "library").write_bytes(b"code")
    install(image, "--role", "pos", "--parent", PARENT)
    assert (image / "opt/edgebroker/current/_internal/library").read_bytes() == b"code"


def test_another_release_is_a_matter_for_upgrade(frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(image, "--role", "pos")
    before = files(image)
    script(frozen, "9.9.10")
    assert install(image, "--role", "pos", "--region", "north") == 2
    assert f"edgebroker upgrade {frozen} --sha256 " in capsys.readouterr().err
    assert files(image) == before


def test_beside_the_package_there_is_no_second_program(
    frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script(image / "usr/lib/edgebroker/edgebroker")
    assert install(image, "--role", "pos") == 2
    assert "the edgebroker package is installed" in capsys.readouterr().err


def test_what_is_not_given_stays(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--id", "store-3", "--parent", PARENT, "--bind", "127.0.0.7", "--labels", "a=b")
    install(image, "--role", "pos", "--region", "north")
    config = load_config(image / CONFIG, environment={})
    assert (config.node.name, config.node.region, config.node.labels) == ("store-3", "north", "a=b")
    assert (config.pipe.parents, config.listen.pipe) == ("store-3:7421", "127.0.0.7:7422")


def test_every_node_has_ports_of_its_own(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--bind", "127.0.0.7")
    for name in ("a", "b", "c"):
        install(image, "--role", "local", "--instance", name)
    found = [load_config(image / f"etc/edgebroker/{name}.toml", environment={}) for name in ("edgebroker", *"abc")]
    assert [config.listen.tcp.rpartition(":")[2] for config in found] == ["7420", "7430", "7440", "7450"]
    assert found[1].pipe.parents == "127.0.0.7:7422"


def test_rights_that_are_wrong_are_corrected(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos")
    command = image / "usr/local/bin/edgebroker"
    command.chmod(0o600)
    install(image, "--role", "pos")
    assert command.stat().st_mode & 0o777 == 0o755


def test_a_node_is_enabled_also_in_an_image(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos")
    install(image, "--role", "local")
    wants = image / UNITS / "multi-user.target.wants"
    found = {path.name: os.readlink(path) for path in wants.iterdir()}
    assert found == {
        "edgebroker.service": "/etc/systemd/system/edgebroker.service",
        "edgebroker@local.service": "/etc/systemd/system/edgebroker@.service",
        "edgebroker-upgrade.service": "/etc/systemd/system/edgebroker-upgrade.service",
    }


def test_a_refresh_brings_units_up_to_date_and_nothing_else(
    frozen: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgebroker.cli.appliance import install as module

    install(image, "--role", "pos")
    install(image, "--role", "local")
    before = files(image)
    real = module.shipped
    monkeypatch.setattr(module, "shipped", lambda name: real(name) + "# of the next release\n")
    assert install(image, "--refresh") == 0
    changed = {name for name, content in files(image).items() if before[name] != content}
    assert changed == {
        "etc/edgebroker/.installed.json",
        "etc/sysusers.d/edgebroker.conf",
        "etc/tmpfiles.d/edgebroker.conf",
        *(f"{UNITS}/{name}" for name in module.SHIPPED_UNITS),
        f"{UNITS}/edgebroker.service.d/10-limits.conf",
        f"{UNITS}/edgebroker@local.service.d/10-limits.conf",
    }


def test_a_configuration_that_was_left_by_an_uninstall_is_no_node(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos", "--parent", PARENT)
    uninstall(image)
    install(image, "--role", "local")
    config = load_config(image / CONFIG, environment={})
    assert (config.node.level, config.pipe.parents) == ("local", "store-3:7421")
    assert not (image / "etc/edgebroker/local.toml").exists()


def test_a_node_is_fed_by_one_above_it_only(frozen: Path, image: Path) -> None:
    install(image, "--role", "local", "--parent", PARENT)
    install(image, "--role", "pos")
    assert load_config(image / "etc/edgebroker/pos.toml", environment={}).pipe.parents == ""


def test_the_port_of_a_node_stays(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos")
    for name in ("a", "b"):
        install(image, "--role", "local", "--instance", name)
    uninstall(image, "--instance", "a", "--purge", "--yes")
    install(image, "--role", "local", "--instance", "b", "--bind", "127.0.0.7")
    assert load_config(image / "etc/edgebroker/b.toml", environment={}).listen.tcp == "127.0.0.7:7440"


def test_limits_that_were_changed_do_not_keep_the_program(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos")
    limits = image / UNITS / "edgebroker.service.d/10-limits.conf"
    limits.write_text(limits.read_text() + "# mine\n")
    uninstall(image)
    assert limits.exists()
    assert not (image / "opt/edgebroker").exists()


@pytest.mark.parametrize("umask", [0o027, 0o077])
def test_a_strict_umask_hides_nothing_from_the_node(frozen: Path, image: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        install(image, "--role", "pos")
    finally:
        os.umask(before)
    for path in image.rglob("*"):
        mode = path.lstat().st_mode & 0o777
        if path.is_dir() and not path.is_symlink():
            assert mode == 0o755, path
    assert (image / CONFIG).stat().st_mode & 0o777 == 0o640


def test_a_refresh_leaves_out_what_cannot_be_read(
    frozen: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(image, "--role", "pos")
    install(image, "--role", "local")
    (image / "etc/edgebroker/local.toml").write_bytes(b"# caf\xe9\n")
    assert install(image, "--refresh") == 0
    assert "keep the limits of edgebroker@local.service" in capsys.readouterr().out


def test_only_the_installed_release_refreshes(frozen: Path, image: Path) -> None:
    install(image, "--role", "pos")
    script(frozen, "9.9.10")
    assert install(image, "--refresh") == 2
