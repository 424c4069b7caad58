"""Trajectories that leave the recorded one at a single step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from quant_core.diffusion.output import map_output, prediction_of
from quant_core.diffusion.sampler import Ask


class Recorder:
    """Keeps what the denoiser gives at each step, by the first row of the batch."""

    def __init__(self) -> None:
        self.outputs: dict[int, dict[int, Any]] = {}
        self.predictions: dict[int, dict[int, Tensor]] = {}

    def __call__(self, index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
        output = ask()
        # Copies, as a pipeline may go on computing in place.
        kept = map_output(output, lambda tensor: tensor.clone())
        self.outputs.setdefault(index, {})[row] = kept
        self.predictions.setdefault(index, {})[row] = prediction_of(kept, x)
        return output


class Branch:
    """Predicts as recorded before a step, with another model at it, and in full precision after it.

    `noise` adds up |prediction of the other model - recorded|^2, `elements` counts their elements.
    """

    def __init__(self, other: nn.Module, recorded: Recorder, step: int) -> None:
        self.other, self.recorded, self.step = other, recorded, step
        self.noise = 0.0
        self.elements = 0

    def __call__(self, index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
        if index < self.step:
            return map_output(self.recorded.outputs[index][row], lambda tensor: tensor.clone())
        if index > self.step:
            return ask()
        output = ask(self.other)
        prediction = prediction_of(output, x)
        self.noise += float((prediction.double() - self.recorded.predictions[index][row].double()).square().sum())
        self.elements += prediction.numel()
        return output


class Other:
    """Predicts with another model at all steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, index: int, row: int, x: Tensor, ask: Ask, /) -> Any:
        return ask(self.model)


def signal(recorded: Mapping[int, Mapping[int, Tensor]]) -> list[float]:
    """Return the sum of squares of the recorded predictions of each step."""
    return [
        sum(float(tensor.double().square().sum()) for tensor in recorded[step].values()) for step in sorted(recorded)
    ]
