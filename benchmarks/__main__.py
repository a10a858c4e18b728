"""`make bench` or `python -m benchmarks [ROW...] [--pinned] [--markdown]`: measure and print the table."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable

from benchmarks import (
    appliance,
    application,
    catalogue,
    delivery,
    fleet,
    floods,
    idle,
    offline,
    peers,
    resources,
    rows,
    silence,
    tree,
    trust,
)
from benchmarks.rows import Row

ALL: dict[str, Callable[[bool], list[Row]]] = {
    "publish": rows.publish,
    "publish-1k": rows.publish_1k,
    "one-by-one": rows.one_by_one,
    "drain": rows.drain,
    "push": rows.push,
    "connections": rows.connections,
    "fanout": delivery.fanout,
    "acknowledged": delivery.acknowledged,
    "laggards": delivery.laggards,
    "rebalance": delivery.rebalance,
    "applications": application.applications,
    "catalogue": catalogue.catalogue,
    "mirror": tree.catch_up,
    "hops": tree.hops,
    "replicated": tree.replicated,
    "silence": silence.silence,
    "children": tree.children,
    "line": tree.narrow_line,
    "floods": floods.floods,
    "fleet": fleet.fleet,
    "offline": offline.offline,
    "idle": idle.idle,
    "trust": trust.trust,
    "start": rows.start_after_kill,
    "memory": resources.memory,
    "topics": resources.many_topics,
    "partitions": resources.many_partitions,
    "wear": resources.wear,
    "lookups": resources.lookups,
    "scraped": appliance.scraped,
    "frozen": appliance.frozen,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ALL, []], help="which rows; all without any")
    parser.add_argument("--pinned", action="store_true", help="the broker on core 0, the client on core 1")
    options = parser.parse_args()
    found = peers.load()
    print(f"{platform.machine()}, Python {platform.python_version()}; peers: {found['date']}")
    print("| work | reached | against | ratio | target | |\n|---|---|---|---|---|---|")
    for name in options.rows or ALL:
        for row in ALL[name](options.pinned):
            mark = "yes" if row.reached else "**no**"
            print(
                f"| {row.work} | {row.figure} | {row.reference} | {row.ratio:.2f} | {row.target} | {mark} |", flush=True
            )


if __name__ == "__main__":
    main()
