"""Text from peers as a screen may show it."""

from __future__ import annotations

import unicodedata

import pytest

from edgebroker.common.names import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("till-7", "till-7"),
        ("Kasse 7, Filiale Köln, 店", "Kasse 7, Filiale Köln, 店"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("line\nnode  healthy\r", "line\\nnode  healthy\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("abc\u202egnp.exe", "abc\\u202egnp.exe"),
        ("half \ud800", "half \\ud800"),
        ("tab\tbell\x07", "tab\\tbell\\x07"),
    ],
)
def test_what_is_not_printed_as_itself_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_character_is_left_that_a_terminal_obeys() -> None:
    for code in range(0x110000):
        shown = printable(chr(code))
        assert shown.isprintable()
        if unicodedata.category(chr(code))[0] in "LNPS":
            assert shown == chr(code)
