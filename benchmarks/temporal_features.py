"""What the parts of TFMQ-DM do to a model's temporal features, and to its images.

    quantmill --home FOLDER run qdiffusion-w4a8 --model examples/models/emoji32
    python -m benchmarks.temporal_features --home FOLDER --recipe qdiffusion-w4a8 --model examples/models/emoji32

Takes the states of all units from that job's records and exchanges the temporal information block only: as the job left
it (rounded and reconstructed inside its residual blocks), fitted by TIAR, in tables; each with activation ranges per
step or one for all steps, in the block and in the whole network. Static ranges are the union of the job's per-step
ones, which is what min-max over all steps gives. Images: same-seed PSNR against full precision, the same seeds for all
rows, so that the paired difference from the first row is sharper than the intervals. Prints Markdown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.cli import parser
from benchmarks.records import Records
from quant_core.diffusion.calibration import CalibrationSet, read_conditioning
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.sampler import make_scheduler, sample
from quant_core.fit.rounding import UnitRanges
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.methods.tfmq.finite_set import enumerate_set, feature_error
from quant_core.methods.tfmq.temporal_block import fit
from quant_core.metrics.psnr import mean_with_ci, psnr_per_sample
from quant_core.nn.model import build_quantized
from quant_core.nn.ranges import qparams_from_range
from quant_spec.enums import ActivationMode, RangeMethod
from quant_spec.formats import ActivationSpec, AttentionSpec, LayerSpec, UnitFormat
from quant_spec.passes.temporal import TemporalFit
from quant_spec.pipeline import sample_space
from quant_spec.ranges import RangeSpec
from quant_spec.sampler import Sampler

BLOCK = "@temporal"


def static(spec: ActivationSpec | None, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the one grid that covers the grids of all steps, both of shape (1,)."""
    assert spec is not None
    top = 2**spec.bits - 1
    low, high = (-zero_point * scale).min(), ((top - zero_point) * scale).max()
    grid = qparams_from_range(low[None], high[None], spec.bits, symmetric=spec.symmetric)
    return grid.scale, grid.zero_point


def made_static(state: UnitState) -> UnitState:
    """Return a state with one activation range for all steps."""
    tensors = dict(state.tensors)
    layers, attentions = dict(state.formats.layers), dict(state.formats.attentions)
    for name, spec in layers.items():
        if spec.activation is not None and spec.activation.mode is ActivationMode.PER_STEP:
            _unite(tensors, f"{name}.act_quantizers", spec.activation)
            layers[name] = replace(spec, activation=replace(spec.activation, mode=ActivationMode.STATIC))
    for name, attention in attentions.items():
        activation = attention.activation
        _unite(tensors, f"{name}.attention_quantizer", activation)
        attentions[name] = AttentionSpec(replace(activation, mode=ActivationMode.STATIC), attention.softmax_bits)
    formats = replace(state.formats, layers=layers, attentions=attentions)
    return UnitState(formats, state.timesteps if formats.features else (), tensors)


def _unite(tensors: dict[str, Tensor], prefix: str, spec: ActivationSpec) -> None:
    for name in [name for name in tensors if name.startswith(f"{prefix}.") and name.endswith(".scale")]:
        zero = name.removesuffix("scale") + "zero_point"
        tensors[name], tensors[zero] = static(spec, tensors[name], tensors[zero])


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the ablation: the block's state (None: as the job left it), and where ranges are per step."""

    label: str
    block: UnitState
    network_per_step: bool


def take_out(states: list[UnitState], names: set[str]) -> tuple[UnitState, list[UnitState]]:
    """Split the block's layers from the units that they lie in."""

    def some(state: UnitState, inside: bool) -> UnitState:
        layers: dict[str, LayerSpec] = {n: s for n, s in state.formats.layers.items() if (n in names) == inside}
        kept = {
            name: tensor
            for name, tensor in state.tensors.items()
            if any(name.startswith(f"{layer}.") for layer in names) == inside
        }
        formats = replace(state.formats, layers=layers, attentions={} if inside else state.formats.attentions)
        return UnitState(formats, state.timesteps, kept)

    inside = [some(state, True) for state in states]
    layers = {name: spec for state in inside for name, spec in state.formats.layers.items()}
    tensors = {name: tensor for state in inside for name, tensor in state.tensors.items()}
    timesteps = next(state.timesteps for state in states if state.timesteps)
    return UnitState(UnitFormat(BLOCK, layers, {}), timesteps, tensors), [some(state, False) for state in states]


