"""`edgebroker install` and `uninstall`: from a copied binary to a service, and back.

    the program -> /opt/edgebroker/releases, its configuration -> /etc/edgebroker, its unit -> /etc/systemd/system

Another run changes only what differs, keeps the settings that it is not given, and never overwrites a file that was
edited by hand. The first node of a machine is edgebroker.service; a second one (LOCAL beside POS) is
edgebroker@local.service, with its own ports and data directory.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import tomli

from edgebroker.cli.appliance import releases
from edgebroker.cli.appliance.host import USER, Machine, point, readable_errors
from edgebroker.cli.config_file import commented_file
from edgebroker.cli.token_argument import read_token
from edgebroker.common.config import is_address, load_config, split_list
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.levels import LEVELS
from edgebroker.common.runtime.text_file import read_text
from edgebroker.trust.token import parse_token
from edgebroker.version import __version__

UNITS, COMMAND = "etc/systemd/system", "usr/local/bin/edgebroker"
WANTS, LIMITS_FILE = f"{UNITS}/multi-user.target.wants", "10-limits.conf"
RESUME = "edgebroker-upgrade.service"
SHIPPED_UNITS = ("edgebroker.service", "edgebroker@.service", RESUME)
SYSUSERS, TMPFILES = "etc/sysusers.d/edgebroker.conf", "etc/tmpfiles.d/edgebroker.conf"
# Not the cache directory of the service: it is emptied at each start, also while `edgebroker upgrade` runs.
WRAPPER = f"""#!/bin/sh
# The one-file form unpacks itself at every start, and /tmp may be noexec.
TMPDIR=${{TMPDIR:-/var/tmp}} exec /{releases.CURRENT}/edgebroker "$@"
"""
FIRST_PORT, FURTHER_PORT, PORT_STEP = 7420, 7430, 10
DEFAULT_PARENT_PORT = 7422
LIMITS = {"local": "local", "pos": "pos", "l3": "hub", "l2": "hub", "root": "hub"}
# For small, worn disks: many records share a sync, and segments are sealed early.
TERMINAL = {"storage.commit_interval_ms": 10, "storage.segment_bytes": 16 << 20}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
Values = dict[str, object]  # of a configuration, "section.key" -> value


class InstallPaths(NamedTuple):
    """The unit, files and directories of a node of this machine. Instance "" is edgebroker.service."""

    instance: str

    @property
    def unit(self) -> str:
        return f"edgebroker@{self.instance}.service" if self.instance else "edgebroker.service"

    @property
    def template(self) -> str:
        return "edgebroker@.service" if self.instance else "edgebroker.service"

    @property
    def limits(self) -> str:
        return f"{UNITS}/{self.unit}.d/{LIMITS_FILE}"

    @property
    def config(self) -> str:
        return f"etc/edgebroker/{self.instance or 'edgebroker'}.toml"

    @property
    def token(self) -> str:
        """A token to join with; the unit takes it to the node, and destroys this file."""
        return f"etc/edgebroker/{self.instance or 'edgebroker'}.token"

    @property
    def name(self) -> str:
        """Of its directories below /var/lib, /var/cache and /run."""
        return f"edgebroker-{self.instance}" if self.instance else "edgebroker"

    @property
    def data(self) -> str:
        return f"/var/lib/{self.name}"


def install(options: argparse.Namespace) -> int:
    machine = Machine(Path(options.root), options.dry_run)
    machine.check()
    if not machine.root.is_dir():
        raise ConfigError(f"--root {machine.root}: no such directory")
    if options.start and not machine.real:
        raise ConfigError("--start needs the running system (--root /); an image starts its nodes when it boots")
    with readable_errors():
        if options.refresh:
            return _refresh(machine)
        if not options.role:
            raise ConfigError("--role is required: root, l2, l3, pos or local")
        token = str(parse_token(read_token(options.token))) if options.token else ""
        paths = _chosen_node(machine, options)
        known = _configured(machine, paths)
        values = _values(machine, paths, known, options)
        _program(machine)
        _user(machine)
        _units(machine)
        machine.write(paths.limits, shipped(f"{LIMITS[options.role]}.conf"))
        if values != known:
            # The default file of the package is no one's decision and may be overwritten.
            over = known == _defaults(paths)
            machine.write(paths.config, commented_file(values), 0o640, over=over)
        if token:
            machine.secret(paths.token, token)
        machine.link(f"{WANTS}/{paths.unit}", f"{_unit_home(machine)}/{paths.template}")
        if (
            machine.changed
            or machine.ask("systemctl", "show", paths.unit, "-p", "NeedDaemonReload", "--value") == "yes"
        ):
            machine.run("systemctl", "daemon-reload")
        _start(machine, paths, options.start)
        if machine.changed and not machine.dry:
            _print_next_steps(paths, values)
        if paths.config in machine.kept:
            raise EdgeBrokerError(
                f"/{paths.config} was edited by hand and is unchanged; merge /{paths.config}.new into it"
            )
    return 0


def _chosen_node(machine: Machine, options: argparse.Namespace) -> InstallPaths:
    """The node of --instance, else the first one of this machine, or one of this role beside it."""
    if options.instance:
        return _instance(options.instance)
    first = InstallPaths("")
    level = _level(machine, first)
    if first not in nodes(machine) or level == options.role:
        return first
    paths = InstallPaths(options.role)
    if paths not in nodes(machine):
        machine.say(
            f"install {paths.unit} beside {first.unit}, whose role is {level} (edit /{first.config} to change it)"
        )
    return paths


def _level(machine: Machine, paths: InstallPaths) -> str:
    return str(_configured(machine, paths).get("node.level", "root"))


def _instance(name: str) -> InstallPaths:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name) or name == "edgebroker":
        raise ConfigError(f"--instance {name}: use lower-case letters, digits and -, and not edgebroker")
    return InstallPaths(name)


def _configured(machine: Machine, paths: InstallPaths) -> Values:
    """The keys that the file of a node sets; none when there is no file."""
    path = machine.path(paths.config)
    if not path.is_file():
        return {}
    try:
        tables = tomli.loads(read_text(path))
        return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    except (tomli.TOMLDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be parsed: {error}; correct it, then install again") from error


def _defaults(paths: InstallPaths) -> Values:
    """The keys that the default file of the package sets."""
    return {"node.data_dir": paths.data}


def _values(machine: Machine, paths: InstallPaths, known: Values, options: argparse.Namespace) -> Values:
    """The configuration: from flags, else the file, else by role. Raises ConfigError when a node would reject it."""
    given: Values = {"node.level": options.role}
    for key, value in (
        ("node.name", options.id),
        ("node.region", options.region),
        ("node.labels", options.labels),
        ("trust.fleet", options.fleet),
        ("pipe.parents", ",".join(_address("--parent", parent) for parent in options.parent)),
        ("pipe.registry", ",".join(_address("--registry", one) for one in split_list(options.registry))),
    ):
        if value:
            given[key] = value
    host, port = _host(options.bind or "127.0.0.1"), _port(machine, paths, known)
    listen: Values = {"listen.tcp": f"{host}:{port}", "listen.http": f"127.0.0.1:{port + 1}"}
    if options.role != "local":
        listen["listen.pipe"] = f"{host}:{port + 2}"
    if options.bind:
        given.update(listen)
    fitting: Values = {"node.data_dir": paths.data, "trust.token_file": f"{paths.data}/token", **listen}
    if paths.instance:
        fitting["node.name"] = f"%H-{paths.instance}"  # valid in clones of an image, too
        if not options.registry and "pipe.registry" not in known:
            fitting.update(_parent_on_this_machine(machine, options.role))
    if options.role == "root":
        fitting["registry.enabled"] = True
    if options.role in ("local", "pos"):
        fitting.update(TERMINAL)
    values = {**fitting, **known, **given}
    load_config(None, values, environment={})
    return values


def _parent_on_this_machine(machine: Machine, role: str) -> Values:
    """The first node of this machine as the parent, when its level is above."""
    first = InstallPaths("")
    if first not in nodes(machine) or LEVELS.index(_level(machine, first)) >= LEVELS.index(role):
        return {}
    pipe = _configured(machine, first).get("listen.pipe")
    return {"pipe.parents": _reached(str(pipe))} if pipe else {}


def _host(text: str) -> str:
    """The address of --bind as it is written before a port."""
    bare = text.removeprefix("[").removesuffix("]")
    try:
        return f"[{bare}]" if ipaddress.ip_address(bare).version == 6 else bare
    except ValueError:
        if _HOST.fullmatch(text) and not re.fullmatch(r"[\d.]+", text):
            return text
    raise ConfigError(f"--bind {text}: not an IP address or host name; give it without a port")


def _port(machine: Machine, paths: InstallPaths, known: Values) -> int:
    """The port for clients: as configured, else one that no other node of this machine uses."""
    configured = str(known.get("listen.tcp", "")).rpartition(":")[2]
    if configured.isdigit():
        return int(configured)
    return _free_port(machine, paths) if paths.instance else FIRST_PORT


def _free_port(machine: Machine, paths: InstallPaths) -> int:
    """The first of three consecutive ports that no other node of this machine uses."""
    others = [path.stem for path in machine.path("etc/edgebroker").glob("*.toml") if path.stem != paths.instance]
    taken = [
        str(_configured(machine, InstallPaths("" if name == "edgebroker" else name)).get("listen.tcp"))
        for name in others
    ]
    port = FURTHER_PORT
    while any(address.endswith(f":{port}") for address in taken):
        port += PORT_STEP
    return port


def _reached(address: str) -> str:
    """The address at which a client on this machine reaches a listener."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _address(flag: str, text: str) -> str:
    """HOST:PORT of https://HOST:PORT/, HOST:PORT or HOST. Whether there is TLS is not said here: a fleet has it."""
    scheme, slashes, rest = text.rpartition("://")
    if slashes and scheme not in ("http", "https"):
        raise ConfigError(f"{flag} {text}: not https://HOST:PORT or HOST:PORT")
    found = rest.rstrip("/")
    if not re.search(r":\d+$", found):
        found += f":{DEFAULT_PARENT_PORT}"
    host = found.rpartition(":")[0]
    named = _HOST.fullmatch(host) or re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host)
    if not (named and is_address(found)):
        raise ConfigError(f"{flag} {text}: not https://HOST:PORT or HOST:PORT")
    return found


