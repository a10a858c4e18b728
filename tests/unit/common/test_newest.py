"""What is kept of more than fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgebroker.common.runtime.newest import Newest


@given(st.lists(st.tuples(st.integers(0, 6), st.integers()), max_size=40), st.integers(1, 5))
def test_the_entries_that_were_put_last_are_kept(puts: list[tuple[int, int]], most: int) -> None:
    kept, latest = Newest[int, int](most), dict[int, int]()
    for key, value in puts:
        kept.put(key, value)
        latest.pop(key, None)
        latest[key] = value
        assert list(kept.items()) == list(latest.items())[-most:]
        latest = dict(list(latest.items())[-most:])
