"""`edgebroker install` and `uninstall`: from a copied binary to a service, and back.

    the program -> /opt/edgebroker/releases, its configuration -> /etc/edgebroker, its unit -> /etc/systemd/system

Run again it changes only what is different, and nothing that somebody has changed by hand. The first node of a machine
is edgebroker.service; a second one (LOCAL beside POS) is edgebroker@local.service, with ports and a directory of its
own.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import tomli

from edgebroker.cli import releases
from edgebroker.cli.configure import commented_file
from edgebroker.cli.machine import USER, Machine
from edgebroker.common.config import is_address, is_loopback, load_config, split_list
from edgebroker.common.errors import ConfigError
from edgebroker.version import __version__

UNITS, COMMAND = "etc/systemd/system", "usr/local/bin/edgebroker"
# Not the directory of the service: that is swept when it starts, also while `edgebroker upgrade` restarts it.
WRAPPER = f"""#!/bin/sh
# The one-file form unpacks itself at every start; /tmp may be noexec.
TMPDIR=${{TMPDIR:-/var/tmp}} exec /{releases.CURRENT}/edgebroker "$@"
"""
FIRST_PORTS, FURTHER_PORTS = (7420, 7421), (7430, 7431)
DEFAULT_PARENT_PORT = 7421
LIMITS = {"local": "local", "pos": "pos", "l3": "hub", "l2": "hub", "root": "hub"}
# Small, worn disks: many records share a sync, a segment is soon sealed.
TERMINAL = {"storage.commit_interval_ms": 10, "storage.segment_bytes": 16 << 20}


class Place(NamedTuple):
    """Where a node of this machine has its things. `instance` "" is edgebroker.service."""

    instance: str

    @property
    def unit(self) -> str:
        return f"edgebroker@{self.instance}.service" if self.instance else "edgebroker.service"

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

    @property
    def defaults(self) -> str:
        """The configuration that the package lays there; nobody has decided anything by it."""
        return commented_file({"node.data_dir": self.data})


def install(options: argparse.Namespace) -> int:
    machine = Machine(Path(options.root), options.dry_run)
    machine.check()
    place = _place(machine, options)
    config = _configuration(machine, place, options)
    program = releases.own_program()
    if not releases.packaged():
        releases.switch(machine, releases.put(machine, program, __version__))
        machine.write(COMMAND, WRAPPER, 0o755)
    _user(machine)
    _units(machine)
    machine.write(f"{UNITS}/{place.unit}.d/10-limits.conf", shipped(f"{LIMITS[options.role]}.conf"))
    machine.write(place.config, config, 0o640, pristine=place.defaults)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", place.unit)
    if options.start:
        machine.run("systemctl", "start", place.unit)
    if not machine.dry:
        _farewell(place, options.start)
    return 0


def _place(machine: Machine, options: argparse.Namespace) -> Place:
    """The node meant: named by --instance, or else the first of this machine, or the one of this role beside it."""
    if options.instance:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", options.instance):
            raise ConfigError(f"--instance {options.instance}: lower-case letters, digits and - are allowed")
        return Place(options.instance)
    level = _level_of(machine, Place(""))
    return Place("" if level in ("", options.role) else options.role)


def _level_of(machine: Machine, place: Place) -> str:
    """The configured level of a node of this machine; "" when none is configured."""
    found = _section(machine, place, "node")
    return str(found.get("level", "root")) if found is not None else ""


def _section(machine: Machine, place: Place, name: str) -> dict[str, object] | None:
    path = machine.path(place.config)
    if not path.is_file() or (text := path.read_text()) == place.defaults:
        return None
    try:
        found: dict[str, object] = tomli.loads(text).get(name, {})
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}; correct it, then install again") from error
    return found


def _configuration(machine: Machine, place: Place, options: argparse.Namespace) -> str:
    """The text of the configuration: what the running code has checked."""
    tcp, http = FURTHER_PORTS if place.instance else FIRST_PORTS
    host = options.bind or "127.0.0.1"
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    parents = [_address("--parent", parent) for parent in options.parent]
    if place.instance and not parents and not options.registry:
        beside = _section(machine, Place(""), "listen") or {}
        parents = [str(beside.get("http", f"127.0.0.1:{DEFAULT_PARENT_PORT}")).replace("0.0.0.0", "127.0.0.1")]
    name = options.id or (f"{socket.gethostname()}-{place.instance}" if place.instance else socket.gethostname())
    values: dict[str, object] = {
        "node.name": name,
        "node.level": options.role,
        "node.data_dir": place.data,
        "listen.tcp": f"{host}:{tcp}",
        "listen.http": f"{host}:{http}",
    }
    if not is_loopback(f"{host}:0"):
        values["listen.allow_insecure"] = True
    if parents:
        values["pipe.parents"] = ",".join(parents)
    if options.registry:
        values["pipe.registry"] = ",".join(_address("--registry", one) for one in split_list(options.registry))
    for key, value in (("node.region", options.region), ("node.labels", options.labels)):
        if value:
            values[key] = value
    if options.role == "root":
        values["registry.enabled"] = True
    if options.role in ("local", "pos"):
        values.update(TERMINAL)
    load_config(None, values, environment={})
    return commented_file(values)


def _address(flag: str, text: str) -> str:
    """HOST:PORT of http://HOST:PORT/, HOST:PORT or HOST."""
    scheme, slashes, rest = text.rpartition("://")
    if slashes and scheme != "http":
        raise ConfigError(f"{flag} {text}: only http:// is known to this release")
    found = rest.rstrip("/")
    if not re.search(r":\d+$", found):
        found += f":{DEFAULT_PARENT_PORT}"
    if not is_address(found):
        raise ConfigError(f"{flag} {text}: http://HOST:PORT or HOST:PORT is expected")
    return found


