"""Everything that a temporal information block will ever be fed: the sampler's timesteps, times the conditioning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.conditioning import Conditioning, is_shared, label_count, take, to_device
from quant_core.inspect.temporal import LABEL, TemporalLayer, TemporalProgram, TemporalTrace, trace_temporal
from quant_core.nn.model import QuantizedParts

#: Rows of a finite set, at most: beyond it, some of the calibration set's conditioning stand for all.
LARGEST_SET = 4096


@dataclass(frozen=True, slots=True)
class FiniteSet:
    """Everything that a temporal block will ever be fed, or what stands for it.

    Row step * variants + variant is trajectory step `step` with one variant of the conditioning.

    Attributes
    ----------
    layers : mapping of str to TemporalLayer
    labels : int or None
        Number of class labels if the variants are all of them.
    inputs, outputs : mapping of str to Tensor, shape (rows, C), dtype float32
        Of each layer in full precision.
    """

    layers: Mapping[str, TemporalLayer]
    steps: int
    variants: int
    labels: int | None
    timestep: Tensor
    label: Tensor
    program: TemporalProgram
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def run(self, model: nn.Module, parts: QuantizedParts) -> dict[str, Tensor]:
        """Return the layers' outputs, shape (rows, C), with the quantized layers that are now in `model`."""
        parts.set_timestep(self.timestep, self.label)
        outputs = self.program.run({name: model.get_submodule(name) for name in self.layers})
        return {name: outputs[name].flatten(1) for name in self.layers}

    def features(self) -> list[str]:
        """Return the layers whose outputs the rest of the network reads."""
        return [name for name, layer in self.layers.items() if layer.is_feature]


def enumerate_set(model: nn.Module, calibration: CalibrationSet) -> FiniteSet:
    """Run the block over the sampler's timesteps, with every class label or the calibration set's conditioning.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser.

    Notes
    -----
    Labels are listed if nothing else but the timestep matters to the block and there are not too many; otherwise the
    distinct rows of the calibration set's conditioning are taken, as many as fit.
    """
    layers = _trace(model, calibration, calibration.timesteps[:1], take(calibration.conditioning, slice(0, 1))).layers
    conditions = {key for layer in layers.values() for key in layer.conditions}
    count, labels = label_count(model), None
    if conditions == {LABEL} and count is not None and count * calibration.steps <= LARGEST_SET:
        labels = count
    variants = torch.arange(labels) if labels is not None else _distinct(calibration, sorted(conditions))
    timestep, variant = calibration.timesteps.repeat_interleave(len(variants)), variants.repeat(calibration.steps)
    conditioning = take(calibration.conditioning, torch.zeros_like(variant) if labels is not None else variant)
    if labels is not None:
        conditioning[LABEL] = variant.to(conditioning[LABEL].dtype)
    program = _trace(model, calibration, timestep, conditioning).program
    inputs = program.inputs()
    with torch.no_grad():
        outputs = program.run({name: model.get_submodule(name) for name in layers})
    return FiniteSet(
        layers,
        calibration.steps,
        len(variants),
        labels,
        timestep,
        variant,
        program,
        {name: inputs[name].flatten(1) for name in layers},
        {name: outputs[name].flatten(1) for name in layers},
    )


def _trace(
    model: nn.Module, calibration: CalibrationSet, timestep: Tensor, conditioning: Conditioning
) -> TemporalTrace:
    """Trace rows of the finite set; the sample is the calibration set's first, as none matters."""
    device = next(model.parameters()).device
    x = calibration.rows(0, 0, 1).x.expand(len(timestep), *calibration.sample_shape)
    return trace_temporal(model, x.to(device), timestep.to(device), to_device(conditioning, device))


def _distinct(calibration: CalibrationSet, conditions: Sequence[str]) -> Tensor:
    """Return rows of the calibration set whose conditioning differs, as many as the finite set may have."""
    found: dict[bytes, int] = {}
    for row in range(calibration.samples):
        parts = (calibration.conditioning[key][row] for key in conditions if not is_shared(key))
        found.setdefault(b"".join(part.contiguous().numpy().tobytes() for part in parts), row)
    return torch.tensor(list(found.values())[: max(1, LARGEST_SET // calibration.steps)])


@dataclass(frozen=True, slots=True)
class FeatureError:
    """How far a feature is from full precision: mean cosine over rows, signal to noise in dB, sum of squares."""

    cosine: float
    sqnr_db: float
    power: float


def feature_error(got: Tensor, wanted: Tensor) -> FeatureError:
    """Compare a feature, shape (rows, C), with its full-precision value."""
    signal, noise = float(wanted.double().square().sum()), float((got - wanted).double().square().sum())
    cosine = float(F.cosine_similarity(got.double(), wanted.double(), dim=1).mean())
    return FeatureError(cosine, 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)), noise)
