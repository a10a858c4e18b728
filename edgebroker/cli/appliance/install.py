"""`edgebroker install` and `uninstall`: from a copied binary to a service, and back.

    the program -> /opt/edgebroker/releases, its configuration -> /etc/edgebroker, its unit -> /etc/systemd/system

Run again it changes only what is different, and nothing that somebody has changed by hand; what is not given stays as
it is configured. The first node of a machine is edgebroker.service; a second one (LOCAL beside POS) is
edgebroker@local.service, with ports and a directory of its own.
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
from edgebroker.cli.appliance.host import USER, Machine, plainly, point
from edgebroker.cli.config_file import commented_file
from edgebroker.common.config import is_address, is_loopback, load_config, split_list
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.pipe.follower import LEVELS
from edgebroker.version import __version__

UNITS, COMMAND = "etc/systemd/system", "usr/local/bin/edgebroker"
WANTS, LIMITS_FILE = f"{UNITS}/multi-user.target.wants", "10-limits.conf"
RESUME = "edgebroker-upgrade.service"
SHIPPED_UNITS = ("edgebroker.service", "edgebroker@.service", RESUME)
SYSUSERS, TMPFILES = "etc/sysusers.d/edgebroker.conf", "etc/tmpfiles.d/edgebroker.conf"
# Not the directory of the service: that is swept when it starts, also while `edgebroker upgrade` restarts it.
WRAPPER = f"""#!/bin/sh
# The one-file form unpacks itself at every start; /tmp may be noexec.
TMPDIR=${{TMPDIR:-/var/tmp}} exec /{releases.CURRENT}/edgebroker "$@"
"""
FIRST_PORT, FURTHER_PORT, PORT_STEP = 7420, 7430, 10
DEFAULT_PARENT_PORT = 7421
LIMITS = {"local": "local", "pos": "pos", "l3": "hub", "l2": "hub", "root": "hub"}
# Small, worn disks: many records share a sync, a segment is soon sealed.
TERMINAL = {"storage.commit_interval_ms": 10, "storage.segment_bytes": 16 << 20}
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
Values = dict[str, object]  # of a configuration, "section.key" -> value


class InstallPaths(NamedTuple):
    """Where a node of this machine has its things. `instance` "" is edgebroker.service."""

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
        raise ConfigError(f"--root {machine.root}: there is no such directory")
    if options.start and not machine.real:
        raise ConfigError("--start is for a running system; an image starts its nodes when it boots")
    with plainly():
        if options.refresh:
            return _refresh(machine)
        if not options.role:
            raise ConfigError("--role is missing: root, l2, l3, pos or local")
        place = _place(machine, options)
        known = _configured(machine, place)
        values = _values(machine, place, known, options)
        _program(machine)
        _user(machine)
        _units(machine)
        machine.write(place.limits, shipped(f"{LIMITS[options.role]}.conf"))
        if values != known:
            # What the package lays there has been decided by nobody.
            over = known == _defaults(place)
            machine.write(place.config, commented_file(values), 0o640, over=over)
        machine.link(f"{WANTS}/{place.unit}", f"{_unit_home(machine)}/{place.template}")
        if (
            machine.changed
            or machine.ask("systemctl", "show", place.unit, "-p", "NeedDaemonReload", "--value") == "yes"
        ):
            machine.run("systemctl", "daemon-reload")
        _start(machine, place, options.start)
        if machine.changed and not machine.dry:
            _farewell(place, values)
        if place.config in machine.kept:
            raise EdgeBrokerError(f"/{place.config} was changed here and stays as it is: put in by hand what is new")
    return 0


def _place(machine: Machine, options: argparse.Namespace) -> InstallPaths:
    """The node meant: named by --instance, or else the first of this machine, or the one of this role beside it."""
    if options.instance:
        return _instance(options.instance)
    first = InstallPaths("")
    level = _level(machine, first)
    if first not in nodes(machine) or level == options.role:
        return first
    place = InstallPaths(options.role)
    if place not in nodes(machine):
        machine.say(f"install {place.unit} beside {first.unit}, which is {level} (or edit /{first.config})")
    return place


def _level(machine: Machine, place: InstallPaths) -> str:
    return str(_configured(machine, place).get("node.level", "root"))


def _instance(name: str) -> InstallPaths:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name) or name == "edgebroker":
        raise ConfigError(f"--instance {name}: lower-case letters, digits and -, and not edgebroker")
    return InstallPaths(name)


def _configured(machine: Machine, place: InstallPaths) -> Values:
    """What a node's file sets; nothing when there is none."""
    path = machine.path(place.config)
    if not path.is_file():
        return {}
    try:
        tables = tomli.loads(path.read_text())
        return {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    except (tomli.TOMLDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} is no configuration: {error}; correct it, then install again") from error


def _defaults(place: InstallPaths) -> Values:
    """What the file of the package sets."""
    return {"node.data_dir": place.data}


def _values(machine: Machine, place: InstallPaths, known: Values, options: argparse.Namespace) -> Values:
    """The configuration: what is given, else what is configured, else what fits the role; checked as a node would."""
    given: Values = {"node.level": options.role}
    for key, value in (
        ("node.name", options.id),
        ("node.region", options.region),
        ("node.labels", options.labels),
        ("pipe.parents", ",".join(_address("--parent", parent) for parent in options.parent)),
        ("pipe.registry", ",".join(_address("--registry", one) for one in split_list(options.registry))),
    ):
        if value:
            given[key] = value
    host, port = _host(options.bind or "127.0.0.1"), _port(machine, place, known)
    listen: Values = {"listen.tcp": f"{host}:{port}", "listen.http": f"{host}:{port + 1}"}
    if options.bind:
        given.update(listen)
        if not is_loopback(f"{host}:0"):
            given["listen.allow_insecure"] = True
    fitting: Values = {"node.data_dir": place.data, **listen}
    if place.instance:
        fitting["node.name"] = f"%H-{place.instance}"  # also where an image is cloned
        if not options.registry and "pipe.registry" not in known:
            fitting.update(_fed_by_first(machine, options.role))
    if options.role == "root":
        fitting["registry.enabled"] = True
    if options.role in ("local", "pos"):
        fitting.update(TERMINAL)
    values = {**fitting, **known, **given}
    load_config(None, values, environment={})
    return values


def _fed_by_first(machine: Machine, role: str) -> Values:
    """The first node of this machine as the parent, where it stands above."""
    first = InstallPaths("")
    if first not in nodes(machine) or LEVELS.index(_level(machine, first)) >= LEVELS.index(role):
        return {}
    http = _configured(machine, first).get("listen.http", f"127.0.0.1:{DEFAULT_PARENT_PORT}")
    return {"pipe.parents": _reached(str(http))}


def _host(text: str) -> str:
    """What to listen on, as it stands before a port."""
    bare = text.removeprefix("[").removesuffix("]")
    try:
        return f"[{bare}]" if ipaddress.ip_address(bare).version == 6 else bare
    except ValueError:
        if _HOST.fullmatch(text) and not re.fullmatch(r"[\d.]+", text):
            return text
    raise ConfigError(f"--bind {text}: an IP address or a host name is expected, without a port")


def _port(machine: Machine, place: InstallPaths, known: Values) -> int:
    """The port of the binary protocol: as it is configured, else one that no other node of this machine has."""
    configured = str(known.get("listen.tcp", "")).rpartition(":")[2]
    if configured.isdigit():
        return int(configured)
    return _free_port(machine, place) if place.instance else FIRST_PORT


def _free_port(machine: Machine, place: InstallPaths) -> int:
    """The first port of a pair that no other node of this machine has."""
    others = [path.stem for path in machine.path("etc/edgebroker").glob("*.toml") if path.stem != place.instance]
    taken = [
        str(_configured(machine, InstallPaths("" if name == "edgebroker" else name)).get("listen.tcp"))
        for name in others
    ]
    port = FURTHER_PORT
    while any(address.endswith(f":{port}") for address in taken):
        port += PORT_STEP
    return port


def _reached(address: str) -> str:
    """A listening address as somebody on this machine calls it."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _address(flag: str, text: str) -> str:
    """HOST:PORT of http://HOST:PORT/, HOST:PORT or HOST."""
    scheme, slashes, rest = text.rpartition("://")
    if slashes and scheme != "http":
        raise ConfigError(f"{flag} {text}: only http:// is known to this release")
    found = rest.rstrip("/")
    if not re.search(r":\d+$", found):
        found += f":{DEFAULT_PARENT_PORT}"
    host = found.rpartition(":")[0]
    named = _HOST.fullmatch(host) or re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host)
    if not (named and is_address(found)):
        raise ConfigError(f"{flag} {text}: http://HOST:PORT or HOST:PORT is expected")
    return found


