"""`edgebroker app run|config|schema`: applications that keep their own copy of topics (docs/consumer.md)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from edgebroker.cli import environment
from edgebroker.cli.command import FAILED, OK, Parser, json_flag, subcommand, subcommands
from edgebroker.cli.render import print_table
from edgebroker.cli.service import journal
from edgebroker.common.config import parse_labels
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.consumer.config import LoadedConfig, load_app_config
from edgebroker.consumer.database import NAME, AppDatabase, DatabaseError, is_damage, view_name
from edgebroker.consumer.declare.app_types import TYPES, application_of
from edgebroker.consumer.declare.application import Application, load_module, read_application
from edgebroker.consumer.declare.declarations import DeclarationError
from edgebroker.consumer.handling.errors import StoppedError, described
from edgebroker.consumer.service import Service, StuckError

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
FLAGS = ("type", "topics", "columns", "indexes", "name", "node", "labels", "server", "data_dir", "http", "force")


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    run_parser = subcommand(commands, "run", "run an application until SIGTERM or SIGINT", run)
    config_parser = subcommand(commands, "config", "show the configuration, and where each value is from", config)
    schema_parser = subcommand(commands, "schema", "show the local database, and how to read it", schema)
    for each in (run_parser, config_parser, schema_parser):
        each.add_argument(
            "source", metavar="FILE", nargs="?", default="", help="a Python file, or the name of a module; none: --type"
        )
        each.add_argument("--type", choices=TYPES, help="an application that needs no file")
        each.add_argument("--topics", metavar="TOPICS", help="the topics that it reads, with commas between them")
        each.add_argument("--columns", metavar="COLUMNS", help="of a table: 'code text, cents integer, name text ?'")
        each.add_argument("--indexes", metavar="INDEXES", help="of a table: 'cents; code, cents'")
        each.add_argument("-c", "--config", metavar="FILE", help="configuration file (TOML)")
        each.add_argument("--name", metavar="NAME", help="name of the application (default: that of the file)")
        each.add_argument("--node", metavar="NAME", help="name of the node (default: the host name)")
        each.add_argument("--labels", metavar="LABELS", help="labels of the node: NAME=VALUE, with commas between")
        each.add_argument("--server", metavar="HOST:PORT", help="the broker (default 127.0.0.1:7420)")
        each.add_argument(
            "--http", metavar="HOST:PORT", help="where it answers over HTTP (default 127.0.0.1:7430), or none"
        )
        each.add_argument("--data-dir", metavar="DIR", help="where the local database is (default edgebroker-NAME)")
    run_parser.add_argument(
        "--force",
        action="store_true",
        default=None,
        help="show a topic that was loaded again although it has fewer than nine tenths of its rows",
    )
    config_parser.add_argument("--check", action="store_true", help="print nothing when all is well")
    for each in (config_parser, schema_parser):
        json_flag(each)


def run(options: argparse.Namespace) -> int:
    """0 after a signal, 1 when a handler's policy ended it."""
    loaded = _load(options)
    settings, clock = loaded.config, SystemClock()
    journal.set_up(settings.log_level, settings.log_format, settings.node, clock, environment.current())
    application = _read(options.source, loaded)
    database = AppDatabase(Path(settings.data_dir), clock.wall_ms())
    service = Service(application, database, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    # The loop answers within a moment while the worker is busy.
    sys.setswitchinterval(SWITCH_SECONDS)
    topics = ", ".join(application.topics)
    log.info(
        "application %s of node %s reads %s; its database is %s", settings.name, settings.node, topics, database.path
    )
    _end(_until_stopped(service, database))


def _until_stopped(service: Service, database: AppDatabase) -> int:
    try:
        service.run()
    except StuckError as error:
        log.error("%s", error)
        _start_again()
    except StoppedError as error:
        log.error("%s", error)
        return FAILED
    except EdgeBrokerError as error:
        log.error("%s", error)
        return error.exit_code
    except (DatabaseError, OSError) as error:
        if is_damage(error):
            database.damaged()
            log.error("the local database is damaged: the next start moves it aside, and fills another one")
        else:
            log.error("the local database cannot be used: %s", error)
        return FAILED
    log.info("stopped")
    return OK


def _start_again() -> NoReturn:
    """Become a new process with the same number; what this one has open and its threads end with it."""
    logging.shutdown()
    sys.stdout.flush()
    arguments = sys.argv[1:] if getattr(sys, "frozen", False) else sys.orig_argv[1:]
    os.execv(sys.executable, [sys.executable, *arguments])


def _end(code: int) -> NoReturn:
    """End without closing the database: SQLite would remove the files that readers need."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def config(options: argparse.Namespace) -> int:
    loaded = _load(options)
    if options.check:
        _read(options.source, loaded)
        return OK
    rows = [(name, getattr(loaded.config, name), source) for name, source in loaded.sources.items()]
    if options.json:
        print(json.dumps({name: {"value": value, "source": source} for name, value, source in rows}))
    else:
        print_table(("key", "value", "from"), [(name, _shown(value), source) for name, value, source in rows])
    return OK


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "-"


def schema(options: argparse.Namespace) -> int:
    loaded = _load(options)
    views = {
        view_name(topic.name): ["key", *topic.view.declared.split(", ")]
        for topic in _read(options.source, loaded).topics.values()
        if topic.view is not None
    }
    path = Path(loaded.config.data_dir).absolute() / NAME
    if options.json:
        print(json.dumps({"path": str(path), "views": views}))
        return OK
    for name, columns in views.items():
        print(f"{name}: {', '.join(columns)}")
    print(f"\nopen {path} read-only:")
    for language, how in (
        ("SQLite shell", f"sqlite3 'file:{path}?mode=ro'"),
        ("Python", f"sqlite3.connect('file:{path}?mode=ro', uri=True)"),
        ("Java", f'DriverManager.getConnection("jdbc:sqlite:file:{path}?mode=ro")'),
        ("C#", f'new SqliteConnection("Data Source={path};Mode=ReadOnly")'),
        ("C", f'sqlite3_open_v2("{path}", &db, SQLITE_OPEN_READONLY, 0)'),
    ):
        print(f"  {language:13}{how}")
    return OK


def _load(options: argparse.Namespace) -> LoadedConfig:
    flags = {name: getattr(options, name, None) for name in FLAGS}
    path = Path(options.config) if options.config else None
    return load_app_config(options.source, path, flags, environment.current())


def _read(source: str, loaded: LoadedConfig) -> Application:
    config = loaded.config
    if config.type and source:
        raise ConfigError(f"give a file or type = {config.type}, not both")
    if config.type:
        return application_of(config.type, config.topics, config.columns, config.indexes)
    if not source:
        raise ConfigError(f"which application? give a Python file, or type = {', '.join(TYPES)}")
    return read_application(_import(source), config.node, parse_labels(config.labels))


def _import(source: str) -> ModuleType:
    try:
        return load_module(source)
    except EdgeBrokerError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        if isinstance(error, SyntaxError):
            place = f"{error.filename}:{error.lineno}"
        raise DeclarationError(f"{place}: {source} cannot be imported: {described(error)}") from None