# ---- shared by all nodes of a machine ----


def _program(machine: Machine) -> None:
    """Install this program, unless it is there. Another release is left to `upgrade`, which can roll back."""
    program = releases.own_program()
    if releases.packaged():
        if machine.path(releases.CURRENT).exists():
            raise ConfigError(f"a release without a package is installed; first run /{COMMAND} uninstall for each node")
        return
    if machine.path(f"{releases.PACKAGED}/{releases.PROGRAM}").exists():
        raise ConfigError("the edgebroker package is installed; run /usr/bin/edgebroker install, or remove the package")
    running = releases.current(machine)
    if not running:
        with releases.staged(machine, program) as copy:
            release = releases.keep(machine, copy, __version__)
        if not machine.dry:
            point(machine.path(releases.CURRENT), f"releases/{release}")
        machine.changed = True
    elif running != releases.name_of(program, __version__):
        raise ConfigError(
            f"release {running} is installed, and this program is a different one; run: "
            f"edgebroker upgrade {program} --sha256 {releases.digest_of(program)}"
        )
    machine.write(COMMAND, WRAPPER, 0o755)


def _user(machine: Machine) -> None:
    if releases.packaged():
        return  # the package created it
    machine.write(SYSUSERS, shipped("edgebroker.sysusers"))
    machine.write(TMPFILES, shipped("edgebroker.tmpfiles"))
    if machine.ask("id", "-u", USER):
        return
    if machine.ask("systemd-sysusers", "--version"):
        machine.run("systemd-sysusers", f"/{SYSUSERS}")
    else:
        machine.run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)


