"""What other ways of rounding weights, and rotated inputs, bring: PSNR of samples, paired with plain closed form.

    python -m benchmarks.rounding_variants --model MODEL --out benchmarks/results/rounding-variants.json

Weights, in `fast-w4a8`'s format: second moments of a layer's input summed over trajectory steps with weights (what a
step's error does to the final sample, `StepGains`). Rounding against quantized inputs is a recipe's
(`passes.round.inputs`). Rotation: input
channels in groups times a regular Hadamard matrix, folded into the weights, in the layers where it lowers the error at
the layer's output on calibration rows; at several formats. Arithmetic is simulated in float32, nothing is packed. The
layers that read the sample and write the prediction have exact inputs, or they would hide the rest. A document that
holds other models' rows keeps them.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks import rounding_fits as fits
from benchmarks.cli import keep, parser
from orchestrator.db.rows import ModelRow
from orchestrator.planning.draft import Draft
from orchestrator.recipes.load import load_recipe
from quant_core.diffusion.branch import Other
from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.pipeline import load_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.diffusion.trajectories import LoopTrajectories, PipelineTrajectories, Trajectories
from quant_core.fit.rounding import read_unit, trajectory
from quant_core.fit.step_gains import StepGains, measure_gains
from quant_core.fit.unit_state import UnitState, collect_state
from quant_core.inspect.inspection import inspect_model
from quant_core.metrics.psnr import mean_with_ci, psnr_of_mean_error, psnr_per_sample
from quant_core.nn.model import QuantizedParts, build_quantized
from quant_spec.enums import SampleSpace
from quant_spec.formats import ModelFormat, UnitFormat
from quant_spec.passes.choose import GAIN_SEEDS
from quant_spec.prompts import PromptPart, read_prompts, select_part
from quant_spec.ranges import RangeSpec
from quant_spec.sampler import Sampler

FIRST_CALIBRATION_SEED, FIRST_SEED = 1_000_000, 3_000_000
_SEEDS_OF_A_DRAW = 10_000
#: Rows of the denoiser's input at each step that are calibrated on.
CALIBRATION_ROWS = 32
#: Output positions that a step of much weight has.
_MOST_POSITIONS = 256
PLAIN = "plain"
#: Weightings of steps' second moments; the first weighs them alike, on the rows that the other three are taken of.
WEIGHTINGS = ("steps: alike", "steps: gain", "steps: root of gain", "steps: power")
#: Format to recipe and overrides.
FORMATS = {
    "W8A8 by step": ("minmax-w8a8",),
    "W8A8 by token": ("minmax-w8a8", "activations.mode=dynamic_token"),
    "W4A8 by step": ("fast-w4a8",),
    "W4A4 by token": ("fast-w4a8", "activations.mode=dynamic_token", "activations.bits=4"),
}
WEIGHTS_FORMAT = "W4A8 by step"


@dataclass(frozen=True, slots=True)
class Formats:
    """Formats of a whole model, and how the ranges of its weights are found."""

    model: ModelFormat
    ranges: Mapping[str, RangeSpec]
    sampler: Sampler


class Bench:
    """One model, its calibration set, and the samples that variants are compared with."""

    def __init__(self, options: Namespace, folder: Path) -> None:
        self.options = options
        self.denoiser: Denoiser = load_denoiser(options.model)
        inspected = inspect_model(self.denoiser)
        self.row = ModelRow("model", "0" * 64, "", "", 0, inspected["parameters"], inspected)
        sampler = self.formats(WEIGHTS_FORMAT, ()).sampler
        calibrated = self.trajectories(sampler, PromptPart.CALIBRATION)
        self.evaluated = self.trajectories(sampler, PromptPart.EVALUATION)
        self.rows_of_seed = calibrated.script(range(1)).rows
        first = FIRST_CALIBRATION_SEED + _SEEDS_OF_A_DRAW * options.draw
        count = max(1, options.calibration // self.rows_of_seed)
        record(calibrated, range(first, first + count), RecordSpec(sampler, batch_size=32), folder / "calibration")
        self.calibration = CalibrationSet([folder / "calibration"])
        self.calibrated = calibrated
        self.timesteps = tuple(self.calibration.timesteps.tolist())
        self.seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
        self.reference = self.draw(None)

    @property
    def model(self) -> nn.Module:
        """The denoiser in full precision."""
        return self.denoiser.model

    def formats(self, name: str, timesteps: tuple[float, ...]) -> Formats:
        """Return the formats of a recipe, with exact inputs at both ends."""
        overrides = [f"sampler.num_inference_steps={self.options.steps}"]
        if self.options.prompts is not None:
            overrides.append(f"sampler.guidance_scale={self.options.guidance:g}")
            overrides.append(f"sampler.arguments={self.options.arguments}")
        recipe, *own = FORMATS[name]
        draft = Draft.begin(self.row, load_recipe(recipe, [*overrides, *own]).recipe)
        units = [read_unit(unit.planned) for unit in draft.base_units]
        ends = (draft.model.first_layer, draft.model.last_layer)
        layers = {
            layer: replace(spec, activation=None) if layer in ends else spec
            for unit, _ in units
            for layer, spec in unit.layers.items()
        }
        attentions = {name: spec for unit, _ in units for name, spec in unit.attentions.items()}
        steps = trajectory(UnitFormat("all", layers, attentions), timesteps)
        ranges = {layer: spec for _, own in units for layer, spec in own.weights.items()}
        return Formats(ModelFormat(layers, attentions, steps), ranges, draft.sampler)

    def trajectories(self, sampler: Sampler, part: PromptPart) -> Trajectories:
        """Return what samples: the pipeline where there are prompts, else the sampler's loop."""
        denoiser = self.denoiser
        if self.options.prompts is None:
            return LoopTrajectories(denoiser.model, denoiser.scheduler_config, sampler, denoiser.conditioning)
        assert denoiser.folder is not None
        scheduler = make_scheduler(sampler, denoiser.scheduler_config)
        pipeline = load_pipeline(denoiser.folder, denoiser.model, scheduler)
        lines = select_part(read_prompts(self.options.prompts.read_bytes()), part)
        return PipelineTrajectories(pipeline, sampler, lines)

    def draw(self, model: nn.Module | None) -> Tensor:
        """Draw the samples of all seeds, with another model or in full precision."""
        instead = None if model is None else Other(model)
        made = self.evaluated.run(self.seeds, batch_size=self.options.batch, instead=instead)
        assert made is not None
        return made.samples

    def measured(self, formats: Formats, made: Mapping[str, fits.Fit]) -> list[float]:
        """Return each seed's PSNR in dB with layers as fitted."""
        samples = self.draw(fits.assemble(self.model, formats.model, made))
        found: list[float] = psnr_per_sample(self.reference, samples, SampleSpace.PIXELS).tolist()
        return found

    def gains(self, formats: Formats, parts: QuantizedParts) -> StepGains:
        """Measure what each step's error does to the final sample, with the weights' errors that layers have."""
        whole = UnitFormat("all", formats.model.layers, formats.model.attentions)
        state = UnitState(whole, formats.model.timesteps, collect_state(parts, whole, formats.model.timesteps).tensors)
        return measure_gains(self.calibrated, [state], GAIN_SEEDS.range, batch_size=GAIN_SEEDS.count)


