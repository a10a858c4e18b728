"""What the verbs have in common: sub-commands, shared flags, handlers, and exit codes.

The module of a verb has arguments(parser), which adds its flags and sets the default `run` to its handler: a function
of the parsed flags that returns the exit code.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebroker.cli import environment
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.names import printable

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction["Parser"]

Handler = Callable[[argparse.Namespace], int]
SERVER, ADMIN = "127.0.0.1:7420", "127.0.0.1:7421"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, ConfigError.exit_code, 130


class HelpFormatter(argparse.HelpFormatter):
    """Leaves room for the longest command, and lists the commands without a line that says COMMAND."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


class Parser(argparse.ArgumentParser):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, **keywords)


class DeferredHandler:
    """A handler whose module is imported when it runs: `--help` and completion need only the flags."""

    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function

    def load(self) -> Handler:
        handler: Handler = getattr(import_module(f"edgebroker.cli.{self._module}"), self._function)
        return handler

    def __call__(self, options: argparse.Namespace) -> int:
        return self.load()(options)


def run(handler: Handler, options: argparse.Namespace) -> int:
    """Run a handler; its exit code, or that of the error it raised, which is printed."""
    if hasattr(options, "server"):
        _print_warnings()
    if getattr(options, "via", ""):
        from edgebroker.cli.admin_client import VIA

        if not hasattr(options, "admin") or hasattr(options, "server"):
            return _fail("--via is for commands that ask only the admin interface of a node, as status does", USAGE)
        options.admin += f"{VIA}{options.via}"
    try:
        code = handler(options)
        sys.stdout.flush()
        return code
    except EdgeBrokerError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # an OSError as well
        return OK  # the reader of our output has gone
    except OSError as error:
        return _fail(system_error(error), FAILED)
    except ModuleNotFoundError as error:
        return incomplete(error)
    except Exception as error:  # ours to mend; people get a line that says where
        return _fail(f"this is a defect, please report it: {error!r} {_place(error)}", FAILED)
    finally:
        _end_output()


def incomplete(error: ModuleNotFoundError) -> int:
    """The package was installed for its client only."""
    return _fail(f"{error.name} is not installed; a node needs it: pip install 'edgebroker[node]'", FAILED)


def _place(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        place, trace = f"({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})", trace.tb_next
    return place


def _fail(problem: str, code: int) -> int:
    try:
        print(f"edgebroker: {problem}", file=sys.stderr)
    except OSError:
        pass  # nobody can be told
    return code


def open_standard_streams() -> set[str]:
    """Standard input, output and error that are closed lead to the null device. Otherwise the next files and sockets
    would take their places, and what is printed would be written into them. Which they are."""
    closed = set()
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            closed.add(name)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    return closed


def _end_output() -> None:
    """What cannot be written is given up: the flush at exit would end the process with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_warnings() -> None:
    """What the client has to say goes to stderr, as everything that is not data does."""
    import logging  # costs a start time that only those pay who need it

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return f"edgebroker: {printable(record.getMessage())}"

    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def system_error(error: OSError) -> str:
    """What the operating system refused, for people."""
    what = error.strerror or str(error)
    if error.errno == errno.ENOSPC and not error.filename:
        return f"{what}; what was printed is not complete"
    return f"{error.filename}: {what}" if error.filename else what


# ---- sub-commands ----


def sentence(help: str) -> str:
    """The description that belongs to a one-line help."""
    return help[0].upper() + help[1:] + "."


def subcommands(parser: Parser) -> Subcommands:
    """Give a verb sub-commands; called without one it prints its help."""
    parser.set_defaults(parser=parser)
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def subcommand(commands: Subcommands, name: str, help: str, handler: Handler) -> Parser:
    parser = commands.add_parser(name, help=help, description=sentence(help))
    parser.set_defaults(run=handler)
    return parser


def handlers(parser: argparse.ArgumentParser) -> Iterator[Handler]:
    """The handlers of a parser and of all its sub-commands."""
    handler: Any = parser.get_default("run")
    if handler is not None:
        yield handler
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from handlers(child)


# ---- shared flags ----


def server_flag(parser: Parser) -> None:
    parser.add_argument(
        "--server",
        default=environment.variable("SERVER", SERVER),
        metavar="HOST:PORT",
        help=f"address of the broker, or several with commas between (default $EDGEBROKER_SERVER or {SERVER})",
    )


def credentials_flag(parser: Parser) -> None:
    parser.add_argument(
        "--credentials",
        default="",
        metavar="FILE",
        help="who this program is, for a broker of another machine: what `edgebroker token create --app` wrote "
        "(default $EDGEBROKER_CREDENTIALS)",
    )


def admin_flag(parser: Parser) -> None:
    parser.add_argument(
        "--admin",
        default=environment.variable("ADMIN", ADMIN),
        metavar="HOST:PORT|unix:PATH",
        help=f"admin address of the node (default $EDGEBROKER_ADMIN or {ADMIN})",
    )


def json_flag(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def label_flag(parser: Parser) -> None:
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only nodes with this label (region, level and name are labels, too); repeat it to require several",
    )


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of a flag: a whole number from `minimum` on."""

    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} on")
        return int(text)

    return number


def rate(text: str) -> float:
    """The type of a flag: so many a second; 0: no limit."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; write a number from 0 on")
    return found


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """The type of a flag such as --timeout: seconds of 30, 30s, 30m, 12h or 2d."""
    unit = _UNITS.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write it as 90s, 30m, 12h or 2d")
    return seconds
