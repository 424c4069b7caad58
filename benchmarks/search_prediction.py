"""How well damages predicted from tables rank allocations: predicted against measured, for random allocations.

    python -m benchmarks.search_prediction --work FOLDER > benchmarks/results/search-prediction-emoji32.json

Each allocation gives every layer of emoji32 a random weight width of 2 to 8 bits (base recipe fast-w4a8), around a mean
that is drawn for it. Measured is what sampling with the quantized model leaves against the full-precision samples of
the same seeds, DDIM with 20 steps, as error power and as PSNR. Predicted are sums over layers, of damages measured

    isolated        each layer alone in the full-precision network
    one point       with half of the error of all others at a middle width
    two points      the mean of two such points on the way (what `sensitivity` tasks do)

each weighted by step gains (power at the final sample per power at the prediction), on rows drawn where most of the
damage is made; "unweighted" is the isolated error of the prediction on rows of all steps alike. "..., by unit" are
scaled to what each unit alone does to the final sample (`sensitivity` tasks do that too). Models are built from the
states that would be packed; nothing is written to a file. The folder keeps what was computed, so that the script goes
on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from orchestrator.db.rows import ModelRow
from orchestrator.planning.draft import Draft
from orchestrator.planning.passes.menu import menu_groups
from orchestrator.planning.sensitivity import middle_width
from orchestrator.recipes.load import load_recipe
from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories, select_steps
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.sampler import make_scheduler, sample, trajectory_conditioning
from quant_core.diffusion.trajectories import LoopTrajectories
from quant_core.fit.menu import MenuUnit, mix_unit, round_menu
from quant_core.fit.rounding import read_unit
from quant_core.fit.sensitivity import PATHS, Choices, Damage, Row, choose_rows, fitted_to_units, measure
from quant_core.fit.step_gains import StepGains, measure_gains
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.inspect.inspection import inspect_model
from quant_core.metrics.psnr import psnr_per_sample
from quant_core.nn.model import build_quantized
from quant_spec.allocation import Allocation, apply_allocation
from quant_spec.enums import SampleSpace
from quant_spec.passes.choose import GAIN_SEEDS
from quant_spec.passes.menu import Menu
from quant_spec.sampler import Sampler
from quant_spec.tasks.menu import BASE, Params
from quant_spec.tasks.mix import MixedAttention, MixedLayer, MixedUnit

WIDTHS = (2, 3, 4, 5, 6, 8)
SAMPLER = Sampler(scheduler="DDIMScheduler", num_inference_steps=20)
FIRST_SEED = 2_000_000
UNWEIGHTED = "isolated, unweighted"
BY_UNIT = ", by unit"
#: Name to shares of the other layers' errors.
SCORES = {"two points": PATHS[2], "isolated": PATHS[0], UNWEIGHTED: PATHS[0], "one point": PATHS[1]}


def main() -> None:
    """Measure, and print JSON."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--model", type=Path, default=Path("examples/models/emoji32"))
    options.add_argument("--work", type=Path, required=True, help="folder that keeps what was computed")
    options.add_argument("--allocations", type=int, default=30)
    options.add_argument("--seeds", type=int, default=32, help="whose samples are compared")
    options.add_argument("--rows", type=int, default=10, help="calibration rows that damages are measured on")
    options.add_argument("--scores", nargs="+", choices=list(SCORES), default=list(SCORES), help="what to compare")
    given = options.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(Bench(given).result(), indent=2))


