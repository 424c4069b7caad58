"""What an error of the prediction at each trajectory step does to the final sample, as power per power.

Sampling runs once for each step, with the prediction of a quantized model at that step and in full precision at all
others: errors have the shape that quantization gives them, and the later steps do to them what they do. And it runs
once with each unit quantized alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_core.diffusion.branch import Branch, Other, Recorder
from quant_core.diffusion.sampler import Instead
from quant_core.diffusion.trajectories import Trajectories
from quant_core.fit.unit_state import UnitState, load_states, merge_formats
from quant_core.nn.model import build_quantized
from quant_spec.documents import read_json


@dataclass(frozen=True, slots=True)
class StepGains:
    """Gains of one sampler with one model.

    Attributes
    ----------
    timesteps : tuple of float, length S
        As the denoiser gets them, in the order of its calls.
    gains : tuple of float, length S
        Mean square error of the final samples, per mean square error of the prediction of one step.
    noises : tuple of float, length S
        Mean square error of the prediction of each step that these gains were measured with.
    coherence : float
        Error power of the final samples when all steps are quantized, per sum of those of each step alone: more than
        1, as errors of neighbouring steps are alike and add up.
    units : mapping of str to float
        Mean square error of the final samples when one unit's weights are quantized, at all steps. How much errors
        of a unit add up along the trajectory differs by an order of magnitude between units, and no single step says.
    """

    timesteps: tuple[float, ...]
    gains: tuple[float, ...]
    noises: tuple[float, ...]
    coherence: float
    units: Mapping[str, float] = field(default_factory=dict)

    @property
    def powers(self) -> tuple[float, ...]:
        """Mean square error of the final samples that each step alone made."""
        return tuple(gain * noise for gain, noise in zip(self.gains, self.noises, strict=True))

    def to_bytes(self) -> bytes:
        """Serialise."""
        data = {name: getattr(self, name) for name in ("timesteps", "gains", "noises", "coherence", "units")}
        return json.dumps(data, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> StepGains:
        """Read what `to_bytes` wrote."""
        found = read_json(data, "step gains")
        timesteps, gains, noises = (tuple(found[name]) for name in ("timesteps", "gains", "noises"))
        return cls(timesteps, gains, noises, found["coherence"], found["units"])


def measure_gains(
    trajectories: Trajectories, states: Sequence[UnitState], seeds: Sequence[int], *, batch_size: int
) -> StepGains:
    """Run the sampler once for each step, once with all steps quantized, and once for each unit.

    Parameters
    ----------
    trajectories : Trajectories
        In full precision, on its device.
    states : sequence of UnitState
        What the quantized model's units are; their weights' errors are what is added. Inputs stay exact.
    seeds : sequence of int
        Whose samples are compared.
    batch_size : int
        Seeds per denoiser call.
    """
    weights = _weights(trajectories.model, states)
    other = copy.deepcopy(trajectories.model)
    timesteps = trajectories.script(seeds).timesteps

    def draw(instead: Instead) -> Tensor:
        made = trajectories.run(seeds, batch_size=batch_size, instead=instead)
        assert made is not None
        return made.samples

    record = Recorder()
    expected = draw(record)
    noises: list[float] = []
    powers: list[float] = []
    with _replaced(other, {name: tensor for own in weights.values() for name, tensor in own.items()}):
        for step in range(len(timesteps)):
            branch = Branch(other, record, step)
            powers.append(_power(draw(branch), expected))
            noises.append(max(branch.noise / max(branch.elements, 1), 1e-30))
        coherence = _power(draw(Other(other)), expected) / max(sum(powers), 1e-30)
    gains = tuple(power / noise for power, noise in zip(powers, noises, strict=True))
    units: dict[str, float] = {}
    for unit, own in weights.items():
        with _replaced(other, own):
            units[unit] = _power(draw(Other(other)), expected)
    return StepGains(tuple(timesteps.double().tolist()), gains, tuple(noises), coherence, units)


def _power(samples: Tensor, expected: Tensor) -> float:
    return float((samples.double() - expected.double()).square().mean())


def _weights(model: torch.nn.Module, states: Sequence[UnitState]) -> dict[str, dict[str, Tensor]]:
    """Return each unit's weights and biases as its state has them, by the names of the model's parameters."""
    made = copy.deepcopy(model)
    parts = build_quantized(made, merge_formats(list(states)))
    load_states(made, list(states))
    found: dict[str, dict[str, Tensor]] = {}
    for state in states:
        own = found[state.formats.unit] = {}
        for name in state.formats.layers:
            layer = parts.layers[name]
            own[f"{name}.weight"] = layer.unscaled(layer.weight)
            if layer.bias is not None:
                own[f"{name}.bias"] = layer.bias
    return found


@contextmanager
def _replaced(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model's parameters other values, and theirs back in the end."""
    before = {name: model.get_parameter(name).data for name in tensors}
    for name, tensor in tensors.items():
        model.get_parameter(name).data = tensor
    try:
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor
