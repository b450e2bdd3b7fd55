"""Load on a server: a closed loop of clients, or Poisson arrivals, limited by count and by time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxpaged.app.bench_serve.client import Client, Record
from jaxpaged.app.bench_serve.workload import RequestSpec


@dataclass(frozen=True)
class Load:
    """A level of load."""

    clients: int | None = None
    """Clients that each send the next request when the one before is answered."""
    rate: float | None = None
    """Requests per second of a Poisson process, independent of the server."""

    def __str__(self) -> str:
        if self.clients is None:
            return f"{self.rate:g}/s"
        return f"{self.clients} client{'' if self.clients == 1 else 's'}"

    @property
    def value(self) -> float:
        """Position on the axis of a plot."""
        return float(self.clients or self.rate or 0)


async def apply_load(
    client: Client,
    specs: Sequence[RequestSpec],
    load: Load,
    *,
    time_limit: float,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Record]:
    """Sends all requests; those not answered within ``time_limit`` seconds are errors.

    Args:
      progress: called with the number of answered requests, after each.

    Returns:
      A record per request, including those that were never sent.
    """
    started = client.clock()
    records: list[Record] = []

    async def send(spec: RequestSpec, arrival: float) -> None:
        record = client.record(spec, arrival)
        records.append(record)
        await client.complete(spec, record)
        progress(sum(record.finished is not None for record in records))

    async def one_client(queue: asyncio.Queue[RequestSpec]) -> None:
        while not queue.empty():
            await send(queue.get_nowait(), client.clock())

    async def at_its_time(spec: RequestSpec) -> None:
        arrival = started + (spec.arrival or 0.0)
        await client.sleep(max(0.0, arrival - client.clock()))
        # Latency counts from the planned arrival, even if this client is late.
        await send(spec, arrival)

    try:
        async with asyncio.timeout(time_limit), asyncio.TaskGroup() as group:
            if load.clients is not None:
                queue: asyncio.Queue[RequestSpec] = asyncio.Queue()
                for spec in specs:
                    queue.put_nowait(spec)
                for _ in range(min(load.clients, len(specs))):
                    group.create_task(one_client(queue))
            else:
                for spec in specs:
                    group.create_task(at_its_time(spec))
    except TimeoutError:
        sent = len(records)
        records += [client.record(spec, client.clock()) for spec in specs[sent:]]
        for record in records:
            if record.finished is None:
                record.finished, record.error = (
                    client.clock(),
                    f"not answered within the level's {time_limit:g} s",
                )
    return records