class Bench:
    """One model, and a folder of what was computed with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.seconds: dict[str, float] = {}
        self.denoiser: Denoiser = load_denoiser(options.model)
        self.calibration = self._calibration()
        self.menu: list[MenuUnit] = self._kept("menu", self._menu)
        context = [unit.weights[middle_width(WIDTHS)] for unit in self.menu]
        self.gains: StepGains = self._kept("gains", lambda: self._gains(context))
        self.damages = {name: self._damage(name, SCORES[name], context) for name in options.scores}
        self.damages |= {
            name + BY_UNIT: fitted_to_units(damage, context, self.gains.units) for name, damage in self.damages.items()
        }
        self.base = {n: s for unit in self.menu for n, s in unit.activations[BASE].formats.layers.items()}

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what the folder keeps under a name, or make it."""
        file = self.work / f"{name}.pkl"
        if not file.exists():
            started = time.process_time()
            file.write_bytes(pickle.dumps((make(), time.process_time() - started)))
        made, self.seconds[name] = pickle.loads(file.read_bytes())
        return made

    def _calibration(self) -> CalibrationSet:
        file = self.work / "calibration.safetensors"
        if not file.exists():
            record_trajectories(self.denoiser, range(1_000_000, 1_000_032), RecordSpec(SAMPLER, batch_size=32), file)
        return CalibrationSet([file])

    def _menu(self) -> list[MenuUnit]:
        inspected = inspect_model(self.denoiser)
        row = ModelRow("model", "0" * 64, "", "", 0, inspected["parameters"], inspected)
        widths = Menu(weight_bits=WIDTHS)
        draft = Draft.begin(row, apply_allocation(load_recipe("fast-w4a8").recipe, Allocation(), widths))
        made: list[MenuUnit] = []
        for group in menu_groups(draft, widths):
            params = Params.from_json(group.node.params)
            units = [read_unit(unit) for unit in params.units]
            made += round_menu(self.denoiser.model, self.calibration, units, params)
        return made

    def _gains(self, context: list[UnitState]) -> StepGains:
        denoiser = self.denoiser
        trajectories = LoopTrajectories(denoiser.model, denoiser.scheduler_config, SAMPLER, denoiser.conditioning)
        return measure_gains(trajectories, context, GAIN_SEEDS.range, batch_size=GAIN_SEEDS.count)

    def _damage(self, name: str, path: tuple[float, ...], context: list[UnitState]) -> Damage:
        rows = choose_rows(self.gains, range(SAMPLER.num_inference_steps), self.calibration.samples, self.options.rows)
        if name == UNWEIGHTED:
            steps = select_steps(SAMPLER.num_inference_steps, self.options.rows)
            rows = [Row(step, place, 1 / len(steps)) for place, step in enumerate(steps)]

        def make() -> Damage:
            choices = Choices(
                [state for unit in self.menu for state in unit.weights.values()],
                [unit.activations[BASE] for unit in self.menu],
            )
            return measure(
                self.denoiser.model,
                self.calibration,
                [unit.unit for unit in self.menu],
                context,
                choices,
                path=path,
                rows=rows,
                batch_size=32,
            )

        found: Damage = self._kept(f"{name.replace(' ', '-')}-{self.options.rows}", make)
        return found

    def draw(self, place: int) -> dict[str, int]:
        """Return a random width for each layer; those of `@first` and `@last` stay at the base's."""
        generator = np.random.default_rng(1000 + place)
        target, widths = generator.uniform(2.6, 7.0), np.array(WIDTHS)
        weights = np.exp(-np.abs(widths - target))
        chosen = {n: int(generator.choice(widths, p=weights / weights.sum())) for n in self.base}
        return chosen | {n: s.weight.bits for n, s in self.base.items() if n in ("conv_in", "conv_out")}

    def samples(self, model: nn.Module, seeds: range) -> Tensor:
        """Draw samples of some seeds."""
        conditioning = trajectory_conditioning(model, SAMPLER, seeds, self.denoiser.conditioning)
        scheduler = make_scheduler(SAMPLER, self.denoiser.scheduler_config)
        return sample(model, scheduler, SAMPLER, seeds, conditioning, batch_size=32)

    def quantized(self, bits: Mapping[str, int]) -> nn.Module:
        """Return the model at some weight widths, as it would be packed."""
        states = []
        for unit in self.menu:
            base = unit.activations[BASE].formats
            layers = {
                name: MixedLayer(weights=bits[name], activations=(spec.activation.bits,))  # type: ignore
                for name, spec in base.layers.items()
            }
            attentions = {
                name: MixedAttention(activations=(spec.activation.bits,), softmax=spec.softmax_bits)  # type: ignore
                for name, spec in base.attentions.items()
            }
            choice = MixedUnit(unit=unit.unit, layers=layers, attentions=attentions)
            states.append(mix_unit(choice, list(unit.weights.values()), [unit.activations[BASE]], unit.errors))
        model = copy.deepcopy(self.denoiser.model)
        parts = build_quantized(model, merge_formats(states))
        load_states(model, states)
        for layer in parts.layers.values():
            layer.soft_weight = layer.weight  # the same, unpacked once
        return model

    def predicted(self, name: str, bits: Mapping[str, int]) -> float:
        """Return the sum of damages of an allocation."""
        damage = self.damages[name]
        parts = [damage.weights[layer, width] for layer, width in bits.items()]
        return float(torch.stack([*parts, *damage.activations.values()]).sum())

    def result(self) -> dict[str, Any]:
        """Measure all allocations, and compare."""
        seeds = self.options.seeds
        own = range(FIRST_SEED, FIRST_SEED + seeds)
        reference: Tensor = self._kept(f"reference-{seeds}", lambda: self.samples(self.denoiser.model, own))
        rows = []
        for place in range(self.options.allocations):
            bits = self.draw(place)
            made = self._kept(f"allocation-{place}-{seeds}", lambda bits=bits: self.samples(self.quantized(bits), own))  # type: ignore[misc]
            weights = {name: self.denoiser.model.get_parameter(f"{name}.weight").numel() for name in bits}
            rows.append(
                {
                    "mean_bits": sum(weights[n] * b for n, b in bits.items()) / sum(weights.values()),
                    "code_bytes": sum(weights[n] * b for n, b in bits.items()) // 8,
                    "error_power": float((made.double() - reference.double()).square().mean()),
                    "psnr_db": float(psnr_per_sample(reference, made, SampleSpace.PIXELS).mean()),
                    "predicted": {name: self.predicted(name, bits) for name in self.damages},
                }
            )
        return self._report(rows)

    def _report(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return rank correlations, and all rows."""
        error, psnr = [row["error_power"] for row in rows], [row["psnr_db"] for row in rows]
        scores = {}
        for name in rows[0]["predicted"]:
            told = [row["predicted"][name] for row in rows]
            ratio = np.log(np.array(told) / np.array(error)) * 10 / np.log(10)
            scores[name] = {
                "spearman_error_power": float(spearmanr(told, error).statistic),
                "spearman_psnr": float(-spearmanr(told, psnr).statistic),
                "pearson_of_logs": float(pearsonr(np.log(told), np.log(error)).statistic),
                "predicted_over_measured_db": {"mean": float(ratio.mean()), "std": float(ratio.std())},
            }
        settings = {key: getattr(self.options, key) for key in ("allocations", "seeds", "rows")}
        return {
            "protocol": {"model": self.options.model.name, "recipe": "fast-w4a8", "sampler": "DDIM 20", **settings},
            "scores": scores,
            "gains": self.gains.gains,
            "step_powers": self.gains.powers,
            "coherence": self.gains.coherence,
            "cpu_seconds": {n: round(s, 1) for n, s in self.seconds.items() if not n.startswith("allocation")},
            "rows": rows,
        }


if __name__ == "__main__":
    main()
