"""The table of verbs: what is imported when, exit codes, and the words of the help."""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgebroker.cli.admin_client import api_path
from edgebroker.cli.command import DeferredHandler, duration, handlers, run
from edgebroker.cli.main import VERBS, build_parser, main
from edgebroker.common.errors import (
    DamagedDataError,
    DataDirectoryInUseError,
    EdgeBrokerError,
    UnreachableError,
)

RETIRED = re.compile(
    r"\b(anew|afresh|heal(?:ing|ed|s)?|set aside|cut off|holes?|wounds?|stands?|hung|nobody|somebody|whoever|vouch\w*|"
    r"orders|fed|feeds?|lettering|is no [a-z]+)\b|(?<!dead[ -])\bletters?\b"
)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def imported_by(*arguments: str) -> set[str]:
    program = (
        "import sys\nfrom edgebroker.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return {name for name in done.stderr.split() if name.startswith("edgebroker.cli.")}


SHARED = {f"edgebroker.cli.{name}" for name in ("commands", "command", "environment", "main")}


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (("version",), {"edgebroker.cli.commands.version"}),
        (("--version",), set()),
        (("--help",), set()),
        (("serve", "--help"), {"edgebroker.cli.commands.serve"}),
        (("bench", "all", "--help"), {"edgebroker.cli.commands.bench"}),
    ],
)
def test_only_the_verb_that_is_called_is_imported(arguments: tuple[str, ...], modules: set[str]) -> None:
    assert imported_by(*arguments) - SHARED == modules


def test_every_verb_has_a_handler_for_each_of_its_commands() -> None:
    found = list(handlers(build_parser()))
    assert len(found) > len(VERBS)
    for handler in found:
        assert callable(handler.load() if isinstance(handler, DeferredHandler) else handler)


def test_every_flag_is_explained() -> None:
    for parser in parsers(build_parser()):
        for action in parser._actions:
            assert action.help or not action.option_strings or action.required, f"{parser.prog} {action.option_strings}"


def test_no_help_uses_a_retired_term() -> None:
    for parser in parsers(build_parser()):
        assert not RETIRED.findall(parser.format_help()), parser.prog


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("topic",), 2),
        (("topic", "creat"), 2),
        (("publish",), 2),
        (("wait", "--topic", "t", "--timeout", "soon"), 2),
        (("check",), 3),
        (("check", "raedy"), 3),
        (("check", "lag", "--warning", "x"), 3),
    ],
)
def test_a_wrong_call_exits_with(arguments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert "usage: edgebroker" in captured.err and not captured.out


def test_an_unknown_verb_names_the_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stauts"]) == 2
    assert "'stauts' is not a command; did you mean 'status'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EdgeBrokerError("x"), 1),
        (UnreachableError("x"), 3),
        (DamagedDataError("x"), 4),
        (DataDirectoryInUseError("x"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_has_its_exit_code(error: BaseException, code: int) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise error

    assert run(fail, argparse.Namespace()) == code


def test_a_reader_that_goes_away_is_not_an_error() -> None:
    program = [sys.executable, "-m", "edgebroker", "config", "init"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        assert isinstance(process.stdout, io.RawIOBase)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("90s", 90), ("1.5m", 90), ("12h", 43_200), ("2d", 172_800)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "1w", "nan", "1e12"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a duration"):
        duration(text)


def test_the_environment_sets_the_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEBROKER_SERVER", "store-3:7420")
    monkeypatch.setenv("EDGEBROKER_ADMIN", "unix:/run/edgebroker/admin.sock")
    options = build_parser("publish").parse_args(["publish", "prices"])
    assert (options.server, options.admin) == ("store-3:7420", "unix:/run/edgebroker/admin.sock")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["topic", "describe", ""], 2, "a name is missing"),
        (["topic", "describe", "t", "--admin", "foo:bar"], 3, "no broker answers at foo:bar"),
        (["status", "--admin", "foo bar:1"], 3, "is the address correct?"),
        (["backup", "/proc/nope", "--admin", "foo:bar"], 3, "no broker answers"),
        (["consume", "t", "--count", "-1"], 2, "'-1' is not a whole number from 0 on"),
        (["consume", "t", "--timeout", "-1"], 2, "is not a duration"),
        (["bench", "produce", "--size", "0"], 2, "'0' is not a whole number from 1 on"),
        (["publish", "t", "--rate", "-1"], 2, "'-1' is not a rate"),
        (["publish", "t", "--key", "k", "--csv", "x.csv"], 2, "--key-column"),
        (["promote", "--level", "sideways"], 2, "invalid choice: 'sideways'"),
        (["resync", "--topic", "t", "--id", "x"], 2, "--id x: not the id of a resync"),
    ],
)
def test_wrong_calls_say_what_to_do(
    arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert (status, text in said) == (code, True), said
    assert "Traceback" not in said


def test_names_are_quoted_as_one_part_of_a_path() -> None:
    assert api_path("topics", "t/snapshot/5") == "/v1/topics/t%2Fsnapshot%2F5"
    assert api_path("groups", "a b", "offsets") == "/v1/groups/a%20b/offsets"


def test_a_refusal_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: argparse.Namespace) -> int:
        raise NotADirectoryError(20, "Not a directory", "/plain/x")

    assert run(fail, argparse.Namespace()) == 1
    assert capsys.readouterr().err == "edgebroker: /plain/x: Not a directory\n"
