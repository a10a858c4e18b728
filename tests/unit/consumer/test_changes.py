"""Changes in pieces: whole, in order, and none that costs the loop much at once."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edgebroker.consumer.rest import changes
from edgebroker.consumer.rest.changes import _cut, _width

ROWS = st.lists(
    st.tuples(st.text(max_size=3), st.one_of(st.none(), st.integers(), st.binary(max_size=40))), max_size=400
)


@given(ROWS, st.integers(1, 7), st.integers(1, 60))
def test_rows_in_pieces(rows: list[tuple[Any, ...]], most: int, size: int) -> None:
    before = changes.PIECE_ROWS, changes.PIECE_BYTES
    changes.PIECE_ROWS, changes.PIECE_BYTES = most, size
    try:
        pieces = list(_cut(rows))
    finally:
        changes.PIECE_ROWS, changes.PIECE_BYTES = before
    assert [row for piece, _ in pieces for row in piece] == rows
    for piece, width in pieces:
        assert 1 <= len(piece) <= most and width == sum(map(_width, piece))
        assert len(piece) == 1 or width <= size
