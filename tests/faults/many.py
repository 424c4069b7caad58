"""Many schedules: of the first level in several processes, of the second one after the other."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults import level1, level2
from tests.faults.cluster import Servers
from tests.faults.cluster_faults import CLUSTER_FAULTS
from tests.faults.databases import Databases
from tests.faults.faults import FAULTS, Fault, Submitted
from tests.faults.outcome import Outcome
from tests.faults.schedule import HAVE, Schedule, draw
from tests.faults.servers import wheel_postgres

BACKENDS = ("sqlite", "postgres")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is drawn from: the level, what the service has of that some faults need, and the only faults (all: none)."""

    level: int = 1
    having: frozenset[str] = HAVE
    only: frozenset[str] = frozenset()

    def draw(self, seed: int, backend: str) -> Schedule:
        """Draw a seed's schedule."""
        faults = FAULTS if self.level == 1 else CLUSTER_FAULTS
        if unknown := self.only - {kind.__name__ for kind in faults}:
            wanted = ", ".join(kind.__name__ for kind in faults)
            raise SystemExit(f"faults: got {', '.join(sorted(unknown))}, wanted some of {wanted}")
        chosen: dict[type[Fault], int] = {
            kind: weight for kind, weight in faults.items() if not self.only or kind.__name__ in self.only
        }
        # There must be work to disturb.
        chosen.setdefault(Submitted, 2)
        having = self.having | HAVE if self.only else self.having
        if self.level == 1:
            return draw(seed, postgres=backend == "postgres", having=having, faults=chosen)
        return draw(seed, postgres=True, having=having, faults=chosen, steps=(3, 7), pause=2.5)


def run_seeds(plan: Plan, seeds: Sequence[int], postgres: str | None, until: float) -> list[dict[str, Any]]:
    """Run schedules of the first level one after the other, until the clock says `until`; return what came of each."""
    backend = "sqlite" if postgres is None else "postgres"
    with tempfile.TemporaryDirectory(prefix="quantmill-faults-") as folder:
        databases = Databases(Path(folder), postgres)
        return _each(plan, backend, seeds, databases, Path(folder), partial(level1.run, having=plan.having), until)


def run_cluster(plan: Plan, seeds: Sequence[int], until: float) -> list[dict[str, Any]]:
    """Run schedules of the second level one after the other, on the same servers."""
    servers = Servers()
    try:
        databases = Databases(servers.folder, servers.postgres.url)
        run = partial(level2.run, servers, having=plan.having)
        return _each(plan, "cluster", seeds, databases, servers.folder, run, until)
    finally:
        servers.close()


def _each(
    plan: Plan,
    backend: str,
    seeds: Sequence[int],
    databases: Databases,
    folder: Path,
    run: Callable[[Schedule, str, Path], Outcome],
    until: float,
) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
        if time.time() > until:
            break
        home = folder / f"seed-{seed}"
        home.mkdir()
        with databases.one() as url:
            outcome = run(plan.draw(seed, backend), url, home)
        found.append(outcome.document())
        bad = f" VIOLATED {json.dumps(outcome.violations)}" if outcome.violations else ""
        sys.stderr.write(f"seed {seed} {outcome.backend} {outcome.seconds:.1f} s{bad}\n")
        sys.stderr.flush()
    return found


def run_all(plan: Plan, seeds: Sequence[int], backends: Sequence[str], jobs: int, until: float) -> list[dict[str, Any]]:
    """Run each seed of the first level on one backend, in turn, in several processes."""
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
            for part in _parts(mine, max(1, len(mine) // (jobs * 8))):
                work.append(pool.submit(run_seeds, plan, part, url if backend == "postgres" else None, until))
        return sorted((each for done in as_completed(work) for each in done.result()), key=lambda each: each["seed"])


def _parts(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
