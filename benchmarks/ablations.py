"""Ablations on a model: what each part of a method does to the packed release.

    python -m benchmarks.ablations correction --home FOLDER > benchmarks/results/correction-emoji32.json
    python -m benchmarks.ablations correction --home FOLDER --set sampler.eta=1.0 --set sampler.num_inference_steps=50
    python -m benchmarks.ablations step-bits --home FOLDER > benchmarks/results/step-bits-emoji32.json
    python -m benchmarks.ablations temporal --home FOLDER > benchmarks/results/temporal-emoji32.json
    python -m benchmarks.ablations scaling --recipe tfmq-w4a8 --set activations.bits=6 --set activations.range=mse \\
        --home FOLDER > benchmarks/results/scaling-emoji32.json
    python -m benchmarks.ablations mpqdm --recipe mpqdm-w2a4 --home FOLDER > benchmarks/results/mpqdm-w2a4-emoji32.json

Every row is a job of its own, as a user runs it, in one home: what rows share is computed once. Figures are those of
the packed artifact with its scheduler, against full precision, on held-out seeds; differences are from the first row,
paired by seed (`benchmarks.compare`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cli import give, parser, run_recipe
from benchmarks.compare import compare, read_job
from quant_core.metrics.frechet import efficientnet_lite0
from quant_spec.metrics import METRICS

#: What is left of the correction in each row, as overrides of a recipe.
CORRECTION = {
    "none": ["passes.correct=null"],
    "k": ["passes.correct={bias: false, variance: false}"],
    "k, bias": ["passes.correct={variance: false}"],
    "bias": ["passes.correct={scale: false, variance: false}"],
    "k, bias, variance": ["passes.correct={}"],
    "the same, k if r2 is at least 0.3": ["passes.correct={least_r2: 0.3}"],
    "the same, no gate": ["passes.correct={held_out: false}"],
}
#: Ways to spend a mean of 6 bits.
STEP_BITS = {
    "6 at all steps": ["activations.bits=6"],
    **{
        method: [f"activations.step_bits={{method: {method}, target_mean: 6.0}}"]
        for method in ("early_low", "late_low", "snr", "effect", "joint")
    },
}
#: TFMQ-DM's parts, on activation ranges for all steps and on ranges per step in the whole network.
TEMPORAL = {
    "static": ["activations.mode=static"],
    "static, TIAR": ["activations.mode=static", "passes.temporal={finite_set: false}"],
    "static, FSC": ["activations.mode=static", "passes.temporal={method: closed_form}"],
    "static, TIAR and FSC": ["activations.mode=static", "passes.temporal={}"],
    "static, tables": ["activations.mode=static", "passes.temporal={cache: true}"],
    "per step": [],
    "per step, TIAR": ["passes.temporal={}"],
    "per step, tables": ["passes.temporal={cache: true}"],
}
#: DMQ's parts.
SCALING = {
    "none": ["passes.scale=null"],
    "scales": ["passes.scale={weighting: uniform}"],
    "scales, weighted steps": ["passes.scale={}"],
    "scales, weighted steps, powers of two": ["passes.scale={shift: skip}"],
    "scales, early steps": ["passes.scale={weighting: early}"],
    "powers of two alone": ["passes.scale={method: none, shift: skip}"],
    "scales and powers of two, uniform": ["passes.scale={weighting: uniform, shift: skip}"],
    "SmoothQuant, exponent 0.5": ["passes.scale={method: smooth}"],
}
#: MPQ-DM's parts; the recipe's exceptions at 8 bits are the same in all rows.
MPQDM = {
    "closed form, min-max": ["passes.allocate=null", "passes.distill=null", "activations.range=minmax"],
    "closed form, searched ranges": ["passes.allocate=null", "passes.distill=null"],
    "kurtosis": ["passes.allocate.method=kurtosis", "passes.distill=null"],
    "global": ["passes.distill=null"],
    "uniform, relations distilled too": ["passes.allocate=null"],
    "kurtosis, relations distilled too": ["passes.allocate.method=kurtosis"],
    "global, predictions distilled": ["passes.distill.relations=false"],
    "global, relations distilled too": [],
}
TABLES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "correction": CORRECTION,
    "step-bits": STEP_BITS,
    "temporal": TEMPORAL,
    "scaling": SCALING,
    "mpqdm": MPQDM,
}


def run_row(recipe: str, model: str, home: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run one job and return its figures, with what they were measured with."""
    job = run_recipe(recipe, model, home, overrides)
    figures = {name: job.metrics[name] for name, metric in METRICS.items() if metric.is_required}
    return {"job": job.job, "overrides": list(overrides), "seconds": job.seconds, **figures}


def add_differences(results: dict[str, dict[str, Any]], home: Path) -> None:
    """Add to every row how it differs from the first."""
    extractor = efficientnet_lite0()
    first, *others = (read_job(home, row["job"], extractor) for row in results.values())
    for row, measured in zip(list(results.values())[1:], others, strict=True):
        row |= compare(first, measured, draws=500, seed=0)


def main() -> None:
    """Run the rows of one table and print one JSON document."""
    options = parser(__doc__)
    options.add_argument("table", choices=TABLES)
    options.add_argument("--recipe", default="fast-w4a8")
    options.add_argument("--model", default="examples/models/emoji32")
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--rows", nargs="+", help="only these")
    options.add_argument("--set", action="append", default=[], dest="overrides", help="for all rows")
    arguments = options.parse_args()
    rows = TABLES[arguments.table]
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.rows or rows:
        overrides = [*rows[name], *arguments.overrides]
        results[name] = run_row(arguments.recipe, arguments.model, arguments.home, overrides)
        psnr, interval, distance = (results[name][key] for key in ("psnr_db", "psnr_db_ci95", "fd"))
        sys.stderr.write(f"{name}: {psnr:.2f} +- {interval:.2f} dB, FD {distance:.3f}\n")
    add_differences(results, arguments.home)
    give({"table": arguments.table, "recipe": arguments.recipe, "model": arguments.model, "rows": results})


if __name__ == "__main__":
    main()
