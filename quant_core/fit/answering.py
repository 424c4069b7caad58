"""Codes that answer for the layers before: chosen again in closed form, for inputs that are quantized already.

GPTAQ (Li et al., arXiv:2504.02692). With y what a layer gives in full precision, without its bias, and x' what its
codes are multiplied with where all layers before it are rounded, sum |W' x' - y|^2 is least for

    W' = W + (E[y x'^T] - W E[x' x'^T]) E[x' x'^T]^-1

and what rounding adds is (W' - Q) E[x' x'^T] (W' - Q)^T, which closed form makes small (`quant_core.fit.closed_form`).
The inverse is damped ten times as much as there, so that W' leans to W where rows are too few to tell.

Both models run side by side in one forward of all rows, the exact one's in the first half of the batch. Each layer's
codes and grid are chosen when it is first reached, so all layers before it have theirs. Attention's products stay exact
meanwhile. Widths, what scales channels or lies beside the codes, and activation tables stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.conditioning import concatenate, seed_stream, to_device
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.fit.closed_form import damped, factorize
from quant_core.fit.hessian import InputMoments, SecondMoment, input_rows, output_rows
from quant_core.fit.layer_rounding import round_layer
from quant_core.fit.unit_state import UnitState, collect_state, merge_formats
from quant_core.nn.layers import Quantizable, QuantLayer, replace_module, weight_from_matrix, weight_matrix
from quant_core.nn.model import QuantizedParts
from quant_core.nn.steps import StepClock
from quant_spec.tasks.answer import Params

#: Damping of what codes answer, by that of rounding.
_LEANING = 10.0


@dataclass(frozen=True, slots=True)
class Answered:
    """The states with their codes chosen again.

    `layer_sqnr_db`, by layer: signal-to-noise ratio in dB that rounding leaves at its output.
    """

    states: list[UnitState]
    layer_sqnr_db: dict[str, float]


@torch.no_grad()
def answer(model: nn.Module, calibration: CalibrationSet, states: Sequence[UnitState], config: Params) -> Answered:
    """Choose the codes of all units again, each layer's for what the quantized layers before it give.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; left as it is.
    states : sequence of UnitState
        Rounded, with the ranges of their inputs.
    config
        `samples` rows of each step of the calibration set run at once, twice; moments are taken over `positions`
        output positions of each.

    Returns
    -------
    Answered
        What the model does not call, calls with no batch of rows, or convolves in groups, has the codes that it had.
    """
    clock = StepClock(merge_formats(list(states)).timesteps)
    layers = {name: _loaded(model, name, state, clock) for state in states for name in state.formats.layers}
    device = next(model.parameters()).device
    samples = min(config.samples, calibration.samples)
    rows = torch.arange(calibration.steps)[:, None] * calibration.samples + torch.arange(samples)
    batch = calibration.gather(rows.flatten())
    timestep = batch.timestep.to(device)
    clock.set_timestep(timestep)
    with _side_by_side(model, layers, calibration.steps, config) as made:
        conditioning = to_device(concatenate([batch.conditioning] * 2), device)
        call_denoiser(model, batch.x.to(device).repeat(2, *[1] * (batch.x.dim() - 1)), timestep.repeat(2), conditioning)
    answered = [
        replace(state, tensors={**state.tensors, **_layers_alone(layers, state, clock).tensors}) for state in states
    ]
    return Answered(answered, {name: each.sqnr_db for name, each in made.items() if each.sqnr_db is not None})


def _loaded(model: nn.Module, name: str, state: UnitState, clock: StepClock) -> QuantLayer:
    """Return the layer that a state holds, with the bias of full precision, from which its own is found again."""
    original = cast(Quantizable, model.get_submodule(name))
    layer = QuantLayer(original, state.formats.layers[name], clock)
    prefix = f"{name}."
    layer.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in state.below(prefix).items()})
    return layer


def _layers_alone(layers: Mapping[str, QuantLayer], state: UnitState, clock: StepClock) -> UnitState:
    """Return what a state holds of its layers."""
    formats = replace(state.formats, attentions={}, features={}, unserved=())
    return collect_state(QuantizedParts(clock, dict(layers), {}), formats, state.timesteps)


@contextmanager
def _side_by_side(
    model: nn.Module, layers: Mapping[str, QuantLayer], steps: int, config: Params
) -> Iterator[dict[str, _Pair]]:
    """Put pairs in the layers' places; the layers are back at the end."""
    originals = {name: cast(Quantizable, model.get_submodule(name)) for name in layers}
    made = {name: _Pair(name, originals[name], layer, steps, config) for name, layer in layers.items()}
    try:
        for name, pair in made.items():
            replace_module(model, name, pair)
        yield made
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


