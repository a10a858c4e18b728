"""An application as a process: one thread works, the loop answers over HTTP, watches it and takes signals.

loop: HTTP, signals, the watch      worker: Instance.run()      clients, outbox, questions: threads of their own
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from edgebroker.common.errors import DamagedDataError, DataDirectoryError
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.runtime.threads import start_thread
from edgebroker.consumer.config import AppConfig, has_copy
from edgebroker.consumer.copy.copy_reader import CopyReader
from edgebroker.consumer.database import AppDatabase, DatabaseError, view_name
from edgebroker.consumer.declare.application import Application
from edgebroker.consumer.handling.watch import LOOK_SECONDS
from edgebroker.consumer.instance import Instance
from edgebroker.consumer.reader import Reader
from edgebroker.consumer.rest.answers import CopyProgress, PartitionProgress, Readiness, Stats, TopicProgress
from edgebroker.consumer.rest.changes import ChangeFeed
from edgebroker.consumer.rest.history import History
from edgebroker.consumer.rest.lookups import LookUps
from edgebroker.consumer.rest.openapi import document
from edgebroker.consumer.rest.queries import Queries
from edgebroker.consumer.rest.routes import Api
from edgebroker.consumer.rest.server import SOCKET, RestServer
from edgebroker.consumer.rest.static_files import StaticFiles
from edgebroker.network.http.router import Call, Route
from edgebroker.network.http.server import Failed, Response
from edgebroker.network.io.loop import Loop
from edgebroker.version import __version__

if TYPE_CHECKING:
    from edgebroker.consumer.copy.segment_copy import SegmentCopy

log = logging.getLogger(__name__)

QUERY_THREADS, QUERY_SECONDS = 2, 5.0
FUNCTION_THREADS, FUNCTION_SECONDS = 4, 10.0
# A broker that has said nothing for so long is away.
AWAY_SECONDS = 30.0
# A stop waits so long for the copy to be stored, and looks for it so often.
CLOSE_SECONDS, FLUSH_SECONDS = 2.0, 0.005


class StuckError(Exception):
    """A call does not end, and nothing ends it but the end of the process."""


class Service:
    """run() belongs to the main thread; stop() may be called by any, and by a signal handler."""

    def __init__(self, application: Application, database: AppDatabase, config: AppConfig) -> None:
        self._application, self._database, self._config = application, database, config
        self._loop = Loop(SystemClock(), slow_level=logging.DEBUG)
        views = {topic.name: topic.view for topic in application.topics.values() if topic.view is not None}
        changes = ChangeFeed(self._loop, views, os.urandom(4).hex())
        self._copy = self._open_copy()
        copied = CopyReader(self._copy, self._loop) if self._copy is not None else None
        self._instance = Instance(application, database, config, changes, copied)
        self._late_calls = 0
        self._failure: BaseException | None = None
        self._reader = Reader(database.path)
        path, loop = database.path, self._loop
        self._queries = Queries(loop, path, "query", QUERY_THREADS, QUERY_SECONDS, self._lost_threads)
        api = Api(
            self,
            self._instance,
            views,
            LookUps(views, self._age_ms, self._instance.is_stale),
            History(
                copied, [name for name, topic in application.topics.items() if topic.scope == "each"], self._age_ms
            ),
            changes,
            self._reader,
            self._queries,
            Queries(loop, path, "function", FUNCTION_THREADS, FUNCTION_SECONDS, self._lost_threads),
        )
        routes = api.routes(application.routes)
        routes.append(Route("GET", "/openapi.json", self._describe, None, "view"))
        if config.static_dir:
            files = StaticFiles(loop, Path(config.static_dir))
            routes.append(Route("GET", "/{path...}", files.answer, None, "view"))
        self._routes, self._views = routes, views
        names = frozenset(name.lower() for name in (config.node, os.uname().nodename))
        self._rest = RestServer(loop, routes, names)
        self.http_address = ("", 0)

    def _open_copy(self) -> SegmentCopy | None:
        """The copy, if one is to be kept; readers do not depend on it. Raises FormatTooNewError."""
        topics, config = self._application.topics.values(), self._config
        if not has_copy(config) or all(topic.scope != "each" for topic in topics):
            return None
        # Where the broker is on this machine there is none, and no engine to be loaded.
        from edgebroker.consumer.copy.segment_copy import COPY, SegmentCopy

        try:
            return SegmentCopy(
                self._database.path.parent / COPY,
                self._loop,
                SystemClock(),
                max_bytes=config.copy_bytes,
                hours=config.copy_hours,
                positions=frozenset(self._database.positions()),
                from_beginning=frozenset(topic.name for topic in topics if topic.start != "latest"),
            )
        except (OSError, DataDirectoryError, DamagedDataError) as error:
            log.error("the copy of topics cannot be opened: %s; it is left out until the next start", error)
            return None

    def run(self) -> None:
        """Until stop(). Raises what Instance.run() raises, StuckError, and EdgeBrokerError when it cannot listen."""
        config = self._config
        address = "" if config.http == "none" else config.http
        self.http_address = self._rest.open(address, self._database.path.parent / SOCKET)
        if address:
            log.info("it answers on http://%s:%d", *self.http_address)
        self.worker = start_thread("edgebroker-worker", self._work)
        self._loop.call_later(LOOK_SECONDS, self._look)
        self._loop.run()
        self._rest.close()
        if self._copy is not None:
            self._copy.close(CLOSE_SECONDS)
        self._loop.close()
        self._reader.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End: what has begun is finished, if that does not take too long."""
        self._instance.stop()
        self._loop.call_soon_threadsafe(self._leave_later)

    def _work(self) -> None:
        try:
            self._instance.run()
        except BaseException as error:
            self._failure = error
        self._loop.call_soon_threadsafe(lambda: self._end(self._loop.clock_now() + CLOSE_SECONDS))

    def _end(self, deadline: float) -> None:
        """End as soon as the copy has what was received."""
        if self._copy is None or self._copy.flush() or self._loop.clock_now() >= deadline:
            self._loop.stop()
        else:
            self._loop.call_later(FLUSH_SECONDS, lambda: self._end(deadline))

    def _leave_later(self) -> None:
        self._loop.call_later(self._config.stop_timeout, self._leave)

    def _leave(self) -> None:
        log.warning("stopping takes longer than %g s: what is not stored yet comes again", self._config.stop_timeout)
        self._loop.stop()

    def _look(self) -> None:
        self._loop.call_later(LOOK_SECONDS, self._look)
        late = self._instance.watch.look()
        if late is None:
            return
        if late.stuck:
            self._failure = StuckError(f"{late.what} does not end: the process starts again")
            self._loop.stop()
        else:
            self._late_calls += 1
            log.error("%s takes longer than %g s: it is told to end", late.what, late.seconds)

    def _lost_threads(self, path: str) -> None:
        self._failure = StuckError(f"{path} and others do not end: the process starts again")
        self._loop.stop()

    # ---- what the routes ask for ----

    def _age_ms(self, topic: str) -> int | None:
        age = self._instance.subscriptions.age(topic)
        return round(age * 1000) if age is not None else None

    def stats(self) -> Stats:
        instance, database, config, copy = self._instance, self._database, self._config, self._copy
        silent = instance.subscriptions.silent_seconds
        return Stats(
            name=config.name,
            node=config.node,
            version=__version__,
            ready=instance.ready,
            silent_seconds=round(silent, 3) if isfinite(silent) else None,
            records=instance.records,
            failures=instance.failures,
            late_calls=self._late_calls,
            waiting_partitions=instance.waiting,
            dead_records=database.dead,
            outbox_records=database.outgoing,
            wal_bytes=database.wal_bytes(),
            copy=CopyProgress(copy.bytes, max(0, copy.backlog), copy.failure) if copy is not None else None,
            topics=self._topics(),
        )

    def _topics(self) -> list[TopicProgress]:
        instance = self._instance
        positions, ends, loading = instance.positions(), instance.subscriptions.ends(), instance.generations.loading()
        found = []
        for topic in self._application.topics.values():
            numbers = {key[1] for key in (*positions, *ends) if key[0] == topic.name}
            partitions = []
            for number in sorted(numbers):
                position, end = positions.get((topic.name, number)), ends.get((topic.name, number))  # type: ignore[call-overload]
                offset = position.next_offset if position is not None else 0
                partitions.append(PartitionProgress(number, offset, end, (topic.name, number) in loading))
            view = view_name(topic.name) if topic.view is not None else None
            found.append(TopicProgress(topic.name, topic.scope, view, self._age_ms(topic.name), partitions))
        return found

    def readiness(self) -> Readiness:
        silent = self._instance.subscriptions.silent_seconds
        away = not isfinite(silent) or silent > AWAY_SECONDS
        why = ["the broker is away; it answers from what it has"] if away else []
        if not self._instance.ready:
            return Readiness("not ready", [*why, "not everything is there that was published when it began"])
        return Readiness("degraded" if away else "ready", why)

    def do(self, call: Call, job: Callable[[], tuple[Outcome, str]]) -> None:
        """Have the worker do something between two transactions, and answer with what became of it."""

        def work() -> None:
            try:
                outcome, message = job()
            except DatabaseError as error:
                outcome, message = Outcome.DISK_FULL, f"the local database cannot be written: {error}"
            except Exception:
                log.exception("%s failed", call.path)
                failed = Response(500, Failed("an internal error; see the log of the application"))
                self._loop.call_soon_threadsafe(lambda: call.answer(failed))
                return
            self._loop.call_soon_threadsafe(lambda: call.done(outcome, message))

        self._instance.submit(work)

    def _describe(self, call: Call) -> None:
        name, functions = self._config.name, self._application.routes
        self._queries.ask(call, lambda reader: document(name, self._routes, functions, self._views))