def weightings(gains: StepGains) -> dict[str, fits.Weighting]:
    """Return how steps are weighed, by name."""
    return {
        "steps: alike": lambda step, trace: 1.0,
        "steps: gain": lambda step, trace: gains.gains[step],
        "steps: root of gain": lambda step, trace: gains.gains[step] ** 0.5,
        "steps: power": lambda step, trace: gains.powers[step] / max(trace, 1e-30),
    }


def positions(gains: StepGains) -> list[int]:
    """Return how many positions each step has: as usual, and more where its gain is a large part of all."""
    total = fits.POSITIONS * len(gains.gains) / sum(gains.gains)
    return [min(_MOST_POSITIONS, max(fits.POSITIONS, round(gain * total))) for gain in gains.gains]


class Report:
    """Rows of one model, kept in the document after each."""

    def __init__(self, told: dict[str, Any], out: Path) -> None:
        self.document = json.loads(out.read_text()) if out.exists() else {"models": {}}
        name = told["model"] if not told["draw"] else f"{told['model']}, draw {told['draw']}"
        self.told: dict[str, Any] = self.document["models"].setdefault(name, {})
        self.told |= told
        self.out, self.rows = out, self.told.setdefault("rows", {})

    def add(self, name: str, values: Sequence[float], beside: Sequence[float] | None, **more: Any) -> None:
        """Add a row, with the paired difference from another row's values."""
        mean = mean_with_ci(values)
        row: dict[str, Any] = {"n": mean.n, "psnr_db": round(mean.value, 3), "ci95": round(mean.ci95, 3)}
        row["psnr_db_of_mean"] = round(psnr_of_mean_error(values), 3)
        if beside is not None:
            gap = mean_with_ci([mine - theirs for mine, theirs in zip(values, beside, strict=True)])
            row |= {"difference_db": round(gap.value, 3), "difference_ci95": round(gap.ci95, 3)}
        self.rows[name] = row | more
        sys.stderr.write(f"{name}: {self.rows[name]}\n")
        keep(self.document, self.out)


