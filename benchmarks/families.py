"""Which families of pipelines are quantized, loaded and called: a table, made by doing it with tiny random ones.

    python -m benchmarks.families --folder FOLDER --out benchmarks/results/families.json --table docs/families.md

Each family has random weights of a few thousand numbers: what is shown is that its call is watched, recorded, replayed
and answered by packed layers, in float32 and bfloat16; not how good its images are. Tasks run in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.cli import give, parser
from orchestrator.cli.main import run_cli
from tests.family_run import RefusedError, run_family
from tests.orchestrator.in_process import InProcess
from tests.tiny_families import FAMILIES

_HEAD = """# Families of pipelines

No pipeline class is known to Quantmill by name: each of these was saved with tiny random weights, added, quantized by
`quantmill run {recipe}`, pulled, loaded by `DiffusionPipeline.from_pretrained` and called, by
`python -m benchmarks.families` (diffusers {diffusers}, torch {torch}). PSNR is that of its images against full
precision; of random weights it says only that the steps were the right ones. What a pipeline needs that prompts do not
say is refused when you submit, with what is missing.

| pipeline | what it shows | files in the prompts file | quantized layers | PSNR, dB | float32 | bfloat16 |
|---|---|---|---|---|---|---|
"""


def show(name: str, folder: Path, recipe: str) -> dict[str, Any]:
    """Return what is recorded of one family."""

    def run(*words: str | Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = run_cli(["--home", str(folder / "home"), *map(str, words)])
        if code:
            raise RefusedError(said.getvalue().strip().splitlines()[-1])

    outcome = run_family(name, folder, run, recipe)
    family = FAMILIES[name]
    return {
        "family": name,
        "pipeline": outcome.pipeline,
        "shows": (family.make.__doc__ or "").strip().rstrip("."),
        "files": [*family.images, *family.arrays],
        "refused": outcome.refused,
        "layers": outcome.layers,
        "psnr_db": outcome.psnr_db,
        "finite": {kind: bool(np.isfinite(images).all()) for kind, images in outcome.images.items()},
    }


def run_all(names: Sequence[str], folder: Path | None, recipe: str) -> list[dict[str, Any]]:
    """Run families one after the other, and say what became of each at once."""
    results = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        patch("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess()),
    ):
        for name in names:
            results.append(show(name, folder or Path(temporary), recipe))
            sys.stderr.write(row(results[-1]) + "\n")
    return results


def row(result: dict[str, Any]) -> str:
    """Return one line of the table."""
    first = [result["pipeline"], result["shows"], ", ".join(f"`{name}`" for name in result["files"])]
    if result["refused"] is not None:
        return f"| {' | '.join(first)} | refused: {result['refused']} ||||"
    works = ["works" if finite else "not finite" for finite in result["finite"].values()]
    psnr = f"{result['psnr_db']:.1f}"
    return f"| {' | '.join([*first, str(result['layers']), psnr, *works])} |"


def main() -> None:
    """Run all families, print one JSON document and write the table."""
    options = parser(__doc__)
    options.add_argument(
        "--folder", type=Path, help="where everything is made; by default one that is deleted after it"
    )
    options.add_argument("--recipe", default="minmax-w8a8")
    options.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    options.add_argument("--recorded", type=Path, nargs="+", help="lay out what earlier runs recorded; run nothing")
    options.add_argument("--out", type=Path)
    options.add_argument("--table", type=Path)
    arguments = options.parse_args()
    if arguments.recorded:
        results = [each for path in arguments.recorded for each in json.loads(path.read_text())["results"]]
        results.sort(key=lambda each: list(FAMILIES).index(each["family"]))
    else:
        results = run_all(arguments.families, arguments.folder, arguments.recipe)
    versions = {name: metadata.version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")}
    give({"recipe": arguments.recipe, "versions": versions, "results": results}, arguments.out)
    if arguments.table is not None:
        arguments.table.write_text(
            _HEAD.format(recipe=arguments.recipe, **versions) + "\n".join(map(row, results)) + "\n"
        )


if __name__ == "__main__":
    main()