def main() -> None:
    """Print both tables."""
    options = parser(__doc__)
    options.add_argument("--home", type=Path, required=True)
    options.add_argument("--recipe", default="qdiffusion-w4a8")
    options.add_argument("--model", default="examples/models/emoji32")
    options.add_argument("--seeds", type=int, default=64)
    arguments = options.parse_args()
    records = Records.of_recipe(arguments.home, arguments.recipe, Path(arguments.model).name)
    calibration = CalibrationSet([records.path(o["calibration"]) for _, o in records.of("calibrate")])
    finite = enumerate_set(load_denoiser(arguments.model).model, calibration)
    before, rest = take_out(records.states(), set(finite.layers))

    def fitted(block: UnitState, *, cache: bool) -> UnitState:
        layers = block.formats.layers
        ranges = UnitRanges(dict.fromkeys(layers, RangeSpec(RangeMethod.MSE)), dict.fromkeys(layers, RangeSpec()))
        model = load_denoiser(arguments.model).model
        return fit(model, calibration, block.formats, ranges, TemporalFit(cache=cache))[0]

    learned, tables = fitted(before, cache=False), fitted(before, cache=True)
    still = made_static(before)
    print_cosines(arguments.model, calibration, {"as the job left it": before, "TIAR": learned, "tables": tables})
    variants = [
        Variant("network per step; block as the job left it", before, True),
        Variant("network per step; TIAR", learned, True),
        Variant("network per step; tables", tables, True),
        Variant("static; block as the job left it", still, False),
        Variant("static; FSC", before, False),
        Variant("static; TIAR", fitted(still, cache=False), False),
        Variant("static; TIAR and FSC", learned, False),
        Variant("static; tables", tables, False),
    ]
    print_images(arguments.model, records, rest, variants, arguments.seeds)


def print_cosines(folder: str, calibration: CalibrationSet, blocks: dict[str, UnitState]) -> None:
    """Print the mean cosine similarity and the signal-to-noise ratio in dB of every temporal feature."""
    columns = {}
    for label, block in blocks.items():
        model = load_denoiser(folder).model
        finite = enumerate_set(model, calibration)
        parts = build_quantized(model, merge_formats([block]))
        load_states(model, [block])
        with torch.no_grad():
            outputs = finite.run(model, parts)
        columns[label] = {name: feature_error(outputs[name], finite.outputs[name]) for name in finite.features()}
    print("| feature | " + " | ".join(f"{label}: 1 - cosine, dB" for label in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        cells = (f"{1 - column[name].cosine:.1e}, {column[name].sqnr_db:.1f}" for column in columns.values())
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def print_images(folder: str, records: Records, rest: list[UnitState], variants: list[Variant], seeds: int) -> None:
    """Print the same-seed PSNR of every variant, and its paired difference from the first."""
    params, outputs = next((p, o) for p, o in records.of("reference") if p["seeds"]["count"] >= seeds)
    with safe_open(records.path(outputs["reference"]), framework="pt") as shard:
        names = [name for name in shard.keys() if name not in ("x", "prediction")]  # noqa: SIM118 - not a mapping
        expected = {name: shard.get_tensor(name) for name in names}
    sampler, first = Sampler.from_json(params["sampler"]), params["seeds"]["first"]
    print(f"\n| variant (n = {seeds}) | PSNR dB | paired difference dB |\n|---|---|---|")
    base: Tensor | None = None
    for variant in variants:
        states = [variant.block, *(rest if variant.network_per_step else map(made_static, rest))]
        denoiser = load_denoiser(folder)
        build_quantized(denoiser.model, merge_formats(states))
        load_states(denoiser.model, states)
        scheduler = make_scheduler(sampler, denoiser.scheduler_config)
        told = read_conditioning(expected, seeds * (2 if sampler.is_guided else 1))
        made = sample(denoiser.model, scheduler, sampler, range(first, first + seeds), told, batch_size=32)
        psnr = psnr_per_sample(expected["sample"][:seeds], made, sample_space(made.shape[1:], denoiser.pipeline))
        base = psnr if base is None else base
        paired, value = psnr - base, mean_with_ci(psnr.tolist())
        half = 1.96 * float(paired.std()) / math.sqrt(seeds)
        print(
            f"| {variant.label} | {value.value:.2f} ± {value.ci95:.2f} | {float(paired.mean()):+.2f} ± {half:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
