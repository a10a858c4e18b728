"""Assigning partitions to the members of a group: balanced, sticky, with as few moves as balance needs.

Pure; members and partitions are whatever can be hashed. A partition stays with its holder unless another member that
wants it holds at least two fewer; a free partition goes to the member that holds least. The order of members (who came
first) breaks ties, so that the same facts give the same assignment. A group may have thousands of partitions that are
wanted by different members: this is a generator, so that the caller can pause.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from typing import TypeVar

M = TypeVar("M")
P = TypeVar("P")
# What is compared between two pauses: half a millisecond.
STEP = 1000


def assign(
    wanted_by: Mapping[P, Sequence[M]], holders: Mapping[P, M], pinned: Collection[P] = ()
) -> Generator[None, None, dict[P, M]]:
    """Who should hold what: the value of the generator. `wanted_by`: for each partition the members that want it, those
    who came first in front; `holders`: who holds it now; `pinned`: partitions that do not move while their holder wants
    them."""
    load: dict[M, int] = {}
    order: dict[M, int] = {}
    result: dict[P, M] = {}
    for members in {id(members): members for members in wanted_by.values()}.values():
        for member in members:
            load.setdefault(member, 0)
            order.setdefault(member, len(order))
    yield
    # The partitions of a topic mostly share one list: a group may have a thousand members.
    sets = {id(members): frozenset(members) for members in wanted_by.values()}
    for partition, members in wanted_by.items():
        holder = holders.get(partition)
        if holder is not None and holder in sets[id(members)]:
            result[partition] = holder
            load[holder] += 1
    yield
    if load and len(set(sets.values())) == 1 and not pinned:
        _even_out(wanted_by, result, load, order)
        return result
    compared = 0
    for partition, members in wanted_by.items():
        if partition not in result and members:
            chosen = min(members, key=lambda member: (load[member], order[member]))
            result[partition] = chosen
            load[chosen] += 1
            compared += len(members)
            if compared >= STEP:
                compared = 0
                yield
    # What may move, by who holds it and who wants it: one is as good as another.
    held: dict[M, dict[frozenset[M], list[P]]] = {member: {} for member in load}
    for partition, holder in result.items():
        if partition not in pinned:
            held[holder].setdefault(sets[id(wanted_by[partition])], []).append(partition)
    while (move := (yield from _best_move(held, load, order))) is not None:
        holder, wanting, chosen = move
        partition = held[holder][wanting].pop()
        if not held[holder][wanting]:
            del held[holder][wanting]
        held[chosen].setdefault(wanting, []).append(partition)
        load[holder] -= 1
        load[chosen] += 1
        result[partition] = chosen
    return result


def _even_out(
    wanted_by: Mapping[P, Sequence[M]], result: dict[P, M], load: dict[M, int], order: Mapping[M, int]
) -> None:
    """Everybody wants the same: who holds most keeps the larger share, the rest goes to those below theirs."""
    share, larger = divmod(len(wanted_by), len(load))
    ranked = sorted(load, key=lambda member: (-load[member], order[member]))
    quota = {member: share + (rank < larger) for rank, member in enumerate(ranked)}
    for partition in reversed(list(result)):
        holder = result[partition]
        if load[holder] > quota[holder]:
            load[holder] -= 1
            del result[partition]
    takers = iter([member for member in reversed(ranked) for _ in range(quota[member] - load[member])])
    for partition in wanted_by:
        if partition not in result:
            result[partition] = next(takers)


def _best_move(
    held: Mapping[M, Mapping[frozenset[M], Sequence[P]]], load: Mapping[M, int], order: Mapping[M, int]
) -> Generator[None, None, tuple[M, frozenset[M], M] | None]:
    """The move that evens out most, from the most loaded member that can give: from whom, of what these members want,
    to whom; None when moves only swap sides."""
    least, compared = min(load.values(), default=0), len(load)
    for holder in sorted(load, key=lambda member: (-load[member], -order[member])):
        if load[holder] - least < 2:
            return None
        best: tuple[int, frozenset[M], M] | None = None
        for wanting in held[holder]:
            chosen = min(wanting, key=lambda member: (load[member], order[member]))
            if load[holder] - load[chosen] >= 2 and (best is None or load[chosen] < best[0]):
                best = (load[chosen], wanting, chosen)
                if load[chosen] == least:
                    break
            compared += len(wanting)
            if compared >= STEP:
                compared = 0
                yield
        if best is not None:
            return holder, best[1], best[2]
    return None
