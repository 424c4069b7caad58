"""Quality, size and time of the shipped recipes on a model: one job each, as a user runs it.

    python -m benchmarks.recipes --model examples/models/emoji32 --home FOLDER > benchmarks/results/recipes-emoji32.json

Every figure is the job's own: of the packed artifact, loaded again, against full precision, on held-out seeds. Each
recipe gets a home of its own, so that its seconds count everything from submit to release; a home that has run before
answers from its records, and then `seconds` tell nothing (`tasks.cached` shows it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RECIPES = ("minmax-w8a8", "qdiffusion-w8a8", "fast-w4a8", "qdiffusion-w4a8", "tfmq-w8a8", "tfmq-w4a8")


def run_recipe(recipe: str, model: str, home: Path) -> dict[str, Any]:
    """Run one job and return what `quantmill run --json` says of it, with the seconds of each kind of task."""
    base = [sys.executable, "-m", "orchestrator.cli", "--home", str(home)]
    done = subprocess.run(
        [*base, "run", recipe, "--model", model, "--json"], capture_output=True, check=True, text=True
    )
    job = json.loads(done.stdout)
    kept = ("recipe", "release", "digest", "tasks", "seconds", "metrics")
    return {key: job[key] for key in kept}


def main() -> None:
    """Run all recipes and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/emoji32")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    arguments = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "ray", "quantmill")}
    results = [run_recipe(recipe, arguments.model, arguments.home / recipe) for recipe in arguments.recipes]
    print(json.dumps({"model": arguments.model, **machine, "versions": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
