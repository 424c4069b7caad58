"""One process of a benchmark of another queue, beside ours.

    python -P benchmarks/other_queues.py NAME enqueue URL JOBS
    python -P benchmarks/other_queues.py NAME drain URL SECONDS

NAME is "procrastinate" or "pgqueuer", as they come: jobs that do nothing, a worker that runs eight at once. `drain`
waits for a line on standard input; it works for so long, or until there is nothing left. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

CONCURRENCY = 8


class Count:
    """How many jobs ran, and when the first and last did."""

    def __init__(self) -> None:
        self.done, self.started = 0, time.time()
        self.last = self.started

    def note(self) -> None:
        """Count one."""
        self.done += 1
        self.last = time.time()

    async def until_idle(self, seconds: float) -> None:
        """Return after so long, or when nothing has run for a second."""
        while time.time() - self.started < seconds and (time.time() - self.last < 1.0 or not self.done):
            await asyncio.sleep(0.05)


async def procrastinate(command: str, url: str, amount: float) -> Count:
    """Work with procrastinate."""
    import procrastinate as library

    app = library.App(connector=library.PsycopgConnector(conninfo=url))
    count = Count()

    @app.task(name="noop")
    async def noop(number: int) -> None:
        count.note()

    async with app.open_async():
        if command == "enqueue":
            await app.schema_manager.apply_schema_async()
            for start in range(0, int(amount), 1000):
                stop = min(start + 1000, int(amount))
                await noop.batch_defer_async(*[{"number": number} for number in range(start, stop)])
            return count
        sys.stdin.readline()
        count.started = count.last = time.time()
        worker = asyncio.create_task(
            app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False, wait=True)
        )
        await count.until_idle(amount)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    return count


async def pgqueuer(command: str, url: str, amount: float) -> Count:
    """Work with pgqueuer."""
    import psycopg
    from pgqueuer import PgQueuer
    from pgqueuer.db import PsycopgDriver
    from pgqueuer.queries import Queries

    count = Count()
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        driver = PsycopgDriver(connection)
        if command == "enqueue":
            queries = Queries(driver)
            await queries.install()
            for start in range(0, int(amount), 1000):
                size = min(1000, int(amount) - start)
                await queries.enqueue(["noop"] * size, [b"x"] * size, [0] * size)
            return count
        queuer = PgQueuer(driver)

        @queuer.entrypoint("noop")
        async def noop(job: Any) -> None:
            count.note()

        sys.stdin.readline()
        count.started = count.last = time.time()
        worker = asyncio.create_task(queuer.run(batch_size=CONCURRENCY))
        await count.until_idle(amount)
        queuer.shutdown.set()
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    return count


def main(arguments: list[str]) -> None:
    """Do what the arguments say and print the figures."""
    name, command, url, amount = arguments
    cpu = time.process_time()
    count = asyncio.run((procrastinate if name == "procrastinate" else pgqueuer)(command, url, float(amount)))
    seconds = time.process_time() - cpu
    figures = {"done": count.done, "started": count.started, "last": count.last, "cpu_seconds": seconds}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
