"""What a search finds, beside recipes with one width for all layers: all as a user runs it, in one home.

    python -m benchmarks.search --home FOLDER [--spec FILE] [--bits 3 4 5] [--seeds 256] --out FILE

The search runs first, so that in an empty folder its seconds count everything from the model on. Then the base recipe
runs at each width, and finds calibration and references there. All figures are of packed files, loaded again, against
full precision on the same held-out seeds. `above_uniform_db`: for each uniform recipe, how far the best point of the
search that is not larger is above it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cli import Job, give, parser, run_recipe

SPEC = Path("examples/searches/emoji.yaml")


def run_search(spec: Path, home: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run a search to its end and return what `--json` says; CalledProcessError if it did not succeed."""
    base = [sys.executable, "-m", "orchestrator.cli", "--home", str(home), "search", "run", str(spec), "--json"]
    sets = [argument for override in overrides for argument in ("--set", override)]
    done = subprocess.run([*base, *sets], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def above_uniform(points: Sequence[Mapping[str, Any]], uniform: Sequence[Job]) -> list[dict[str, Any]]:
    """Return, for each uniform recipe, its size and PSNR, and how far the best point within that size is above it.

    None where the search has no point of that size.
    """
    rows = []
    for job in uniform:
        size, psnr = job.metrics["bytes"], job.metrics["psnr_db"]
        within = [point["psnr_db"] for point in points if point["n"] and point["on_front"] and point["bytes"] <= size]
        rows.append({"bytes": size, "psnr_db": psnr, "above_db": round(max(within) - psnr, 4) if within else None})
    return rows


def main() -> None:
    """Measure, and write one JSON document."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--spec", type=Path, default=SPEC)
    options.add_argument("--bits", type=int, nargs="*", default=[3, 4, 5])
    options.add_argument("--seeds", type=int, default=256, help="samples that are compared with full precision")
    options.add_argument("--out", type=Path)
    arguments = options.parse_args()
    spec = yaml.safe_load(arguments.spec.read_text(encoding="utf-8"))
    seeds = f"evaluation.seeds={arguments.seeds}"
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    found = run_search(arguments.spec, arguments.home, [f"set={json.dumps({'evaluation.seeds': arguments.seeds})}"])
    document: dict[str, Any] = {"spec": spec, "seeds": arguments.seeds, **machine, "search": found}
    give(document, arguments.out)
    folder = arguments.spec.parent
    recipe = folder / spec["recipe"] if (folder / spec["recipe"]).is_file() else spec["recipe"]
    (model,) = spec["models"]
    place = folder / model if (folder / model).is_dir() else model
    jobs = [
        run_recipe(str(recipe), str(place), arguments.home, [f"weights.bits={bits}", seeds]) for bits in arguments.bits
    ]
    (points,) = found["models"].values()
    kept = ("recipe", "release", "digest", "tasks", "seconds", "metrics")
    document["uniform"] = [
        {"bits": bits, **{name: getattr(job, name) for name in kept}}
        for bits, job in zip(arguments.bits, jobs, strict=True)
    ]
    document["above_uniform_db"] = above_uniform(points, jobs)
    give(document, arguments.out)


if __name__ == "__main__":
    main()
