"""A terminal's life, as a technician sees it: one file is copied, and everything else is done by that.

The steps build on each other, as they do there. ROOT is played by a broker that the technician starts by hand; POS and
LOCAL are services.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.appliance.install import LIMITS
from edgebroker.version import __version__
from tests.kit.waiting import wait_for

from . import builds
from .machine import Machine

ROOT_ADMIN, POS, LOCAL = "127.0.0.1:7441", "127.0.0.1:7421", "127.0.0.1:7431"
ROOT_PIPE, POS_PIPE = "127.0.0.1:7442", "127.0.0.1:7422"
ROOT_SERVER, LOCAL_SERVER = "127.0.0.1:7440", "127.0.0.1:7430"
COPY = "/root/edgebroker"
POS_UNIT, LOCAL_UNIT = "edgebroker.service", "edgebroker@local.service"
BOTH = ((POS_UNIT, POS), (LOCAL_UNIT, LOCAL))
MOST_EXPOSED = 1.5
DISK = "/var/lib/edgebroker-local"
DISK_MEBIBYTES = 300


@pytest.fixture(scope="module")
def terminal(program: Path) -> Iterator[Machine]:
    with Machine("terminal", disks=[(DISK, DISK_MEBIBYTES)]) as machine:
        machine.boot()
        yield machine


def publish(terminal: Machine, first: int, count: int, server: str = ROOT_SERVER) -> None:
    lines = "".join(f"price {number}\n" for number in range(first, first + count))
    terminal.run("edgebroker", "publish", "prices", "--server", server, text=lines)


def consumed(terminal: Machine, count: int, group: str = "labels") -> list[str]:
    """The values of the next records of a group at LOCAL."""
    said = terminal.run(
        "edgebroker", "consume", "prices", "--group", group, "--count", str(count), "--timeout", "60", "--json",
        "--server", LOCAL_SERVER,
    )  # fmt: skip
    return [json.loads(line)["value"] for line in said.splitlines() if line.startswith("{")]


def numbers(first: int, count: int) -> list[str]:
    return [f"price {number}" for number in range(first, first + count)]


def processes(terminal: Machine, unit: str) -> list[int]:
    """Its process ids, the oldest first: the loader, then the program. While it is restarted there may be none."""
    group = terminal.shown(unit, "ControlGroup")
    said = terminal.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs", codes=(0, 1)) if group else ""
    return sorted(int(word) for word in said.split() if word.isdigit())


# ---- from a copied file to a consumed message ----


def test_one_file_is_all_that_is_copied(terminal: Machine, program: Path) -> None:
    terminal.copy(program, COPY)
    assert terminal.run("sh", "-c", "command -v python3 || echo none").strip() == "none"
    assert terminal.run(COPY, "version").strip() == f"edgebroker {__version__}"
    assert "7 of 7 checks passed" in terminal.run(COPY, "selftest")


def test_a_dry_run_changes_nothing(terminal: Machine) -> None:
    said = terminal.run(COPY, "install", "--role", "pos", "--parent", f"https://{ROOT_PIPE}", "--start", "--dry-run")
    assert "would write /etc/edgebroker/edgebroker.toml" in said
    assert "would run systemctl start edgebroker.service" in said
    assert not terminal.file("/etc/edgebroker").exists()
    assert not terminal.file("/opt/edgebroker").exists()


def test_a_wrong_argument_is_refused_before_anything_is_written(terminal: Machine) -> None:
    said = terminal.run(COPY, "install", "--role", "pos", "--parent", "ftp://store:7421", codes=(2,))
    assert "not https://HOST:PORT" in said
    assert not terminal.file("/etc/edgebroker").exists()


def test_a_store_and_a_terminal_are_installed_and_started(terminal: Machine) -> None:
    terminal.run(
        "systemd-run", "--unit=top", "--setenv=EDGEBROKER_TRUST_FLEET=acme",
        COPY, "serve", "--data-dir", "/var/lib/top", "--listen", ROOT_SERVER, "--http", ROOT_ADMIN, "--pipe", ROOT_PIPE,
    )  # fmt: skip
    terminal.wait_for(COPY, "check", "ready", "--admin", ROOT_ADMIN, has="OK")
    terminal.wait_for(COPY, "trust", "status", "--admin", ROOT_ADMIN, has="fleet:        acme")
    token = terminal.run(COPY, "token", "create", "--join", "--uses", "2", "--admin", ROOT_ADMIN).strip()
    store = ("--role", "pos", "--id", "store-3", "--parent", f"https://{ROOT_PIPE}")
    terminal.run(COPY, "install", *store, "--token", "-", text=token)
    terminal.run("systemctl", "start", "edgebroker")
    said = terminal.run(COPY, "install", "--role", "local", "--id", "till-17", "--token", token, "--start")
    assert "installed:  edgebroker@local" in said
    for unit, _ in BOTH:
        assert terminal.shown(unit, "ActiveState") == "active"
        assert terminal.run("systemctl", "is-enabled", unit).strip() == "enabled"


def test_they_join_the_fleet_and_the_token_is_gone(terminal: Machine) -> None:
    for admin, level in ((POS, "pos"), (LOCAL, "local")):
        terminal.wait_for("edgebroker", "trust", "status", "--admin", admin, has=f"edgebroker://acme/{level}/")
    kept = terminal.run("sh", "-c", "grep -rl ^EB1 /etc/edgebroker /var/lib/edgebroker* /boot || true").strip()
    assert kept == ""
    said = terminal.run("ls", "-la", "/var/lib/edgebroker/trust")
    assert "-rw-------" in [line.split()[0] for line in said.splitlines() if line.endswith("node.key")]


def test_what_is_published_at_the_top_is_consumed_at_the_terminal(terminal: Machine) -> None:
    publish(terminal, 0, 500)
    assert consumed(terminal, 500) == numbers(0, 500)


def test_installing_again_changes_nothing(terminal: Machine) -> None:
    before = {unit: terminal.shown(unit, "MainPID") for unit, _ in BOTH}
    for role, more in (
        ("pos", ("--id", "store-3", "--parent", f"https://{ROOT_PIPE}")),
        ("local", ("--id", "till-17")),
    ):
        said = terminal.run("edgebroker", "install", "--role", role, *more, "--start")
        assert said == ""
    assert before == {unit: terminal.shown(unit, "MainPID") for unit, _ in BOTH}


def test_local_changes_are_kept(terminal: Machine) -> None:
    config = terminal.file("/etc/edgebroker/local.toml")
    config.write_text(config.read_text() + "# changed by the store's technician\n")
    changed = config.read_text()
    said = terminal.run("edgebroker", "install", "--role", "local", "--id", "till-17", "--region", "north", codes=(1,))
    assert "it was edited by hand; the new version goes to local.toml.new" in said
    assert config.read_text() == changed
    assert 'region = "north"' in terminal.file("/etc/edgebroker/local.toml.new").read_text()


# ---- how it is ----


def test_the_units_are_tight_and_as_configured(terminal: Machine) -> None:
    for role, (unit, _) in zip(("pos", "local"), BOTH, strict=True):
        said = terminal.run("systemd-analyze", "--no-pager", "security", unit)
        exposure = float(said.rstrip().splitlines()[-1].split(":")[1].split()[0])
        assert exposure <= MOST_EXPOSED, said
        assert not terminal.run("systemd-analyze", "verify", unit).strip()
        limits = (terminal.root.parent / "root" / f"etc/systemd/system/{unit}.d/10-limits.conf").read_text()
        assert limits == (builds.ROOT / "systemd" / f"{LIMITS[role]}.conf").read_text()
        wanted = dict(line.split("=") for line in limits.splitlines() if line.startswith(("Memory", "Limit")))
        assert terminal.shown(unit, "LimitNOFILE") == wanted["LimitNOFILE"]
        for name in ("MemoryHigh", "MemoryMax"):
            assert int(terminal.shown(unit, name)) == int(wanted[name].rstrip("M")) << 20
        assert terminal.shown(unit, "WatchdogUSec") == "30s"
        pid = processes(terminal, unit)[-1]
        limit = terminal.run("grep", "open files", f"/proc/{pid}/limits").split()[3:5]
        assert limit == [wanted["LimitNOFILE"]] * 2
        assert terminal.run("stat", "-c", "%U", f"/proc/{pid}").strip() == "edgebroker"


def test_one_screen_says_how_it_is(terminal: Machine) -> None:
    said = terminal.run("edgebroker", "status", "--admin", LOCAL)
    assert said.startswith("HEALTHY: till-17 (local)")
    assert f"parent    store-3 at {POS_PIPE}, connected" in said
    assert "prices" in said
    assert "labels" in said
    assert terminal.run("edgebroker", "check", "live", "--admin", LOCAL).startswith("EDGEBROKER LIVE OK")
    assert terminal.run("edgebroker", "check", "ready", "--admin", LOCAL).startswith("EDGEBROKER READY OK")
    assert "'labels'=0s" in terminal.run("edgebroker", "check", "lag", "--admin", LOCAL)


def test_the_journal_has_fields_and_the_words_of_systemd(terminal: Machine) -> None:
    lines = [json.loads(line) for line in terminal.journal("-u", "edgebroker@local", "-o", "json").splitlines()]
    ours = [line for line in lines if "EB_NODE" in line]
    assert ours
    assert {line["EB_NODE"] for line in ours} == {"till-17"}
    assert "store-3" in terminal.run("systemctl", "status", "edgebroker@local", "--no-pager")


def test_a_reload_is_taken_and_says_what_it_cannot(terminal: Machine) -> None:
    config = terminal.file("/etc/edgebroker/local.toml")
    text = config.read_text()
    main = terminal.shown(LOCAL_UNIT, "MainPID")
    config.write_text(text.replace("[log]\n", '[log]\nlevel = "debug"\n').replace(":7430", ":7439"))
    terminal.run("systemctl", "reload", "edgebroker@local")
    terminal.wait_for("journalctl", "-u", "edgebroker@local", "--no-pager", has="listen.tcp")
    config.write_text(text)
    terminal.run("systemctl", "reload", "edgebroker@local")
    assert terminal.shown(LOCAL_UNIT, "MainPID") == main


def test_a_real_prometheus_scrapes_it(terminal: Machine, tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n- job_name: edgebroker\n  scrape_interval: 1s\n  static_configs:\n"
        f"  - targets: ['{POS}', '{LOCAL}']\n"
    )
    command = ("prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}")
    with (tmp_path / "log").open("wb") as log:
        prometheus = subprocess.Popen(
            terminal.beside(*command, "--web.listen-address=127.0.0.1:9090"), stdout=log, stderr=log
        )
    try:
        asked = "edgebroker_consumer_lag_seconds{group='labels'}"
        wait_for(lambda: len(query(terminal, asked)) == 1, f"Prometheus knows {asked}", 60.0)
        for name in ("up", "edgebroker_pipe_parent_up", "edgebroker_ready"):
            wait_for(lambda asked=name: values(terminal, asked) == {POS: "1", LOCAL: "1"}, f"{name} is 1 at both", 30.0)
        info = query(terminal, "edgebroker_build_info")
        assert {one["metric"]["version"] for one in info} == {__version__}
    finally:
        prometheus.terminate()
        prometheus.wait(30)


def values(terminal: Machine, name: str) -> dict[str, str]:
    return {one["metric"]["instance"]: one["value"][1] for one in query(terminal, name)}


def query(terminal: Machine, expression: str) -> list[dict[str, dict[str, str]]]:
    script = (
        "import json,sys,urllib.parse,urllib.request as u\n"
        "try: print(u.urlopen('http://127.0.0.1:9090/api/v1/query?query='+urllib.parse.quote(sys.argv[1])).read().decode())\n"
        "except OSError: print(json.dumps({'data': {'result': []}}))"
    )
    done = subprocess.run(
        terminal.beside("python3", "-c", script, expression), capture_output=True, text=True, check=True, timeout=30
    )
    found: list[dict[str, dict[str, str]]] = json.loads(done.stdout)["data"]["result"]
    return found


# ---- what happens to terminals ----


def test_a_killed_process_comes_back_and_leaves_nothing_behind(terminal: Machine) -> None:
    for victim in (0, -1):  # the loader, then the program itself
        unit = LOCAL_UNIT
        before = processes(terminal, unit)
        terminal.run("kill", "-KILL", str(before[victim]))
        wait_gone(terminal, unit, before)
        terminal.wait_active(unit)
    publish(terminal, 500, 100)
    assert consumed(terminal, 100) == numbers(500, 100)
    left = [path.name for path in terminal.file("/var/cache/edgebroker-local").iterdir()]
    assert len([name for name in left if name.startswith("_MEI")]) == 1, left


def wait_gone(terminal: Machine, unit: str, before: list[int]) -> None:
    wait_for(lambda: not set(before) & set(processes(terminal, unit)), f"the old processes of {unit} are gone", 60.0)


def test_a_loop_that_stands_still_is_started_again(terminal: Machine) -> None:
    """A shorter watchdog than the shipped one, so that nobody has to wait."""
    unit = LOCAL_UNIT
    dropin = "[Service]\nWatchdogSec=4\n"
    terminal.run("sh", "-c", f"cat > /etc/systemd/system/{unit}.d/50-watchdog.conf", text=dropin)
    terminal.run("systemctl", "daemon-reload")
    terminal.run("systemctl", "restart", unit)
    before = processes(terminal, unit)
    terminal.run("kill", "-STOP", str(before[-1]))
    wait_gone(terminal, unit, before)
    terminal.wait_active(unit)
    assert "Watchdog timeout" in terminal.journal("-u", unit)
    (terminal.file("/etc/systemd/system") / f"{unit}.d/50-watchdog.conf").unlink()
    terminal.run("systemctl", "daemon-reload")
    terminal.run("systemctl", "restart", unit)
    publish(terminal, 600, 50)
    assert consumed(terminal, 50) == numbers(600, 50)


def test_a_full_disk_waits_and_goes_on(terminal: Machine) -> None:
    """LOCAL has a file system of its own here."""
    filler = terminal.file(f"{DISK}/somebody-elses-video")
    with filler.open("wb") as file:
        free = os.statvfs(filler.parent)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - (1 << 20))
    said = terminal.wait_for("edgebroker", "check", "ready", "--admin", LOCAL, has="CRITICAL")
    assert "disk_full" in said
    publish(terminal, 650, 2000)
    said = terminal.run("edgebroker", "status", "--admin", LOCAL, codes=(1,))
    assert said.startswith("NOT READY")
    assert "do: " in said
    assert terminal.run("edgebroker", "check", "live", "--admin", LOCAL).startswith("EDGEBROKER LIVE OK")
    filler.unlink()
    assert consumed(terminal, 2000) == numbers(650, 2000)
    terminal.wait_for("edgebroker", "check", "ready", "--admin", LOCAL, has="READY OK")


def test_a_store_without_its_line_stays_ready(terminal: Machine) -> None:
    terminal.run("systemctl", "kill", "--signal=STOP", "top")
    terminal.run("systemctl", "restart", "edgebroker")
    said = terminal.wait_for("edgebroker", "check", "ready", "--admin", POS, has="WARNING")
    assert "parent" in said
    assert terminal.run("edgebroker", "status", "--admin", POS).startswith("DEGRADED: store-3")
    assert consumed(terminal, 2650, group="newcomer") == numbers(0, 2650)
    terminal.run("systemctl", "kill", "--signal=CONT", "top")
    terminal.wait_for("edgebroker", "check", "ready", "--admin", POS, has="READY OK", seconds=120)


def test_the_machine_is_measured_on_one_page(terminal: Machine) -> None:
    terminal.run("edgebroker", "bench", "all", "--report", "/root/report.txt", "/var/tmp")
    page = terminal.file("/root/report.txt").read_text()
    assert "This disk syncs in" in page
    assert "durable single publishes a second" in page


def test_the_demonstration_runs_in_the_program(terminal: Machine) -> None:
    assert "everything holds" in terminal.run("edgebroker", "demo", "--rate", "10000")


def test_support_gets_what_it_needs(terminal: Machine) -> None:
    terminal.run("edgebroker", "support-bundle", "/root/bundle.tar.gz", "--admin", LOCAL)
    with tarfile.open(terminal.file("/root/bundle.tar.gz")) as bundle:
        names = {Path(name).name for name in bundle.getnames()}
    assert {"about.json", "journal.txt", "units.txt", "config-local.toml", "http-v1-node.json"} <= names


# ---- upgrades ----


def test_a_newer_release_is_taken_and_undone(terminal: Machine) -> None:
    program = builds.newer()
    terminal.copy(program, "/root/newer")
    said = terminal.run("edgebroker", "upgrade", "/root/newer", "--unsigned", "--sha256", "0" * 64, codes=(1,))
    assert "copy the file again" in said
    said = terminal.run("edgebroker", "upgrade", "/root/newer", "--unsigned", "--sha256", builds.digest_of(program))
    assert f"release {builds.NEWER}-" in said
    for _, admin in BOTH:
        assert f"edgebroker {builds.NEWER}" in terminal.run("edgebroker", "status", "--admin", admin)
    assert len(list(terminal.file("/opt/edgebroker/releases").iterdir())) == 2
    terminal.run("edgebroker", "upgrade", "--undo")
    assert f"edgebroker {__version__}" in terminal.run("edgebroker", "status", "--admin", LOCAL)
    publish(terminal, 2650, 10)
    assert consumed(terminal, 10) == numbers(2650, 10)


def test_a_release_that_does_not_come_up_is_rolled_back(terminal: Machine) -> None:
    program = builds.broken()
    terminal.copy(program, "/root/broken")
    said = terminal.run(
        "edgebroker",
        "upgrade",
        "/root/broken",
        "--unsigned",
        "--sha256",
        builds.digest_of(program),
        "--timeout",
        "15",
        codes=(1,),
    )
    assert "rolled back" in said
    for unit, admin in BOTH:
        assert terminal.shown(unit, "ActiveState") == "active"
        assert f"edgebroker {__version__}" in terminal.run("edgebroker", "status", "--admin", admin)
    kept = {path.name.partition("-")[0] for path in terminal.file("/opt/edgebroker/releases").iterdir()}
    assert kept == {__version__, builds.NEWER}, "the release that was no good is gone"
    publish(terminal, 2660, 10)
    assert consumed(terminal, 10) == numbers(2660, 10)


def test_an_upgrade_that_the_power_ends_is_finished_at_the_next_boot(terminal: Machine) -> None:
    """The machine comes back with a release that does not work, and nobody is there."""
    digest = builds.digest_of(builds.broken())
    upgrade = subprocess.Popen(
        terminal.inside("edgebroker", "upgrade", "/root/broken", "--unsigned", "--sha256", digest)
    )
    current = terminal.root / "opt/edgebroker/current"
    wait_for(lambda: builds.BROKEN in os.readlink(current), "the link is switched", 60.0)
    terminal.cut_power()
    upgrade.wait()
    assert builds.BROKEN in os.readlink(current)
    terminal.boot()
    terminal.wait_for("readlink", "/opt/edgebroker/current", has=__version__, seconds=120)
    for unit, _ in BOTH:
        terminal.wait_active(unit)
    wait_for(lambda: not terminal.file("/opt/edgebroker/pending").exists(), "nothing is pending", 60.0)
    assert "rolled back" in terminal.journal("-u", "edgebroker-upgrade")


# ---- power ----


def test_after_a_power_off_it_comes_back_by_itself_on_a_read_only_root(terminal: Machine) -> None:
    terminal.power_off()
    terminal.boot(read_only=True)
    terminal.run("mount", "-o", "remount,noexec", "/tmp")
    assert "noexec" in terminal.run("findmnt", "-no", "OPTIONS", "/tmp")
    for unit, _ in BOTH:
        terminal.wait_active(unit)
        terminal.run("systemctl", "restart", unit)
        assert terminal.shown(unit, "ActiveState") == "active"
    assert "Read-only file system" in terminal.run("touch", "/etc/probe", codes=(1,))
    assert consumed(terminal, 2670, group="after") == numbers(0, 2670)


def test_after_a_power_cut_nothing_is_lost(terminal: Machine) -> None:
    terminal.cut_power()
    terminal.boot()
    for unit, _ in BOTH:
        terminal.wait_active(unit)
    assert consumed(terminal, 2670, group="cut") == numbers(0, 2670)


# ---- the end ----


def test_a_stop_is_clean_and_quick(terminal: Machine) -> None:
    for unit, _ in reversed(BOTH):
        terminal.run("systemctl", "stop", unit)
        assert terminal.shown(unit, "Result") == "success"
        assert terminal.shown(unit, "ExecMainStatus") == "0"


def test_a_node_that_starts_again_and_again_can_be_uninstalled(terminal: Machine) -> None:
    config = terminal.file("/etc/edgebroker/local.toml")
    config.write_text(config.read_text().replace(":7430", ":7420"))
    terminal.run("systemctl", "start", POS_UNIT)
    terminal.run("systemctl", "start", "--no-block", LOCAL_UNIT)
    wait_for(lambda: terminal.shown(LOCAL_UNIT, "NRestarts") not in ("", "0"), "it is started again", 30.0)
    terminal.run("edgebroker", "uninstall", "--instance", "local")
    assert terminal.shown(LOCAL_UNIT, "ActiveState") == "inactive"


def test_uninstalling_keeps_the_data_unless_told(terminal: Machine) -> None:
    assert terminal.file(f"{DISK}/topics").is_dir()
    assert terminal.file("/etc/edgebroker/local.toml").exists()
    assert "add --yes" in terminal.run("edgebroker", "uninstall", "--purge", codes=(2,))
    assert terminal.file("/var/lib/edgebroker/topics").is_dir()
    terminal.run("edgebroker", "uninstall", "--purge", "--yes")
    for path in ("/var/lib/edgebroker", "/opt/edgebroker", "/etc/edgebroker/edgebroker.toml"):
        assert not terminal.file(path).exists(), path
    assert not terminal.file("/usr/local/bin/edgebroker").exists()
