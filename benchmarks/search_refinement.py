"""How a search goes on from its table of sensitivities: which proposer finds the better allocation for as many samples.

    pip install optuna==4.6.0
    python -m benchmarks.search_refinement --model examples/models/digits --work FOLDER --out FILE

For each size and repetition every proposer may draw as many samples as `--candidates` models of `--seeds` samples take:

    table       the knapsack on the table as it is: one candidate
    surrogate   rounds of a quarter of the candidates; the table is corrected by what was measured, and drawn from the
                posterior (what `quantmill search` does)
    tpe         Optuna's TPE draws a factor for each unit's damages, the knapsack gives the allocation
    halving     as many allocations of tables with random factors as the samples allow, the better half of which gets
                twice the seeds, until one is left

What each holds for its best is measured once more on `--held-out` seeds that no proposer saw. Models are built from the
states that would be packed; sizes are mean bits of the weights. The folder keeps what was computed.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cli import give, keep, parser
from benchmarks.search_prediction import BY_UNIT, Bench
from quant_core.metrics.psnr import psnr_per_sample
from quant_core.search.knapsack import cheapest
from quant_core.search.proposals import propose
from quant_core.search.space import Costs, build_space
from quant_spec.allocation import Allocation
from quant_spec.enums import Objective, SampleSpace
from quant_spec.search import SearchBudget
from quant_spec.tasks.propose import MeasuredPoint, Params

SCORE = "two points" + BY_UNIT
HELD_OUT_SEED = 4_000_000
Bits = dict[str, int]


def table_of(bench: Bench) -> dict[str, Any]:
    """Return the table of sensitivities as `propose` reads it; bytes are those of codes."""
    layers: dict[str, Any] = {}
    units = {name: unit.unit for unit in bench.menu for name in unit.activations["base"].formats.layers}
    for (layer, width), damage in bench.damages[SCORE].weights.items():
        count = bench.denoiser.model.get_parameter(f"{layer}.weight").numel()
        entry = layers.setdefault(
            layer, {"weights": {}, "activations": {}, "keep": {"bytes": 4 * count}, "parameters": count, "macs": count}
        )
        if layer not in ("conv_in", "conv_out") or width == bench.base[layer].weight.bits:
            entry["weights"][str(width)] = {"damage": float(damage), "bytes": count * width / 8}
    return {"layers": layers, "base_bytes": 0, "unit": units}


@dataclass
class Meter:
    """Measures allocations, and counts the samples that were drawn for it."""

    bench: Bench
    references: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    drawn: int = 0

    def psnr(self, bits: Mapping[str, int], seeds: range) -> float:
        """Return the mean PSNR of a model's samples against full precision, in dB."""
        self.drawn += len(seeds)
        key = seeds.start, seeds.stop
        if key not in self.references:
            self.references[key] = self.bench.samples(self.bench.denoiser.model, seeds)
        made = self.bench.samples(self.bench.quantized(bits), seeds)
        return float(psnr_per_sample(self.references[key], made, SampleSpace.PIXELS).mean())


@dataclass(frozen=True)
class Task:
    """One size, and how much may be drawn for it."""

    table: Mapping[str, Any]
    bits: float
    candidates: int
    seeds: range
    repetition: int

    @property
    def budget(self) -> SearchBudget:
        """The size as a search states it."""
        return SearchBudget(weight_bits_mean=self.bits)

    def solve(self, factors: Mapping[str, float]) -> Bits:
        """Return the best allocation if the damages of each unit are multiplied by a factor."""
        layers = {}
        for name, entry in self.table["layers"].items():
            factor = factors.get(self.table["unit"][name], 1.0)
            weights = {key: {**cost, "damage": cost["damage"] * factor} for key, cost in entry["weights"].items()}
            layers[name] = {**entry, "weights": weights}
        space = build_space({**self.table, "layers": layers}, Costs(), limited=["weight_bits_mean"])
        places = cheapest(space.choices, space.limits(self.budget)).places.tolist()
        return chosen(self.table, space.allocation("base", places))


def chosen(table: Mapping[str, Any], allocation: Allocation) -> Bits:
    """Return each layer's width; layers of one choice are not in an allocation."""
    found = {}
    for name, entry in table["layers"].items():
        choice = allocation.layers.get(name)
        only = min(map(int, entry["weights"]))
        found[name] = only if choice is None or choice.weight_bits is None else int(choice.weight_bits)
    return found


def by_table(task: Task, meter: Meter) -> Bits:
    """Take the knapsack's answer as it is."""
    return task.solve({})


