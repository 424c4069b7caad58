"""Many schedules, in several processes."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.faults.databases import Databases
from tests.faults.level1 import run
from tests.faults.schedule import draw
from tests.faults.servers import wheel_postgres

BACKENDS = ("sqlite", "postgres")


def run_seeds(seeds: Sequence[int], postgres: str | None, having: frozenset[str], until: float) -> list[dict[str, Any]]:
    """Run schedules one after the other, until the clock says `until`; return what came of each."""
    found = []
    with tempfile.TemporaryDirectory(prefix="quantmill-faults-") as folder:
        databases = Databases(Path(folder), postgres)
        for seed in seeds:
            if time.time() > until:
                break
            home = Path(folder, str(seed))
            home.mkdir()
            with databases.one() as url:
                outcome = run(draw(seed, postgres=postgres is not None, having=having), url, home, having)
            found.append(outcome.document())
            bad = f" VIOLATED {json.dumps(outcome.violations)}" if outcome.violations else ""
            sys.stderr.write(f"seed {seed} {outcome.backend} {outcome.seconds:.1f} s{bad}\n")
            sys.stderr.flush()
    return found


def run_all(
    seeds: Sequence[int], backends: Sequence[str], having: frozenset[str], jobs: int, minutes: float
) -> list[dict[str, Any]]:
    """Run each seed on one backend, in turn, in several processes."""
    until = time.time() + minutes * 60
    with ExitStack() as stack:
        url = stack.enter_context(wheel_postgres()) if "postgres" in backends else None
        if url is not None:
            # Its template is made once, before the processes that copy it.
            with tempfile.TemporaryDirectory() as folder:
                Databases(Path(folder), url)
        context = multiprocessing.get_context("spawn")
        pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context))
        work = []
        for number, backend in enumerate(backends):
            mine = seeds[number :: len(backends)]
            for part in _parts(mine, max(1, len(mine) // (jobs * 8) or 1)):
                work.append(pool.submit(run_seeds, part, url if backend == "postgres" else None, having, until))
        return sorted((each for done in as_completed(work) for each in done.result()), key=lambda each: each["seed"])


def _parts(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
