"""An application that kills itself, as kill -9 does, at a named point: python -m tests.kit.killed POINT N app run FILE.

N is how many times it comes there before. A point is before or after a method does its work.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

AFTER, BEFORE = True, False
POINTS: dict[str, tuple[str, str, bool]] = {
    "received": ("edgebroker.consumer.instance", "Instance._take", BEFORE),
    "in transaction": ("edgebroker.consumer.database", "AppDatabase.set_positions", AFTER),
    "committed": ("edgebroker.consumer.instance", "Instance._committed", BEFORE),
    "synced": ("edgebroker.consumer.database", "AppDatabase.sync", AFTER),
    "acknowledged": ("edgebroker.consumer.subscriptions", "Subscriptions.acknowledge", AFTER),
    "copied": ("edgebroker.consumer.copy.segment_copy", "SegmentCopy.on_durable", BEFORE),
    "begun": ("edgebroker.consumer.generation", "Generations.begin", AFTER),
    "being staged": ("edgebroker.consumer.staging_file", "StagingFile.put", AFTER),
    "staged": ("edgebroker.consumer.generation", "Generations.load", AFTER),
    "sorted": ("edgebroker.consumer.staging_file", "StagingFile.accept", AFTER),
    "being filled": ("edgebroker.consumer.views", "Views.copy", AFTER),
    "being switched": ("edgebroker.consumer.views", "Views.switch", AFTER),
    "switched": ("edgebroker.consumer.instance", "Instance.switched", BEFORE),
    "being dropped": ("edgebroker.consumer.views", "Views.drop_some", AFTER),
    "READY": ("edgebroker.client.consume.refresh_loader", "RefreshLoader._switch", AFTER),
    "rebuilding": ("edgebroker.consumer.copy.rebuild", "Rebuild.step", AFTER),
}


def kill_at(point: str, number: int) -> None:
    """Have this process killed when it comes to a point for the time after `number` times."""
    module, name, after = POINTS[point]
    kind, method = name.split(".")
    owner = getattr(importlib.import_module(module), kind)
    call, left = getattr(owner, method), [number]

    def killed(*arguments: Any, **more: Any) -> Any:
        result = call(*arguments, **more) if after else None
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return result if after else call(*arguments, **more)

    setattr(owner, method, killed)


if __name__ == "__main__":
    from edgebroker.cli.main import main

    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