def compare_weights(bench: Bench, seen: Mapping[str, fits.Seen], report: Report) -> None:
    """Compare ways of rounding weights at W4A8."""
    formats = bench.formats(WEIGHTS_FORMAT, bench.timesteps)
    parts = build_quantized(copy.deepcopy(bench.model), formats.model)

    def fitted(moments: Mapping[str, fits.Seen], way: str) -> dict[str, fits.Fit]:
        return {
            name: fits.fit_layer(
                layer,
                bench.model.get_submodule(name).get_parameter("weight"),
                moments[name].moments[way],
                seen[name],
                formats.ranges[name],
            )
            for name, layer in parts.layers.items()
        }

    plain = bench.measured(formats, fitted(seen, PLAIN))
    report.add(PLAIN, plain, None)
    ways = bench.options.ways
    if chosen := [way for way in WEIGHTINGS if way in ways]:
        gains = bench.gains(formats, parts)
        report.told["gains"] = {"gains": gains.gains, "powers": gains.powers, "positions": positions(gains)}
        weigh = {way: weighting for way, weighting in weightings(gains).items() if way in chosen}
        weighted = fits.see(bench.model, bench.calibration, formats.model.layers, positions(gains), weigh)
        for way in chosen:
            report.add(way, bench.measured(formats, fitted(weighted, way)), plain)
        del weighted


def compare_rotations(bench: Bench, seen: Mapping[str, fits.Seen], report: Report) -> None:
    """Compare rotated inputs at each format."""
    for name in bench.options.formats:
        formats = bench.formats(name, bench.timesteps)
        parts = build_quantized(copy.deepcopy(bench.model), formats.model)
        found = fits.rotated_fits(parts, bench.model, seen, formats.ranges, PLAIN)
        plain = bench.measured(formats, {layer: ways[1][0] for layer, ways in found.items()})
        report.add(f"{name}: none", plain, None)
        for wanted in bench.options.groups:
            allowed = {
                layer: [
                    group
                    for group in ways
                    if not wanted
                    or group in (1, fits.group_of(parts.layers[layer].spec, parts.layers[layer].shape[1], wanted))
                ]
                for layer, ways in found.items()
            }
            best = {layer: min(groups, key=lambda g: found[layer][g][1]) for layer, groups in allowed.items()}
            values = bench.measured(formats, {layer: found[layer][group][0] for layer, group in best.items()})
            label = "best of all" if not wanted else f"groups of {wanted}"
            report.add(f"{name}: {label}", values, plain, rotated=sum(group > 1 for group in best.values()))


def measure(options: Namespace) -> None:
    """Measure all that is asked for on one model."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        told: dict[str, Any] = {
            "model": Path(options.model).name,
            "draw": options.draw,
            "guidance_scale": options.guidance if options.prompts else None,
            "steps": options.steps,
            "seeds": [bench.seeds.start, bench.seeds.stop],
            "calibration_rows": bench.calibration.samples,
        }
        report = Report(told, options.out)
        layers = bench.formats(WEIGHTS_FORMAT, bench.timesteps).model.layers
        usual = [fits.POSITIONS] * bench.calibration.steps
        groups = (1, *fits.GROUPS) if "rotation" in options.parts else (1,)
        seen = fits.see(bench.model, bench.calibration, layers, usual, {PLAIN: lambda *_: 1.0}, groups=groups)
        if "weights" in options.parts:
            compare_weights(bench, seen, report)
        if "rotation" in options.parts:
            compare_rotations(bench, seen, report)
        spent = report.told.setdefault("cpu_seconds", {})
        spent[" and ".join(options.parts)] = round(time.process_time() - started, 1)
        keep(report.document, options.out)


def main() -> None:
    """Measure one model, and add it to the document."""
    options = parser(__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--prompts", type=Path, help="of a pipeline; without it, the denoiser alone")
    options.add_argument("--guidance", type=float, default=4.0)
    options.add_argument(
        "--arguments", default="{}", help="of the pipeline's call, such as '{max_sequence_length: 24}'"
    )
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--seeds", type=int, default=64)
    options.add_argument("--calibration", type=int, default=CALIBRATION_ROWS, help="rows of the denoiser's input")
    options.add_argument("--draw", type=int, default=0, help="which calibration seeds: another draw of all roundings")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--parts", nargs="+", choices=("weights", "rotation"), default=["weights", "rotation"])
    options.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    options.add_argument(
        "--ways", nargs="+", choices=WEIGHTINGS, default=WEIGHTINGS, help="of weights, beside plain closed form"
    )
    options.add_argument("--groups", nargs="+", type=int, default=[*fits.GROUPS, 0], help="of rotation; 0: any of them")
    options.add_argument("--out", type=Path, required=True)
    measure(options.parse_args())


if __name__ == "__main__":
    main()
