"""Closed-form rounding that answers for the layers before: codes for inputs that are quantized already.

GPTAQ (Li et al., arXiv:2504.02692). With x what a layer reads in full precision, and x' what it reads, quantized, where
all layers before it are rounded, sum |W' x' - W x|^2 is least for

    W' = W + W E[(x - x') x'^T] E[x' x'^T]^-1

and what rounding adds is (W' - Q) E[x' x'^T] (W' - Q)^T, which closed form makes small (`quant_core.fit.closed_form`).

Both models run side by side in one forward of all rows, the exact one's in the first half of the batch. Each layer is
rounded when it is first reached, so all layers before it are. Attention's products stay exact meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet
from quant_core.diffusion.conditioning import concatenate, seed_stream, to_device
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.fit.closed_form import damped
from quant_core.fit.hessian import InputMoments, input_rows
from quant_core.fit.layer_rounding import RoundedLayer, round_layer
from quant_core.nn.layers import QuantLayer, replace_module, weight_from_matrix, weight_matrix
from quant_core.nn.steps import StepClock
from quant_spec.ranges import RangeSpec
from quant_spec.tasks.round import Params


@torch.no_grad()
def round_in_order(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    ranges: Mapping[str, RangeSpec],
    clock: StepClock,
    calibration: CalibrationSet,
    config: Params,
) -> dict[str, RoundedLayer]:
    """Set the codes of layers, each for what the quantized layers before it give.

    Parameters
    ----------
    model : nn.Module
        The full-precision denoiser; left as it is.
    layers : mapping of str to QuantLayer
        What will take the places of its layers; ranges of their inputs are set.
    ranges : mapping of str to RangeSpec
        How the range of each layer's weight is found.
    clock : StepClock
        That of `layers`.
    config
        `samples` rows of each step of the calibration set run at once, twice; moments are taken over `positions`
        output positions of each.

    Returns
    -------
    dict of str to RoundedLayer
        Of the layers that the model called.
    """
    device = next(model.parameters()).device
    samples = min(config.samples, calibration.samples)
    rows = torch.arange(calibration.steps)[:, None] * calibration.samples + torch.arange(samples)
    batch = calibration.gather(rows.flatten())
    timestep = batch.timestep.to(device)
    clock.set_timestep(timestep)
    with _side_by_side(model, layers, ranges, calibration.steps, config) as made:
        conditioning = to_device(concatenate([batch.conditioning] * 2), device)
        call_denoiser(model, batch.x.to(device).repeat(2, *[1] * (batch.x.dim() - 1)), timestep.repeat(2), conditioning)
    return {name: each.rounded for name, each in made.items() if each.rounded is not None}


@contextmanager
def _side_by_side(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    ranges: Mapping[str, RangeSpec],
    steps: int,
    config: Params,
) -> Iterator[dict[str, _Pair]]:
    """Put pairs in the layers' places; the layers are back at the end."""
    originals = {name: model.get_submodule(name) for name in layers}
    made = {n: _Pair(n, originals[n], layer, ranges[n], steps, config) for n, layer in layers.items()}
    try:
        for name, pair in made.items():
            replace_module(model, name, pair)
        yield made
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


class _Pair(nn.Module):
    """A layer in full precision and its quantized one, for the first and the second half of a batch."""

    def __init__(
        self, name: str, original: nn.Module, layer: QuantLayer, ranges: RangeSpec, steps: int, config: Params
    ) -> None:
        super().__init__()
        self.name, self.original, self.layer = name, original, layer
        self.ranges, self.steps, self.config = ranges, steps, config
        self.weight = original.weight  # models ask for its dtype
        self.rounded: RoundedLayer | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the exact output of the first half, and the quantized one of the second.

        What is no batch of rows, as a constant that a model embeds once for all of them, is answered exactly, and the
        layer is left to be rounded without moments.
        """
        if len(x) % (2 * self.steps):
            return cast(Tensor, self.original(x))
        exact, quantized = x.chunk(2)
        if self.rounded is None:
            self.rounded = self._round(exact, self.layer.quantize_input(quantized))
        return torch.cat([self.original(exact), self.layer(quantized)])

    def _round(self, exact: Tensor, quantized: Tensor) -> RoundedLayer:
        """Round the layer for its quantized input."""
        weight = self.original.get_parameter("weight").detach().float()
        matrix = weight_matrix(weight)
        second, cross = self._moments(exact, quantized)
        if len(second) != matrix.shape[1]:  # a grouped convolution, which is rounded to nearest
            return round_layer(self.layer, weight, None, self.ranges, self.config.damping)
        wanted = weight_from_matrix(answering(matrix, second, cross, self.config.damping), self.layer.shape)
        return round_layer(self.layer, wanted, InputMoments(second), self.ranges, self.config.damping)

    def _moments(self, exact: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[x' x'^T] and E[(x - x') x'^T], shape (K, K), over positions that both halves share."""
        second = cross = torch.zeros(())
        count = 0
        draws = [seed_stream(self.config.seed, f"rows of {self.name}") for _ in range(2)]
        for halves in zip(exact.chunk(self.steps), quantized.chunk(self.steps), strict=True):
            own, met = (
                input_rows(self.original, half, self.config.positions, draw)
                for half, draw in zip(halves, draws, strict=True)
            )
            second, cross, count = second + met.T @ met, cross + (own - met).T @ met, count + len(met)
        return second / count, cross / count


def answering(weight: Tensor, second: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the weight that comes nearest to a layer's exact output from quantized inputs.

    Parameters
    ----------
    weight : Tensor, shape (C_out, K)
    second, cross : Tensor, shape (K, K)
        E[x' x'^T] and E[(x - x') x'^T], of x' quantized and x exact.
    damping : float
        Share of the mean diagonal of `second` that is added to it.
    """
    factor = torch.linalg.cholesky(damped(second, damping))
    return weight + torch.cholesky_solve((weight @ cross).T, factor).T
