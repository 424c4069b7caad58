"""Quality, size and time of the shipped recipes on a model: one job each, as a user runs it.

    python -m benchmarks.recipes --model examples/models/emoji32 --home FOLDER > benchmarks/results/recipes-emoji32.json
    python -m benchmarks.recipes --recipes modiff-w4a6 modiff-w4a4 modiff-w4a3 --home FOLDER \
        > benchmarks/results/modiff-emoji32.json
    python -m benchmarks.recipes --table benchmarks/results/recipes-emoji32.json

Every figure is the job's own: of the packed artifact, loaded again, against full precision, on held-out seeds. Each
recipe gets a home of its own, so that its seconds count everything from submit to release; a home that has run before
answers from its records, and then `seconds` tell nothing (`tasks.cached` shows it). `--table` lays recorded results out
as the README has them.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cli import Job, give, parser, run_recipe
from orchestrator.text import human_seconds
from quant_spec.metrics import Place, headings, lines

RECIPES = ("minmax-w8a8", "qdiffusion-w8a8", "fast-w4a8", "qdiffusion-w4a8", "tfmq-w8a8", "tfmq-w4a8")


def result(job: Job) -> dict[str, Any]:
    """Return what is recorded of a job."""
    kept = ("recipe", "release", "digest", "tasks", "seconds", "metrics")
    return {name: getattr(job, name) for name in kept}


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return recorded results as the README's table; jobs that found tasks done have no time."""
    columns = ["recipe", *headings(Place.README).values(), "submit to release"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for each in results:
        figures = [text for _, text in lines(Place.README, each["metrics"]).values()]
        took = "–" if each["tasks"]["cached"] else human_seconds(each["seconds"])
        cells = [f"`{each['recipe']}`", *figures, took]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Run all recipes and print one JSON document, or the table of one that was printed before."""
    options = parser(__doc__)
    options.add_argument("--model", default="examples/models/emoji32")
    options.add_argument("--home", type=Path)
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--set", nargs="+", default=[], metavar="A.B=V", help="as of `quantmill run`, for each recipe")
    options.add_argument("--table", type=Path, metavar="FILE", help="recorded results; nothing is run")
    arguments = options.parse_args()
    if arguments.table:
        recorded = json.loads(arguments.table.read_text(encoding="utf-8"))
        sys.stdout.write(markdown(recorded["results"]) + "\n")
        return
    if arguments.home is None:
        options.error("--home: got none, wanted a folder")
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "ray", "quantmill")}
    homes = {recipe: arguments.home / recipe for recipe in arguments.recipes}
    jobs = [run_recipe(recipe, arguments.model, home, arguments.set) for recipe, home in homes.items()]
    given = {"set": arguments.set} if arguments.set else {}
    found = [result(job) for job in jobs]
    give({"model": arguments.model, **given, **machine, "versions": versions, "results": found})


if __name__ == "__main__":
    main()