def by_surrogate(task: Task, meter: Meter) -> Bits:
    """Go on as a search does: rounds of proposals that learn from what was measured."""
    measured: list[MeasuredPoint] = []
    found: list[tuple[float, Bits]] = []
    a_round = max(task.candidates // 4, 1)
    while len(found) < task.candidates:
        params = Params(
            variants=("base",),
            budgets=(task.budget,),
            objective=Objective.PSNR_DB,
            candidates=min(a_round, task.candidates - len(found)),
            measured=tuple(measured),
            seed=task.repetition,
        )
        for point in propose({"base": task.table}, params)["points"]:
            allocation = Allocation.model_validate(point["allocation"])
            bits = chosen(task.table, allocation)
            psnr = meter.psnr(bits, task.seeds)
            within = point["predicted"]["bits_mean"] <= task.bits + 1e-4
            found.append((psnr if within else -math.inf, bits))
            measured.append(MeasuredPoint(allocation=allocation, psnr_db=psnr, bytes=0))
    return max(found, key=lambda each: each[0])[1]


def by_tpe(task: Task, meter: Meter) -> Bits:
    """Ask Optuna for a factor of each unit, and tell it what its allocation gave."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    units = sorted(set(task.table["unit"].values()))
    sampler = optuna.samplers.TPESampler(seed=task.repetition, n_startup_trials=max(task.candidates // 3, 2))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(dict.fromkeys(units, 0.0))
    found: dict[int, Bits] = {}
    for _ in range(task.candidates):
        trial = study.ask()
        factors = {unit: math.exp(trial.suggest_float(unit, -1.5, 1.5)) for unit in units}
        found[trial.number] = task.solve(factors)
        study.tell(trial, meter.psnr(found[trial.number], task.seeds))
    return found[study.best_trial.number]


def by_halving(task: Task, meter: Meter) -> Bits:
    """Draw many allocations, and give those that survive more seeds."""
    generator = np.random.default_rng(task.repetition)
    units = sorted(set(task.table["unit"].values()))
    seeds, stages = len(task.seeds), 3
    first = seeds >> (stages - 1)
    count = task.candidates * seeds // (first * stages)
    pool = [task.solve({})]
    pool += [task.solve(dict(zip(units, np.exp(0.5 * generator.standard_normal(len(units))), strict=True)))
             for _ in range(count - 1)]  # fmt: skip
    for stage in range(stages):
        own = range(task.seeds.start, task.seeds.start + (first << stage))
        ranked = sorted(pool, key=lambda bits: -meter.psnr(bits, own))
        pool = ranked[: max(len(ranked) // 2, 1)]
    return pool[0]


PROPOSERS: dict[str, Callable[[Task, Meter], Bits]] = {
    "table": by_table,
    "surrogate": by_surrogate,
    "tpe": by_tpe,
    "halving": by_halving,
}


def rows(options: Namespace, bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what each proposer found, for each size and repetition."""
    table = table_of(bench)
    held_out = range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out)
    for bits in options.bits:
        for repetition in range(options.repetitions):
            start = 3_000_000 + 1000 * repetition
            task = Task(table, bits, options.candidates, range(start, start + options.seeds), repetition)
            for name, find in PROPOSERS.items():
                if name == "table" and repetition:
                    continue
                meter = Meter(bench)
                best = find(task, meter)
                drawn = meter.drawn
                psnr = round(meter.psnr(best, held_out), 3)
                yield {"proposer": name, "bits": bits, "repetition": repetition, "samples": drawn, "psnr_db": psnr}


def gains(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how much better each proposer's choices are than the table's, in dB: mean and standard error."""
    plain = {row["bits"]: row["psnr_db"] for row in found if row["proposer"] == "table"}
    summary = {}
    for name in PROPOSERS:
        over = np.array([row["psnr_db"] - plain[row["bits"]] for row in found if row["proposer"] == name])
        if name != "table" and len(over) > 1:
            error = over.std(ddof=1) / math.sqrt(len(over))
            summary[name] = {"gain_db": round(float(over.mean()), 3), "standard_error_db": round(float(error), 3)}
    return summary


def main() -> None:
    """Compare, and write one JSON document."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, default=Path("examples/models/digits"))
    options.add_argument("--work", type=Path, required=True, help="folder that keeps what was computed")
    options.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--candidates", type=int, default=16)
    options.add_argument("--seeds", type=int, default=16, help="samples of each candidate")
    options.add_argument("--held-out", type=int, default=64)
    options.add_argument("--rows", type=int, default=10, help="calibration rows that damages are measured on")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    given.scores = ["two points"]
    torch.set_num_threads(1)
    bench = Bench(given)
    found: list[dict[str, Any]] = []
    document: dict[str, Any] = {"protocol": {key: getattr(given, key) for key in ("candidates", "seeds", "held_out")}}
    document |= {"model": given.model.name, "sampler": "DDIM 20, eta 0"}
    for row in rows(given, bench):
        found.append(row)
        keep({**document, "gains": gains(found), "rows": found}, given.out)
    give({**document, "gains": gains(found), "rows": found}, given.out)


if __name__ == "__main__":
    main()