# ---- what belongs to all nodes of a machine ----


def _program(machine: Machine) -> None:
    """Put this program to its place, if there is none yet. Another one is a matter for `upgrade`, which judges it."""
    program = releases.own_program()
    if releases.packaged():
        if machine.path(releases.CURRENT).exists():
            raise ConfigError(f"the bare program is installed here as well: /{COMMAND} uninstall, for each node, first")
        return
    if machine.path(f"{releases.PACKAGED}/{releases.PROGRAM}").exists():
        raise ConfigError("the package is installed here: say /usr/bin/edgebroker install ..., or remove the package")
    running = releases.current(machine)
    if not running:
        with releases.staged(machine, program) as copy:
            release = releases.keep(machine, copy, __version__)
        if not machine.dry:
            point(machine.path(releases.CURRENT), f"releases/{release}")
        machine.changed = True
    elif running != releases.name_of(program, __version__):
        raise ConfigError(
            f"release {running} is installed here, and this program is another one: "
            f"edgebroker upgrade {program} --sha256 {releases.digest_of(program)}"
        )
    machine.write(COMMAND, WRAPPER, 0o755)


def _user(machine: Machine) -> None:
    if releases.packaged():
        return  # it came with the package
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
    """A file of systemd/, as this release ships it: in the frozen program, or in the source tree."""
    bundle = getattr(sys, "_MEIPASS", None)
    base = Path(bundle) if bundle else Path(__file__).parents[3]
    return (base / "systemd" / name).read_text()


