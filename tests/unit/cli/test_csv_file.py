"""Reading CSV strictly: what looks damaged is an error with its line, whatever is behind it."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgebroker.cli.csv_file import read_rows
from edgebroker.common.errors import ConfigError

HEAD = "Item,Name,Price\n"


def rows(path: Path, data: bytes | str, *, whole: bool = True) -> list[tuple[int, dict[str, str]]]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [tuple(row) for row in read_rows(str(path), "Item", whole=whole)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "line", "why"),
    [
        ('Item,Name,Price\n1,Candle,2\n3,"Candle 12,1.99\n4,Lamp,3\n', 3, "a quote is not closed"),
        ('Item,Name,Price\n3,"Candle 12,1.99\n4,"Lamp",3\n', 2, "quotes"),
        (HEAD + "1,Candle,2\n2,Lamp\n", 3, "2 columns, and the header has 3"),
        (HEAD + "1,Candle,2,9\n", 2, "4 columns, and the header has 3"),
        (HEAD + "1,Candle,2\n2,La", 3, "2 columns"),
        (HEAD + "1,Candle,2\n2,Lamp,1", 3, "does not end with the end of a line"),
        (HEAD + "1,Candle,2\n,Lamp,1\n", 3, "is empty; every row needs a key"),
        ("Item,Name,Item\n1,2,3\n", 1, "there twice"),
        ("Item,,Price\n1,2,3\n", 1, "a name for each column"),
        ("", 1, "a name for each column"),
        (HEAD.encode() + "1,Köln,2\n".encode("latin-1"), 2, "0xf6 is not UTF-8"),
    ],
)
def test_what_is_refused(tmp_path: Path, data: bytes | str, line: int, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rows(tmp_path / "f.csv", data)
    assert f"line {line}" in str(caught.value)
    assert why in str(caught.value)


def test_a_missing_column_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its columns are Name, Price"):
        rows(tmp_path / "f.csv", "Name,Price\n1,2\n")


def test_what_is_read(tmp_path: Path) -> None:
    """A byte order mark, line ends of Windows, empty lines, quoted commas and line ends."""
    data = b'\xef\xbb\xbfItem,Name\r\n\r\n1,"a, ""b""\r\nc"\r\n2,d\r\n'
    found = [(3, {"Item": "1", "Name": 'a, "b"\r\nc'}), (5, {"Item": "2", "Name": "d"})]
    assert rows(tmp_path / "f.csv", data) == found
    assert rows(tmp_path / "f.csv.gz", gzip.compress(data)) == found
    assert rows(tmp_path / "f.csv", "Item\n1\n2", whole=False) == [(2, {"Item": "1"}), (3, {"Item": "2"})]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = gzip.compress(HEAD.encode() + b"1,2,3\n" * 1000)
    for data in (whole[:-20], b"no gzip"):
        with pytest.raises(ConfigError, match=r"f\.csv\.gz"):
            rows(tmp_path / "f.csv.gz", data)
    with pytest.raises(ConfigError, match="No such file"):
        list(read_rows(str(tmp_path / "none.csv")))


_FIELD = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), _FIELD, _FIELD), max_size=8))
def test_whatever_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str, str]]
) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["Item", "Name", "Price"])
    writer.writerows(table)
    path = tmp_path_factory.getbasetemp() / "written.csv"
    found = rows(path, text.getvalue())
    assert [tuple(fields.values()) for _, fields in found] == table


@given(st.integers(0, 4000), st.sampled_from([b'"', b",", b"\n", b"\xff", b""]))
def test_one_damaged_byte_loses_no_row_behind_it(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: bytes
) -> None:
    """A row that is read is one that was written, or the file is refused."""
    text = HEAD + "".join(f"{number},Item {number},1.99\n" for number in range(200))
    data = text.encode()
    damaged = data[: place % len(data)] + byte + data[place % len(data) + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    try:
        found = rows(path, damaged)
    except ConfigError:
        return
    assert len(found) >= 199
