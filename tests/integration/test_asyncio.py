"""The clients for asyncio: nothing blocks the event loop, nothing is lost by a cancelled call, order holds."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edgebroker.client.asynchronous import AsyncConsumer, AsyncProducer
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import AnswerError, ArgumentError
from tests.kit.brokers import SECONDS, RunningBroker, batch_of, numbered, running

pytestmark = pytest.mark.slow
T = TypeVar("T")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, SECONDS))


def consumer(broker: RunningBroker, group: str = "g", **options: Any) -> AsyncConsumer:
    return AsyncConsumer(Consumer(broker.server, ["t"], group, **options))


def test_records_in_order(broker: RunningBroker) -> None:
    async def main() -> list[int]:
        async with AsyncProducer(Producer(broker.server, max_unacked=10, batch_records=3)) as producer:
            sent = [await producer.send("t", b"%d" % number) for number in range(200)]
            assert await producer.send_and_wait("t", b"last", b"key", headers=[("a", b"1")]) == 200
            return await asyncio.gather(*sent)

    assert run(main()) == list(range(200))

    async def read() -> list[bytes | None]:
        found = []
        async with consumer(broker) as reader:
            async for record in reader:
                found.append(record.value)
                if record.value == b"last":
                    return found
        raise AssertionError

    assert run(read()) == [*(b"%d" % number for number in range(200)), b"last"]


def test_the_loop_goes_on_meanwhile(broker: RunningBroker) -> None:
    """While a topic is asked about at a broker that does not answer, and while a poll waits."""

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        producer = AsyncProducer(Producer("127.0.0.1:1", timeout=0.3))
        with pytest.raises(Exception, match="no broker at"):
            await producer.send("t", b"v")
        await producer.close(0.1)
        async with consumer(broker, missing_topic="wait") as reader:
            assert await reader.poll(0.3) == []
        assert ticks > 20
        ticking.cancel()

    run(main())


def test_a_refusal_comes_with_the_future(broker: RunningBroker) -> None:
    async def main() -> None:
        async with AsyncProducer(Producer(broker.server)) as producer:
            with pytest.raises(AnswerError):
                await producer.send_and_wait("t.dlq", b"v")
            with pytest.raises(ArgumentError):
                await producer.send("a b", b"v")
            assert await producer.send_and_wait("t", b"v") == 0
        with pytest.raises(ValueError, match="closed"):
            await producer.send("t", b"v")

    run(main())


def test_a_cancelled_poll_loses_nothing(broker: RunningBroker) -> None:
    async def main() -> list[bytes | None]:
        found = []
        async with consumer(broker) as reader:
            waiting = asyncio.create_task(reader.poll())
            await asyncio.sleep(0.01)
            waiting.cancel()
            broker.raw().publish("t", batch_of(b"1", b"2"))
            await asyncio.sleep(0.2)
            found += [record.value for record in await reader.poll()]
            stream = aiter(reader)
            step = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.01)
            step.cancel()
            broker.raw("more").publish("t", batch_of(b"3"))
            await asyncio.sleep(0.2)
            found += [record.value for record in [await anext(aiter(reader))]]
        return found

    broker.create("t")
    assert run(main()) == [b"1", b"2", b"3"]


def test_acknowledging(broker: RunningBroker) -> None:
    broker.raw().publish("t", numbered(0, 10))

    async def main() -> None:
        async with consumer(broker, auto_ack=False) as reader:
            records = await reader.poll()
            waiting = asyncio.create_task(reader.poll())
            await reader.ack(records[4])
            await reader.commit()
            assert committed(broker) == 5
            await reader.nack(records[5], "no")
            assert [record.offset for record in await waiting] == [5]
            await reader.seek("t", 0, 8)
            assert [record.offset for record in await reader.poll()] == [8, 9]
            assert (await reader.next_offsets())["t", 0] == 10
            await reader.in_progress()
            assert list(await reader.positions()) == [("t", 0)]

    run(main())


def test_leaving_the_block_acknowledges(broker: RunningBroker) -> None:
    broker.raw().publish("t", numbered(0, 3))

    async def main() -> None:
        async with consumer(broker) as reader:
            assert len(await reader.poll()) == 3
        reader = consumer(broker, "h")
        waiting = asyncio.create_task(reader.poll())
        await asyncio.sleep(0.2)
        assert len(await waiting) == 3
        waiting = asyncio.create_task(reader.poll())
        await asyncio.sleep(0.01)
        await reader.close()
        assert await waiting == []
        await reader.close()

    run(main())
    assert committed(broker) == 3


def committed(broker: RunningBroker) -> int:
    found: int = broker.http("GET", "/v1/groups/g")[1]["partitions"][0]["committed"]
    return found


def test_a_position_a_dead_letter_and_what_is_applied(broker: RunningBroker) -> None:
    broker.raw().publish("t", numbered(0, 4))

    async def main() -> None:
        async with consumer(broker, auto_ack=False) as reader:
            records = await reader.poll(SECONDS)
            assert (await reader.position_after(records[1])).next_offset == 2
            await reader.applied("t", 0, 1)
            await reader.reject(records[2], "no")
            await reader.switch()
            (last,) = await reader.poll(SECONDS)
            assert last.offset == 3

    run(main())
    assert broker.counters()["dead_letters"] == 1
