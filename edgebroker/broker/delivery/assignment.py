"""Assigning partitions to the members of a group: balanced, sticky, with as few moves as balance needs.

Pure functions; members and partitions are whatever can be hashed. A partition stays with its holder unless another
member that wants it holds at least two fewer; a free partition goes to the member that holds least. The order of
members (who came first) breaks ties, so that the same facts give the same assignment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

M = TypeVar("M")
P = TypeVar("P")


def assign(wanted_by: Mapping[P, Sequence[M]], holders: Mapping[P, M], pinned: Collection[P] = ()) -> dict[P, M]:
    """Who should hold what. `wanted_by`: for each partition the members that want it, those who came first in front;
    `holders`: who holds it now; `pinned`: partitions that do not move while their holder wants them."""
    load: dict[M, int] = {}
    order: dict[M, int] = {}
    result: dict[P, M] = {}
    for members in {id(members): members for members in wanted_by.values()}.values():
        for member in members:
            load.setdefault(member, 0)
            order.setdefault(member, len(order))
    # The partitions of a topic mostly share one list: a group may have a thousand members.
    wishes = {id(members): frozenset(members) for members in wanted_by.values()}
    for partition, members in wanted_by.items():
        holder = holders.get(partition)
        if holder is not None and holder in wishes[id(members)]:
            result[partition] = holder
            load[holder] += 1
    if load and len(set(wishes.values())) == 1 and not pinned:
        _even_out(wanted_by, result, load, order)
        return result
    for partition, members in wanted_by.items():
        if partition not in result and members:
            chosen = min(members, key=lambda member: (load[member], order[member]))
            result[partition] = chosen
            load[chosen] += 1
    held: dict[M, list[P]] = {member: [] for member in load}
    for partition, holder in result.items():
        if partition not in pinned:
            held[holder].append(partition)
    while (move := _best_move(wanted_by, held, load, order)) is not None:
        holder, partition, chosen = move
        held[holder].remove(partition)
        held[chosen].append(partition)
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
    wanted_by: Mapping[P, Sequence[M]],
    held: Mapping[M, Sequence[P]],
    load: Mapping[M, int],
    order: Mapping[M, int],
) -> tuple[M, P, M] | None:
    """The move that evens out most, from the most loaded member that can give; None when moves only swap sides."""
    least = min(load.values(), default=0)
    for holder in sorted(load, key=lambda member: (-load[member], -order[member])):
        if load[holder] - least < 2:
            return None
        best: tuple[int, P, M] | None = None
        for partition in reversed(held[holder]):
            chosen = min(wanted_by[partition], key=lambda member: (load[member], order[member]))
            if load[holder] - load[chosen] >= 2 and (best is None or load[chosen] < best[0]):
                best = (load[chosen], partition, chosen)
                if load[chosen] == least:
                    break
        if best is not None:
            return holder, best[1], best[2]
    return None
