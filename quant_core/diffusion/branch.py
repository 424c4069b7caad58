"""Trajectories that leave the recorded one at a single step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from quant_core.diffusion.conditioning import Conditioning
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.diffusion.sampler import Step


class Recorder:
    """Keeps the predictions of each step, by the first row of their batch."""

    def __init__(self) -> None:
        self.predictions: dict[int, dict[int, Tensor]] = {}

    def __call__(self, step: Step, /) -> None:
        self.predictions.setdefault(step.index, {})[step.row] = step.prediction.clone()


class Branch:
    """Predicts as recorded before a step, with another model at it, and in full precision after it.

    `noise` adds up |prediction of the other model - recorded|^2, `elements` counts their elements.
    """

    def __init__(
        self, model: nn.Module, other: nn.Module, recorded: Mapping[int, Mapping[int, Tensor]], step: int
    ) -> None:
        self.model, self.other, self.recorded, self.step = model, other, recorded, step
        self.noise = 0.0
        self.elements = 0

    def __call__(self, index: int, row: int, x: Tensor, timestep: Tensor, conditioning: Conditioning, /) -> Tensor:
        if index < self.step:
            return self.recorded[index][row]
        if index > self.step:
            return call_denoiser(self.model, x, timestep, conditioning)
        prediction = call_denoiser(self.other, x, timestep, conditioning)
        self.noise += float((prediction.double() - self.recorded[index][row].double()).square().sum())
        self.elements += prediction.numel()
        return prediction