def _units(machine: Machine) -> None:
    if releases.packaged():
        return
    for name in SHIPPED_UNITS:
        text = shipped(name).replace("ExecStart=/usr/bin/edgebroker ", f"ExecStart=/{releases.CURRENT}/edgebroker ")
        machine.write(f"{UNITS}/{name}", text)
    machine.link(f"{WANTS}/{RESUME}", f"/{UNITS}/{RESUME}")


def _unit_home(machine: Machine) -> str:
    return "/usr/lib/systemd/system" if releases.packaged() else f"/{UNITS}"


def shipped(name: str) -> str:
    """The text of a file of systemd/, from the frozen program or from the source tree."""
    bundle = getattr(sys, "_MEIPASS", None)
    base = Path(bundle) if bundle else Path(__file__).parents[3]
    return (base / "systemd" / name).read_text()


def nodes(machine: Machine) -> list[InstallPaths]:
    """The nodes that are installed on a machine, edgebroker.service first."""
    found = machine.path(UNITS).glob(f"edgebroker*.service.d/{LIMITS_FILE}")
    names = [path.parent.name.removesuffix(".service.d").removeprefix("edgebroker").removeprefix("@") for path in found]
    return [paths for paths in map(InstallPaths, sorted(names)) if machine.wrote(paths.limits)]


