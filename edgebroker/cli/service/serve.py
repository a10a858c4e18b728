"""`edgebroker serve`: a broker in the foreground until SIGTERM or SIGINT; SIGHUP reloads the configuration."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import signal
import sys
from pathlib import Path

from edgebroker.broker.broker import Broker
from edgebroker.cli import environment
from edgebroker.cli.service import journal
from edgebroker.cli.service.supervisor import Systemd
from edgebroker.common.config import Config, load_config, warnings
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.clock import Clock, SystemClock
from edgebroker.storage.log.staging import give_back_large
from edgebroker.trust.directory import erase_if_told
from edgebroker.version import __version__

log = logging.getLogger("edgebroker")

SWITCH_SECONDS = 0.0005


def serve(options: argparse.Namespace) -> int:
    config, clock = _load(options), SystemClock()
    journal.set_up(config.log.level, config.log.format, config.node.name, clock, environment.current())
    for warning in warnings():
        log.warning("%s", warning)
    systemd, data_dir = Systemd(environment.current()), Path(config.node.data_dir)
    _erase_if_told(data_dir)
    broker = Broker(config, clock, systemd)
    broker.start()
    # What starts a node may have blocked signals, or rotate logs with some that would end it.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: broker.loop.call_soon_threadsafe(lambda: _stop(broker, systemd)))
    signal.signal(
        signal.SIGHUP, lambda *_: broker.loop.call_soon_threadsafe(lambda: _reload(broker, systemd, clock, options))
    )
    _announce(broker, options.ports_file)
    give_back_large()
    # The commit thread needs the interpreter for a moment each second, several times over: with the usual 5 ms each it
    # kept records waiting for up to 190 ms while the loop was busy.
    sys.setswitchinterval(SWITCH_SECONDS)
    # What exists now lives as long as the process: the collector need not visit it while records pass.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    systemd.ready()
    systemd.feed_watchdog(broker.loop)
    clean = broker.run()
    _erase_if_told(data_dir, told=broker.trust.erasing)
    log.info("stopped%s", "" if clean else " uncleanly; the next start checks the logs")
    return 0 if clean else 1


def _erase_if_told(data_dir: Path, *, told: bool = False) -> None:
    """A node that was revoked, and is to erase what it has, does so when it runs no more; what was begun is ended."""
    try:
        if erase_if_told(data_dir, told=told):
            log.critical("this node was revoked: its keys and all that it had stored in %s are erased", data_dir)
    except OSError as error:
        raise EdgeBrokerError(f"{data_dir} cannot be erased: {error}; remove it") from error


def _load(options: argparse.Namespace) -> Config:
    overrides = {
        key: value
        for key, value in (
            ("node.data_dir", options.data_dir),
            ("listen.tcp", options.listen),
            ("listen.http", options.http),
            ("listen.pipe", options.pipe),
        )
        if value is not None
    }
    return load_config(Path(options.config) if options.config else None, overrides)


def _announce(broker: Broker, ports_file: str | None) -> None:
    node, listeners = broker.config.node, broker.listeners
    (host, port), (http_host, http_port) = listeners.tcp_address, listeners.http_address
    log.info(
        "edgebroker %s: node %s (%s), data in %s, listening on %s:%d, admin on http://%s:%d%s",
        __version__,
        node.name,
        node.level,
        Path(node.data_dir).resolve(),
        host,
        port,
        http_host,
        http_port,
        f" and unix:{listeners.socket_path}" if listeners.has_socket else "",
    )
    if ports_file:
        addresses = {"tcp": f"{host}:{port}", "http": f"{http_host}:{http_port}"}
        if broker.config.listen.pipe:
            addresses["pipe"] = "{}:{}".format(*listeners.pipe_address)
        Path(ports_file).write_text(json.dumps(addresses) + "\n")


def _stop(broker: Broker, systemd: Systemd) -> None:
    systemd.stopping()
    broker.stop()


def _reload(broker: Broker, systemd: Systemd, clock: Clock, options: argparse.Namespace) -> None:
    systemd.reloading(clock)
    try:
        changes = broker.reload(_load(options))
    except ConfigError as error:
        log.error("reload failed, the configuration is unchanged: %s", error)
    else:
        logging.getLogger().setLevel(broker.config.log.level.upper())
        log.info("configuration reloaded; changed: %s", ", ".join(changes.applied) or "nothing")
        if changes.waiting:
            log.warning("restart the node to apply: %s", ", ".join(changes.waiting))
    finally:
        systemd.reloaded()