class _Pair(nn.Module):
    """A layer in full precision and its quantized one, for the first and the second half of a batch."""

    def __init__(self, name: str, original: Quantizable, layer: QuantLayer, steps: int, config: Params) -> None:
        super().__init__()
        self.name, self.original, self.layer = name, original, layer
        self.steps, self.config = steps, config
        self.weight = original.weight  # models ask for its dtype
        self.is_reached = False
        self.sqnr_db: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the exact output of the first half, and the quantized one of the second.

        What is no batch of rows, as a constant that a model embeds once for all of them, is answered exactly, and the
        layer keeps its codes.
        """
        if len(x) % (2 * self.steps):
            return cast(Tensor, self.original(x))
        exact, met = x.chunk(2)
        wanted, quantized = self.original(exact), self.layer.quantize_input(met)
        if not self.is_reached:
            self.is_reached = True
            aim = wanted - self.layer.low_rank_output(met) if self.layer.spec.low_rank else wanted
            self._answer(aim, quantized)
        return torch.cat([wanted, self.layer.of_quantized(quantized, met)])

    def _answer(self, aim: Tensor, quantized: Tensor) -> None:
        """Choose the codes for what is wanted of them, bias included, and what they are multiplied with."""
        if not isinstance(self.original, nn.Linear) and self.original.groups > 1:
            return  # small, and rounded to nearest
        layer, bias = self.layer, self.original.bias
        moment, product, mean = self._moments(aim, quantized)
        if bias is not None:  # codes give what is left without it
            product, mean = product - torch.outer(bias, moment.mean_row()), mean - bias
        second, mean_row = moment.mean(), None
        if self.config.correct_bias and layer.bias is not None:
            second, mean_row = moment.covariance(), moment.mean_row()
            product = product - torch.outer(mean, mean_row)
        matrix = weight_matrix(layer.scaled(self.original.weight.detach().float()))
        leaning = torch.linalg.cholesky(damped(second, _LEANING * self.config.damping))
        matrix = matrix + torch.cholesky_solve((product - matrix @ second).T, leaning).T
        factor = factorize(second, self.config.damping)
        if mean_row is not None and layer.bias is not None and bias is not None:
            layer.bias.copy_(bias + mean - matrix @ mean_row)
        weight, moments = weight_from_matrix(matrix, layer.shape), InputMoments(second, mean_row)
        ranges, damping = self.config.ranges[self.name], self.config.damping
        self.sqnr_db = round_layer(layer, weight, moments, ranges, damping, factor).sqnr_db

    def _moments(self, aim: Tensor, quantized: Tensor) -> tuple[SecondMoment, Tensor, Tensor]:
        """Return moments of x', E[y x'^T] of shape (C_out, K), and E[y] of y with its bias, over some positions."""
        moment, product, mean = SecondMoment(self.layer.columns, aim.device), torch.zeros(()), torch.zeros(())
        for_input, for_output = (seed_stream(self.config.seed, f"rows of {self.name}") for _ in range(2))
        for given, taken in zip(aim.chunk(self.steps), quantized.chunk(self.steps), strict=True):
            rows = input_rows(self.original, taken, self.config.positions, for_input)
            aims = output_rows(self.original, given, self.config.positions, for_output)
            moment.update(rows)
            product, mean = product + aims.T @ rows, mean + aims.sum(dim=0)
        return moment, product / moment.rows, mean / moment.rows