def _refresh(machine: Machine) -> int:
    """Update units and limits to those of this release, after an upgrade."""
    if not releases.packaged() and releases.current(machine) != releases.name_of(releases.own_program(), __version__):
        raise ConfigError("--refresh must be run by the release that is installed; this is another one")
    try:
        _user(machine)
        _units(machine)
        for paths in nodes(machine):
            try:
                machine.write(paths.limits, shipped(f"{LIMITS[_level(machine, paths)]}.conf"))
            except (ConfigError, KeyError) as error:
                machine.say(f"keep the limits of {paths.unit}: {error}")
    finally:
        if machine.changed:
            machine.run("systemctl", "daemon-reload")
    return 0


def _start(machine: Machine, paths: InstallPaths, wanted: bool) -> None:
    """Start the node, or restart it when its configuration, limits or unit are newer than its process."""
    started = _started(machine, paths)
    if started is None:
        if wanted:
            machine.run("systemctl", "start", paths.unit)
        return
    names = (paths.config, paths.limits, f"{UNITS}/{paths.template}")
    if started < max(
        (machine.path(name).stat().st_mtime for name in names if machine.path(name).exists()), default=0.0
    ):
        if wanted:
            machine.run("systemctl", "restart", paths.unit)
        else:
            machine.say(
                f"leave {paths.unit} running with the old settings; apply them with: systemctl restart {paths.unit}"
            )


def _started(machine: Machine, paths: InstallPaths) -> float | None:
    """When the process of a node was started, in seconds since 1970; None when it does not run."""
    output = machine.ask(
        "systemctl", "show", paths.unit, "-p", "MainPID", "-p", "ExecMainStartTimestamp", "--timestamp=us+utc"
    )
    found = dict(line.partition("=")[::2] for line in output.splitlines())
    if found.get("MainPID", "0") == "0":
        return None
    try:
        when = datetime.strptime(found["ExecMainStartTimestamp"], "%a %Y-%m-%d %H:%M:%S.%f UTC")
    except (KeyError, ValueError):
        return 0.0  # another format of systemd: rather restart once too often
    return when.replace(tzinfo=UTC).timestamp()


def _print_next_steps(paths: InstallPaths, values: Values) -> None:
    name, admin = paths.unit.removesuffix(".service"), _reached(str(values["listen.http"]))
    print(f"\ninstalled:  {name}, configured in /{paths.config}, data in {values['node.data_dir']}")
    print(f"start it:   systemctl start {name}")
    print(f"status:     edgebroker status{'' if admin == '127.0.0.1:7421' else f' --admin {admin}'}")
    print(f"log:        journalctl -u {name}")
    if pipe := values.get("listen.pipe"):
        print(f"children:   edgebroker install --parent https://THIS-MACHINE:{str(pipe).rpartition(':')[2]} ...")
    if values["node.level"] != "root" and not values.get("pipe.parents") and not values.get("pipe.registry"):
        print("It has no parent and replicates nothing; add one with --parent URL or --registry URL.")


# ---- uninstall ----


def uninstall(options: argparse.Namespace) -> int:
    machine = Machine(Path(options.root), options.dry_run)
    machine.check()
    paths = _instance(options.instance) if options.instance else InstallPaths("")
    if options.purge and not (options.yes or options.dry_run):
        raise ConfigError("--purge deletes all data of the node and cannot be undone; add --yes to confirm")
    if (
        paths not in nodes(machine)
        and not machine.path(paths.config).exists()
        and not machine.path(paths.data[1:]).exists()
    ):
        raise ConfigError(f"{paths.unit} is not installed on this machine")
    with readable_errors():
        if machine.ask("systemctl", "show", paths.unit, "-p", "LoadState", "--value") == "loaded":
            machine.run("systemctl", "stop", paths.unit)  # ends a restart loop, too
            machine.ask("systemctl", "reset-failed", paths.unit)
        machine.remove(f"{WANTS}/{paths.unit}")
        machine.remove(paths.limits)
        others = [node for node in nodes(machine) if node != paths]
        if options.purge:
            for name in (paths.data[1:], f"var/cache/{paths.name}", paths.config, f"{paths.config}.new"):
                machine.discard(name)
        if not others and not releases.packaged():
            _remove_program(machine)
        machine.run("systemctl", "daemon-reload")
    if not options.purge:
        machine.say(f"keep {paths.data} and /{paths.config} (uninstall --purge --yes deletes them)")
    return 0


def _remove_program(machine: Machine) -> None:
    machine.remove(f"{WANTS}/{RESUME}")
    for name in (*(f"{UNITS}/{unit}" for unit in SHIPPED_UNITS), SYSUSERS, TMPFILES, COMMAND):
        machine.remove(name)
    machine.discard(releases.HOME)
