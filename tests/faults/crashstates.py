"""Every state a power cut may leave behind, from the trace of a run: see disk.py for what is legal.

    for state in states(trace, root, lambda: scratch, seed=1, limit=500):
        check(recover(state.materialise()), state.marks)

When the legal states after an operation number at most `limit` they are all produced; otherwise the extremes (nothing
or everything on the disk, each prefix, each single sector or entry missing, each single one present) and then a
seeded sample. A state equal to one since the last sync or mark is not produced again.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf, prod
from pathlib import Path

from .disk import SECTOR, Directory, Disk, EntryChange, File, Node, Pick, apply, read_trace, replay, size_after

_BOUNDARIES = 16
_SUBSETS = 10
Done = tuple[EntryChange, ...]
Tree = Mapping[str, tuple[Node, bytes]]
Picks = Mapping[File, Pick]


class Choices:
    """What may be on the disk of one file that has changes no sync covered."""

    def __init__(self, file: File) -> None:
        self.base, self.changes = file.base, file.changes
        versions: dict[int, list[int]] = {}
        for change in self.changes:
            for sector in change.sectors:
                known = versions.setdefault(sector, [0])
                if change.durable:
                    known.clear()
                known.append(change.seq)
        self._starts = {change.seq: change.offset for change in self.changes}
        self._visible: dict[int, dict[int, list[int]]] = {}
        self.sectors = {sector: known for sector, known in versions.items() if len(known) > 1}
        resizes = [change.durable for change in self.changes if change.data is None]
        self.settled = max((i + 1 for i, durable in enumerate(resizes) if durable), default=0)
        self.sizes = [(n, size) for n in range(self.settled, len(resizes) + 1) for size in self._sizes(n)]
        self.oldest, self.newest = self.at(0), self.at(inf)

    def _sizes(self, resizes: int) -> list[int]:
        low = size_after(len(self.base), self.changes, resizes, 0)
        high = size_after(len(self.base), self.changes, resizes)
        borders = range((low // SECTOR + 1) * SECTOR, high, SECTOR)
        between = {*borders[:: len(borders) // _BOUNDARIES + 1], (low + high) // 2}
        between |= {change.end for change in self.changes if low < change.end < high}
        return [low, *sorted(between - {low, high}), high] if low < high else [low]

    def at(self, upto: float) -> Pick:
        """As if every change up to a point had reached the disk, in order."""
        resizes = sum(change.data is None and change.seq <= upto for change in self.changes)
        resizes = max(self.settled, resizes)
        seen = {sector: max(known[0], *(n for n in known if n <= upto), 0) for sector, known in self.sectors.items()}
        return Pick(resizes, size_after(len(self.base), self.changes, resizes, upto), seen)

    def visible(self, size: int) -> dict[int, list[int]]:
        """The versions of sectors that differ in a file of this size."""
        if size not in self._visible:
            shown = {
                s: [known[0]] + [n for n in known[1:] if self._starts[n] < size] for s, known in self.sectors.items()
            }
            self._visible[size] = {s: known for s, known in shown.items() if len(known) > 1 and s * SECTOR < size}
        return self._visible[size]

    def count(self) -> int:
        return sum(prod(map(len, self.visible(size).values())) for _, size in self.sizes)

    def all(self) -> Iterator[Pick]:
        for resizes, size in self.sizes:
            visible = self.visible(size)
            for versions in itertools.product(*visible.values()):
                yield Pick(resizes, size, dict(zip(visible, versions, strict=True)))

    def singles(self) -> list[Callable[[], Pick]]:
        """Every size, no sector at all, each sector missing alone, each sector present alone."""
        old, new = self.oldest.seen, self.newest.seen
        result: list[Callable[[], Pick]] = [partial(Pick, resizes, size, new) for resizes, size in self.sizes]
        result.append(partial(self._changed, old, old))
        for sector in self.sectors:
            result += [partial(self._changed, new, {sector: old[sector]})]
            result += [partial(self._changed, old, {sector: new[sector]})]
        return result

    def _changed(self, seen: Mapping[int, int], other: Mapping[int, int]) -> Pick:
        return self.newest._replace(seen={**seen, **other})

    def sample(self, rng: random.Random) -> Pick:
        resizes, size = rng.choice((rng.choice(self.sizes), self.sizes[-1]))
        share = rng.choice((0.1, 0.5, 0.9))
        seen = {s: known[-1] if rng.random() < share else rng.choice(known) for s, known in self.sectors.items()}
        return Pick(resizes, size, seen)

    def key(self, pick: Pick) -> tuple[object, ...]:
        """Tells picks apart by what they show; () for the durable state."""
        shown = ((s, max(n for n in known if n <= pick.seen[s])) for s, known in self.visible(pick.size).items())
        seen = tuple((s, n) for s, n in shown if n != self.sectors[s][0])
        return (pick.resizes, pick.size, seen) if seen or pick[:2] != self.oldest[:2] else ()


class Point:
    """A moment of the trace at which the power may go."""

    def __init__(self, disk: Disk, label: str) -> None:
        self.op_index, self.label = disk.seq, label
        self.marks, self.mark_count = disk.marks, len(disk.marks)
        self.root, self.durable, self.pending = disk.root, disk.durable, disk.pending
        self.choices = {file: Choices(file) for file in disk.dirty}
        self._trees: dict[Done, tuple[Tree, list[File]]] = {}

    def tree(self, done: Done) -> Tree:
        """Path to node and its durable content, with these entry changes on the disk."""
        return self._look(done)[0]

    def reachable(self, done: Done) -> list[File]:
        """The files with choices that have a name then."""
        return self._look(done)[1]

    def _look(self, done: Done) -> tuple[Tree, list[File]]:
        if done not in self._trees:
            entries = apply(self.durable, done)
            tree: dict[str, tuple[Node, bytes]] = {}
            todo: list[tuple[str, Directory]] = [("", self.root)]
            for prefix, directory in todo:
                for name, node in entries.get(directory, {}).items():
                    tree[prefix + name] = (node, node.base if isinstance(node, File) else b"")
                    if isinstance(node, Directory):
                        todo.append((f"{prefix}{name}/", node))
            nodes = {node for node, _ in tree.values()}
            self._trees[done] = tree, [file for file in self.choices if file in nodes]
        return self._trees[done]

    def legal(self, wanted: set[int]) -> Done:
        """Those of the wanted entry changes that can be there: not without an earlier one of the same name."""
        missing: set[tuple[Directory, str]] = set()
        done = []
        for change in self.pending:
            if change.seq in wanted and not change.names & missing:
                done.append(change)
            else:
                missing |= change.names
        return tuple(done)

    def states(self, rng: random.Random, limit: int) -> Iterator["State"]:
        """At most `limit` states, all of them if they are not more."""
        subsets: list[Done] = []
        if len(self.pending) <= _SUBSETS and 1 << len(self.pending) <= 4 * limit:
            seqs = [change.seq for change in self.pending]
            sets = itertools.chain.from_iterable(itertools.combinations(seqs, n) for n in range(len(seqs) + 1))
            subsets = list(dict.fromkeys(self.legal(set(subset)) for subset in sets))
        counts = {file: choice.count() for file, choice in self.choices.items()}
        total = sum(prod(counts[file] for file in self.reachable(done)) for done in subsets)
        if not 0 < total <= limit:
            yield from self._some(rng, limit)
            return
        for done in subsets:
            files = self.reachable(done)
            for picks in itertools.product(*(self.choices[file].all() for file in files)):
                yield State(self, done, dict(zip(files, picks, strict=True)))

    def _some(self, rng: random.Random, limit: int) -> Iterator["State"]:
        extremes = self._extremes()
        if len(extremes) > limit:
            extremes = extremes[:4] + rng.sample(extremes[4:], limit - 4)
        for make in extremes:
            yield make()
        for _ in range(limit - len(extremes)):
            share = rng.choice((0.2, 0.5, 0.8, 1.0))
            done = self.legal({change.seq for change in self.pending if rng.random() < share})
            yield State(self, done, {file: choice.sample(rng) for file, choice in self.choices.items()})

    def _extremes(self) -> list[Callable[[], "State"]]:
        every = {change.seq for change in self.pending}
        none, full = self.legal(set()), self.legal(every)
        old = {file: choice.oldest for file, choice in self.choices.items()}
        new = {file: choice.newest for file, choice in self.choices.items()}
        result = [partial(State, self, done, picks) for done in (none, full) for picks in (old, new)]
        seqs = every | {change.seq for choice in self.choices.values() for change in choice.changes}
        result += [partial(self._prefix, seq) for seq in sorted(seqs)]
        for change in self.pending:
            before = {other.seq for other in self.pending if other.seq < change.seq and other.names & change.names}
            result.append(partial(State, self, self.legal(every - {change.seq}), new))
            result.append(partial(State, self, self.legal({change.seq} | before), new))
        singles = [(file, make) for file, choice in self.choices.items() for make in choice.singles()]
        return [*result, *(partial(self._single, full, new, file, make) for file, make in singles)]

    def _prefix(self, upto: int) -> "State":
        done = self.legal({change.seq for change in self.pending if change.seq <= upto})
        return State(self, done, {file: choice.at(upto) for file, choice in self.choices.items()})

    def _single(self, done: Done, picks: Picks, file: File, make: Callable[[], Pick]) -> "State":
        return State(self, done, {**picks, file: make()})


class State:
    """One legal content of the directory after a power cut."""

    def __init__(self, point: Point, done: Done, picks: Picks) -> None:
        self._point, self._done, self._picks = point, done, picks
        self.out_factory: Callable[[], Path] | None = None

    @property
    def op_index(self) -> int:
        """How many operations of the trace came before the power cut."""
        return self._point.op_index

    @property
    def marks(self) -> list[bytes]:
        """What the program (or a client of it) noted before the power cut."""
        return self._point.marks[: self._point.mark_count]

    def key(self) -> tuple[object, ...]:
        """Equal for equal states, as long as no sync or mark lies between them."""
        picks = ((id(file), self._point.choices[file].key(self._picks[file])) for file in self._reachable())
        return (*(change.seq for change in self._done), *(pick for pick in picks if pick[1]))

    def files(self) -> dict[str, bytes | None]:
        """Path to content, None for a directory; parents come first."""
        result: dict[str, bytes | None] = {}
        for path, (node, base) in self._point.tree(self._done).items():
            if isinstance(node, Directory):
                result[path] = None
            elif node in self._picks:
                result[path] = replay(base, self._point.choices[node].changes, self._picks[node])
            else:
                result[path] = base
        return result

    def materialise(self, directory: str | os.PathLike[str] | None = None) -> Path:
        """Make it real, in place of whatever is in the directory (by default one of the out_factory)."""
        if directory is None:
            if self.out_factory is None:
                raise ValueError("no directory given and no out_factory")
            directory = self.out_factory()
        target = Path(directory)
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        tree = self._point.tree(self._done)
        for path, content in self.files().items():
            mode = tree[path][0].mode
            if content is None:
                os.mkdir(target / path, mode | 0o700)
                continue
            fd = os.open(target / path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode | 0o600)
            with open(fd, "wb", buffering=0) as file:
                file.write(content)
        return target

    def describe(self) -> str:
        """For the message of a failed test."""
        lines = [f"power cut after operation {self.op_index} ({self._point.label}), {len(self.marks)} marks"]
        lines += [f"not on the disk: {change.label}" for change in self._point.pending if change not in self._done]
        paths = {id(node): path for path, (node, _) in self._point.tree(self._done).items()}
        for file in self._reachable():
            pick, newest = self._picks[file], self._point.choices[file].newest
            old = [s for s, n in pick.seen.items() if n != newest.seen[s] and s * SECTOR < pick.size]
            size = f"{pick.size} of {newest.size} bytes, {newest.resizes - pick.resizes} resizes missing"
            lines.append(f"{paths[id(file)]}: {size}, old sectors {old[:20]}{' and more' if len(old) > 20 else ''}")
        return "; ".join(lines)

    def _reachable(self) -> list[File]:
        return self._point.reachable(self._done)


def states(
    trace_path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    out_factory: Callable[[], Path] | None = None,
    seed: int = 0,
    limit: int = 4096,
    *,
    initial: str | os.PathLike[str] | None = None,
) -> Iterator[State]:
    """The legal states after each operation of a trace, at most `limit` (4 or more) for each.

    out_factory: gives State.materialise() a directory. initial: a copy of what was in the root before the trace.
    """
    disk, rng, produced = Disk(root, initial), random.Random(seed), set[tuple[object, ...]]()
    for record in itertools.chain([None], read_trace(trace_path)):
        label = disk.apply(record) if record else "the start"
        if record and record.op in "sxa":
            produced.clear()
        for state in Point(disk, label).states(rng, limit) if label else ():
            key = state.key()
            if key not in produced:
                produced.add(key)
                state.out_factory = out_factory
                yield state
