"""`edgebroker serve`: a broker in the foreground until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import signal
import sys
from pathlib import Path

from edgebroker.broker.broker import Broker
from edgebroker.common.clock import SystemClock
from edgebroker.common.config import load_config
from edgebroker.version import __version__

log = logging.getLogger("edgebroker")


def serve(options: argparse.Namespace) -> int:
    overrides = {
        key: value
        for key, value in (
            ("node.data_dir", options.data_dir),
            ("listen.tcp", options.listen),
            ("listen.http", options.http),
        )
        if value is not None
    }
    config = load_config(Path(options.config) if options.config else None, overrides)
    logging.basicConfig(
        level=config.log.level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    broker = Broker(config, SystemClock())
    broker.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: broker.stop_threadsafe())
    host, port = broker.tcp_address
    http_host, http_port = broker.http_address
    log.info(
        "edgebroker %s: node %s (%s), data in %s, listening on %s:%d, admin on http://%s:%d and unix:%s",
        __version__,
        config.node.name,
        config.node.level,
        Path(config.node.data_dir).resolve(),
        host,
        port,
        http_host,
        http_port,
        broker.socket_path(),
    )
    if options.ports_file:
        addresses = {"tcp": f"{host}:{port}", "http": f"{http_host}:{http_port}"}
        Path(options.ports_file).write_text(json.dumps(addresses) + "\n")
    # What exists now stays for good: the collector need not walk it again and again while records pass.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    clean = broker.run()
    log.info("stopped%s", "" if clean else "; the stop was not clean, the next start checks the logs")
    return 0 if clean else 1
