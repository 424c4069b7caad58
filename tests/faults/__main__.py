"""Random faults, many times: `python -m tests.faults --seeds 1:500`.

Prints a line for each seed on standard error, and one JSON document: the seeds, what was violated by which of them, and
how much happened in all. Exit code 1 if anything was violated. A seed's schedule is had again by its number; what else
happens meanwhile is left to chance, as in real use.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.many import BACKENDS, Plan, run_all, run_cluster
from tests.faults.schedule import HAVE


def summary(outcomes: Sequence[dict[str, Any]], level: int, seconds: float, commit: str) -> dict[str, Any]:
    """Return what came of all schedules as one document."""
    counts: Counter[str] = Counter()
    for each in outcomes:
        counts.update(each["figures"])
    bad = [each for each in outcomes if "violations" in each]
    by_check = Counter(name for each in bad for name in each["violations"])
    return {
        "level": level,
        "schedules": len(outcomes),
        "by_backend": dict(Counter(each["backend"] for each in outcomes)),
        "seeds": _ranges([each["seed"] for each in outcomes]),
        "jobs_lost": by_check["nothing_lost"],
        "published_twice": by_check["releases_immutable"],
        "finished_repeated": by_check["finished_not_repeated"] + by_check["completed_once"],
        "violations": dict(by_check),
        "violated_by": bad,
        "figures": dict(counts),
        "seconds": round(seconds, 1),
        "machine": f"{os.cpu_count()} x {_processor()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "commit": commit,
    }


def _ranges(seeds: Iterable[int]) -> str:
    """Write numbers as ranges: "1:3,7:7", both ends included."""
    found: list[list[int]] = []
    for seed in sorted(seeds):
        if found and seed == found[-1][1] + 1:
            found[-1][1] = seed
        else:
            found.append([seed, seed])
    return ",".join(f"{first}:{last}" for first, last in found)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _seeds(text: str) -> list[int]:
    """Read "1:500" (both ends included) or "7,9"."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _names(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))


def main() -> int:
    """Run schedules and print what came of them; return 1 if anything was violated."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=_seeds, default=_seeds("1:50"), metavar="FIRST:LAST")
    arguments.add_argument("--level", type=int, choices=(1, 2), default=1)
    arguments.add_argument("--minutes", type=float, default=1e6, help="begin no schedule after so long")
    arguments.add_argument("--jobs", type=int, default=2, help="processes at once (level 1)")
    arguments.add_argument("--backend", choices=BACKENDS, help="only this database")
    arguments.add_argument(
        "--having", default=",".join(sorted(HAVE)), help="what the service has: lineage,outages,heartbeats,handover"
    )
    arguments.add_argument("--only", default="", help="faults to draw from, by name, whatever they need")
    arguments.add_argument("--out", type=Path, help="write the document to a file too")
    arguments.add_argument("--show", action="store_true", help="print the schedules, run nothing")
    options = arguments.parse_args()
    plan = Plan(options.level, _names(options.having), _names(options.only))
    backends = (options.backend,) if options.backend else BACKENDS
    if options.show:
        for number, seed in enumerate(options.seeds):
            schedule = plan.draw(seed, backends[number % len(backends)])
            sys.stdout.write(json.dumps(schedule.document(), indent=1) + "\n")
        return 0
    # Servers and their processes end with us, also when we are told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    commit, started, until = _commit(), time.monotonic(), time.time() + options.minutes * 60
    if plan.level == 1:
        outcomes = run_all(plan, options.seeds, backends, options.jobs, until)
    else:
        outcomes = run_cluster(plan, options.seeds, until)
    document = summary(outcomes, options.level, time.monotonic() - started, commit)
    text = json.dumps(document, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 1 if document["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