def _user(machine: Machine) -> None:
    machine.write("etc/sysusers.d/edgebroker.conf", shipped("edgebroker.sysusers"))
    if machine.ask("id", "-u", USER):
        return
    if machine.ask("systemd-sysusers", "--version"):
        machine.run("systemd-sysusers", "/etc/sysusers.d/edgebroker.conf")
    else:
        machine.run("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER)


def _units(machine: Machine) -> None:
    if releases.packaged():
        return  # they came with the package
    for name in ("edgebroker.service", "edgebroker@.service"):
        text = shipped(name).replace("ExecStart=/usr/bin/edgebroker ", f"ExecStart=/{releases.CURRENT}/edgebroker ")
        machine.write(f"{UNITS}/{name}", text)


def shipped(name: str) -> str:
    """A file of systemd/, as this release ships it: in the frozen program, or in the source tree."""
    bundle = getattr(sys, "_MEIPASS", None)
    base = Path(bundle) if bundle else Path(__file__).parent.parent.parent
    return (base / "systemd" / name).read_text()


def _farewell(place: Place, started: bool) -> None:
    name = place.unit.removesuffix(".service")
    print(f"\n{'running' if started else 'installed'}: {name}, configured in /{place.config}, data in {place.data}")
    if not started:
        print(f"start it:   systemctl start {name}")
    port = (FURTHER_PORTS if place.instance else FIRST_PORTS)[1]
    print(f"look at it: edgebroker status{f' --admin 127.0.0.1:{port}' if place.instance else ''}")
    print(f"its log:    journalctl -u {name}")


def uninstall(options: argparse.Namespace) -> int:
    machine = Machine(Path(options.root), options.dry_run)
    machine.check()
    if options.purge and not (options.yes or options.dry_run):
        raise ConfigError("--purge removes all data of the node for good; say --yes as well if that is meant")
    place = Place(options.instance)
    if machine.ask("systemctl", "is-enabled", place.unit) or machine.ask("systemctl", "is-active", place.unit):
        machine.run("systemctl", "disable", "--now", place.unit)
    machine.remove(f"{UNITS}/{place.unit}.d/10-limits.conf")
    if options.purge:
        for name in (place.data[1:], f"var/cache/{place.name}", place.config):
            machine.discard(name)
    others = [path for path in machine.path("etc/edgebroker").glob("*.toml") if path != machine.path(place.config)]
    if not others:
        for name in (f"{UNITS}/edgebroker.service", f"{UNITS}/edgebroker@.service", "etc/sysusers.d/edgebroker.conf"):
            machine.remove(name)
        machine.remove(COMMAND)
        machine.discard(releases.HOME)
    machine.run("systemctl", "daemon-reload")
    if not options.purge:
        machine.say(f"keep {place.data} and /{place.config} (uninstall --purge --yes removes them)")
    return 0
