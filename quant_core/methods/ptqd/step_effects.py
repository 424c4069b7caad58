"""What the activation bits of one trajectory step do to the final samples, and to the prediction of that step.

For each step and each choice of bits, the sampler runs once with the activations quantized at that step and in full
precision at all others. The cost of the choice is the error that this leaves in the final samples, so it includes how
far the later steps reduce or amplify it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from quant_core.diffusion.branch import Branch, Recorder, signal
from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.sampler import Instead
from quant_core.diffusion.trajectories import Trajectories
from quant_core.fit.observe import Observation, Watched, observe
from quant_core.nn.model import build_quantized
from quant_spec.documents import read_json
from quant_spec.enums import RangeMethod
from quant_spec.errors import QuantizationError
from quant_spec.formats import ModelFormat
from quant_spec.planned import VariedLayer


@dataclass(frozen=True, slots=True)
class StepEffects:
    """Sums over seeds, which add up over shards.

    Attributes
    ----------
    timesteps : tuple of float, length S
        As the scheduler has them, noisiest first.
    choices : tuple of int, length K
        Bits.
    gram : Tensor, shape (S, K, S, K), dtype float64
        Inner products of the final samples' errors of two (step, bits); the diagonal is the error power of each.
    signal : Tensor, shape (S,), dtype float64
        |eps|^2 of the full-precision predictions.
    noise : Tensor, shape (S, K), dtype float64
        |eps_hat - eps|^2 of a step at these bits.
    schedule_snr : Tensor, shape (S,), dtype float64
        alpha^2 / sigma^2 of the noise schedule.
    """

    timesteps: tuple[float, ...]
    choices: tuple[int, ...]
    gram: Tensor
    signal: Tensor
    noise: Tensor
    schedule_snr: Tensor

    def to_bytes(self) -> bytes:
        """Serialise."""
        head = json.dumps({"timesteps": list(self.timesteps), "choices": list(self.choices)}, sort_keys=True)
        names = ("gram", "signal", "noise", "schedule_snr")
        return save({name: getattr(self, name).contiguous() for name in names}, {"step_effects": head})

    @classmethod
    def from_bytes(cls, data: bytes) -> StepEffects:
        """Read what `to_bytes` wrote."""
        size = int.from_bytes(data[:8], "little")
        head = read_json(read_json(data[8 : 8 + size], "step effects")["__metadata__"]["step_effects"], "step effects")
        return cls(tuple(head["timesteps"]), tuple(head["choices"]), **load(data))


def merge_effects(parts: Sequence[StepEffects]) -> StepEffects:
    """Add up shards, in their order.

    Raises
    ------
    QuantizationError
        If there are none, or they are not of the same steps and choices.
    """
    if not parts:
        raise QuantizationError("step effects: got no shards, wanted at least one")
    first = parts[0]
    if any((part.timesteps, part.choices) != (first.timesteps, first.choices) for part in parts):
        raise QuantizationError("step effects: got shards of different trajectories or choices, wanted the same")
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("gram", "signal", "noise")}
    return StepEffects(first.timesteps, first.choices, schedule_snr=first.schedule_snr, **sums)


def schedule_snr(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return alpha^2 / sigma^2 of the forward process at each timestep, shape (S,), dtype float64."""
    if hasattr(scheduler, "alphas_cumprod"):
        abar = scheduler.alphas_cumprod.double().cpu()[timesteps.long().cpu()]
        return abar / (1 - abar)
    sigma = scheduler.sigmas[: len(timesteps)].double().cpu()  # flow matching: x = (1 - sigma) x_0 + sigma noise
    return ((1 - sigma) / sigma.clamp(min=1e-12)).square()


def measure_effects(
    trajectories: Trajectories,
    calibration: CalibrationSet,
    layers: Mapping[str, VariedLayer],
    choices: Sequence[int],
    seeds: Sequence[int],
    *,
    batch_size: int,
    seed: int = 0,
) -> StepEffects:
    """Run the sampler once for each step and choice of bits.

    Weights are in full precision. Calls of the denoiser: about S^2 / 2 full-precision ones for each choice and seed, as
    steps before the quantized one repeat.

    Parameters
    ----------
    trajectories : Trajectories
        In full precision, on its device.
    calibration : CalibrationSet
        What activation ranges are measured on, step by step.
    seeds : sequence of int
        Whose samples are compared.
    batch_size : int
        Seeds per denoiser call.
    seed : int
        Of the values that are drawn for ranges.
    """
    model = trajectories.model
    seen = _observe(model, calibration, layers, batch_size, seed)
    scheduler, timesteps = trajectories.schedule(seeds)

    def draw(instead: Instead) -> Tensor:
        made = trajectories.run(seeds, batch_size=batch_size, instead=instead)
        assert made is not None
        return made.samples

    record = Recorder()
    expected = draw(record)
    steps = len(timesteps)
    errors = torch.zeros(steps, len(choices), expected.numel())
    noise = torch.zeros(steps, len(choices), dtype=torch.float64)
    for place, bits in enumerate(choices):
        quantized = _quantized(model, layers, bits, seen, calibration)
        for step in range(steps):
            branch = Branch(quantized, record, step)
            errors[step, place] = (draw(branch) - expected).flatten()
            noise[step, place] = branch.noise
    flat = errors.flatten(0, 1).double()
    counts = (steps, len(choices))
    return StepEffects(
        timesteps=tuple(timesteps.double().tolist()),
        choices=tuple(choices),
        gram=(flat @ flat.T).reshape(*counts, *counts),
        signal=torch.tensor(signal(record.predictions), dtype=torch.float64),
        noise=noise,
        schedule_snr=schedule_snr(scheduler, timesteps),
    )


def _observe(
    model: nn.Module, calibration: CalibrationSet, layers: Mapping[str, VariedLayer], batch_size: int, seed: int
) -> Observation:
    """Measure the ranges of the layers' inputs at each step."""
    specs = {name: layer.spec(8) for name, layer in layers.items()}
    draws = any(layer.range.method is not RangeMethod.MINMAX for layer in layers.values())
    watched = Watched(specs, attentions=(), moments=(), positions=None, samples=None, keep_values=draws)
    return observe(model, calibration, list(layers), watched, batch_size=batch_size, seed=seed)


def _quantized(
    model: nn.Module, layers: Mapping[str, VariedLayer], bits: int, seen: Observation, calibration: CalibrationSet
) -> nn.Module:
    """Return a copy of the model that quantizes the inputs of these layers at all steps, and no weights."""
    made = copy.deepcopy(model)
    weights = {name: made.get_parameter(f"{name}.weight").detach() for name in layers}
    specs = {name: layer.spec(bits) for name, layer in layers.items()}
    parts = build_quantized(made, ModelFormat(specs, {}, tuple(float(t) for t in calibration.timesteps)))
    for name, layer in parts.layers.items():
        layer.soft_weight = weights[name]
        activation = specs[name].activation
        assert activation is not None
        for part, quantizer in enumerate(layer.act_quantizers):
            quantizer.set_qparams(seen.ranges[name, part].qparams(activation, layers[name].range))  # type: ignore[operator]
    return made