def nodes(machine: Machine) -> list[InstallPaths]:
    """The nodes that are installed on a machine, the first one first."""
    found = machine.path(UNITS).glob(f"edgebroker*.service.d/{LIMITS_FILE}")
    names = [path.parent.name.removesuffix(".service.d").removeprefix("edgebroker").removeprefix("@") for path in found]
    return [place for place in map(InstallPaths, sorted(names)) if machine.wrote(place.limits)]


def _refresh(machine: Machine) -> int:
    """Bring units and limits to this release; after an upgrade."""
    if not releases.packaged() and releases.current(machine) != releases.name_of(releases.own_program(), __version__):
        raise ConfigError("this is not the release that is installed here")
    try:
        _user(machine)
        _units(machine)
        for place in nodes(machine):
            try:
                machine.write(place.limits, shipped(f"{LIMITS[_level(machine, place)]}.conf"))
            except (ConfigError, KeyError) as error:
                machine.say(f"leave the limits of {place.unit} as they are: {error}")
    finally:
        if machine.changed:
            machine.run("systemctl", "daemon-reload")
    return 0


def _start(machine: Machine, place: InstallPaths, wanted: bool) -> None:
    """Start it, or again if it runs with something older than what is installed."""
    started = _started(machine, place)
    if started is None:
        if wanted:
            machine.run("systemctl", "start", place.unit)
        return
    names = (place.config, place.limits, f"{UNITS}/{place.template}")
    if started < max(
        (machine.path(name).stat().st_mtime for name in names if machine.path(name).exists()), default=0.0
    ):
        if wanted:
            machine.run("systemctl", "restart", place.unit)
        else:
            machine.say(f"leave it running as it was until somebody says: systemctl restart {place.unit}")


def _started(machine: Machine, place: InstallPaths) -> float | None:
    """When the process was started that runs now, in seconds since 1970; None when there is none."""
    said = machine.ask(
        "systemctl", "show", place.unit, "-p", "MainPID", "-p", "ExecMainStartTimestamp", "--timestamp=us+utc"
    )
    found = dict(line.partition("=")[::2] for line in said.splitlines())
    if found.get("MainPID", "0") == "0":
        return None
    try:
        when = datetime.strptime(found["ExecMainStartTimestamp"], "%a %Y-%m-%d %H:%M:%S.%f UTC")
    except (KeyError, ValueError):
        return 0.0  # a systemd that says it otherwise: better once too often
    return when.replace(tzinfo=UTC).timestamp()


def _farewell(place: InstallPaths, values: Values) -> None:
    name, admin = place.unit.removesuffix(".service"), _reached(str(values["listen.http"]))
    print(f"\ninstalled:  {name}, configured in /{place.config}, data in {values['node.data_dir']}")
    print(f"start it:   systemctl start {name}")
    print(f"look at it: edgebroker status{'' if admin == '127.0.0.1:7421' else f' --admin {admin}'}")
    print(f"its log:    journalctl -u {name}")
    if values["node.level"] != "root" and not values.get("pipe.parents") and not values.get("pipe.registry"):
        print("it has no parent and keeps to itself: say --parent URL or --registry URL for one")


# ---- and back ----


def uninstall(options: argparse.Namespace) -> int:
    machine = Machine(Path(options.root), options.dry_run)
    machine.check()
    place = _instance(options.instance) if options.instance else InstallPaths("")
    if options.purge and not (options.yes or options.dry_run):
        raise ConfigError("--purge removes all data of the node for good; say --yes as well if that is meant")
    if (
        place not in nodes(machine)
        and not machine.path(place.config).exists()
        and not machine.path(place.data[1:]).exists()
    ):
        raise ConfigError(f"there is no node {place.unit} here")
    with plainly():
        if machine.ask("systemctl", "show", place.unit, "-p", "LoadState", "--value") == "loaded":
            machine.run("systemctl", "stop", place.unit)  # also one that starts again and again
            machine.ask("systemctl", "reset-failed", place.unit)
        machine.remove(f"{WANTS}/{place.unit}")
        machine.remove(place.limits)
        others = [node for node in nodes(machine) if node != place]
        if options.purge:
            for name in (place.data[1:], f"var/cache/{place.name}", place.config, f"{place.config}.new"):
                machine.discard(name)
        if not others and not releases.packaged():
            _remove_program(machine)
        machine.run("systemctl", "daemon-reload")
    if not options.purge:
        machine.say(f"keep {place.data} and /{place.config} (uninstall --purge --yes removes them)")
    return 0


def _remove_program(machine: Machine) -> None:
    machine.remove(f"{WANTS}/{RESUME}")
    for name in (*(f"{UNITS}/{unit}" for unit in SHIPPED_UNITS), SYSUSERS, TMPFILES, COMMAND):
        machine.remove(name)
    machine.discard(releases.HOME)
