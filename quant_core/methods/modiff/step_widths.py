"""Bits of a difference for each step of each layer, by what its rounding does to the final sample.

The error of rounding one layer's input at step t goes into the prediction of that step alone, as the next difference
takes it back. So its damage is that to the prediction, found by adding uniform noise as wide as a code to the input of
the layer in the full-precision model, times the gain of the step (`quant_core.fit.step_gains`), and goes with the
square of a code's width s. What a step leaves over, the next has to span:

    s_t = (D_t + s_(t-1)) / (2^b_t - 1)       D_t: range of what the layer reads less what it read a step before

or the width of plain codes at a plain step. Where an input moves by less than a code, its code stays, and so does its
error, which then adds up over steps. An error within a code of width s, uniform, and what is left of it after a move of
u s correlate by 1 - 6 u (1 - u), and a chain of errors that correlate by r from step to step makes (1 + r) / (1 - r)
times the power of independent ones.

So the bits of a layer's steps depend on each other, and are chosen by dynamic programming over its steps, at a price
for a multiplication's bit which is the same for all layers, and the least at which all are within the sum that one
width takes.

MoDiff has the same bits everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quant_core.diffusion.calibration import CalibrationSet, replay
from quant_core.diffusion.conditioning import seed_stream
from quant_core.fit.step_gains import StepGains
from quant_core.inspect.prefix import Prefix
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_spec.formats import SUPPORTED_BITS
from quant_spec.tasks.differences import Params

#: Stands for a plain step among a layer's widths.
PLAIN = 0
#: Calibration samples whose predictions are compared.
SAMPLES = 2
#: Least share of a difference's range that is not what the step before left over.
LEAST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Rounding:
    """How one layer rounds what it reads, found with the same bits everywhere.

    Attributes
    ----------
    name
        Of the layer.
    layer
        The quantized layer.
    macs
        In proportion to its multiplications.
    bits
        Of plain codes.
    widths
        Bits of a difference at each step, 0 where the layer is plain; length S.
    plain, tried
        Width of a plain code and of a difference's, of `tried_bits`, at each step, for each part of a split input;
        shape (S, parts). The first step, and all of a layer that may not read differences, have no difference's: nan.
    tried_bits
        Bits of the differences that were tried, length S.
    moves
        Mean absolute change of the input since the step before, shape (S, parts); nan where `tried` is.
    """

    name: str
    layer: QuantLayer
    macs: int
    bits: int
    widths: tuple[int, ...]
    plain: Tensor
    tried: Tensor
    tried_bits: tuple[int, ...]
    moves: Tensor

    @property
    def is_open(self) -> bool:
        """Whether the layer may read differences."""
        return not bool(self.tried[1:].isnan().any())

    def noise(self, x: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:
        """Return uniform noise as wide as a difference's code, for input rows of these steps; none at the first."""
        dim = -1 if self.layer.kind is nn.Linear else 1
        quantizers = [each for each in self.layer.act_quantizers if isinstance(each, ActivationQuantizer)]
        widths = self.tried.nan_to_num(0.0)[steps.cpu()].to(x)  # (rows, parts)
        parts = []
        for place, (quantizer, values) in enumerate(
            zip(quantizers, x.split(self.layer.spec.split or (x.shape[dim],), dim), strict=True)
        ):
            drawn = torch.rand(values.shape, generator=generator).to(values) - 0.5
            drawn *= widths[:, place].view(-1, *[1] * (values.dim() - 1))
            if quantizer.channels is not None and quantizer.channels.scaled:
                drawn *= quantizer.channels.shape(values, quantizer.channel_scale)
            parts.append(drawn)
        return torch.cat(parts, dim)


def choose_step_widths(
    model: nn.Module, calibration: CalibrationSet, roundings: Sequence[Rounding], gains: StepGains, params: Params
) -> dict[str, tuple[int, ...]]:
    """Choose the bits of each step of each layer.

    Parameters
    ----------
    model : nn.Module
        In full precision.
    calibration : CalibrationSet
        Every step of the sampler's trajectory.
    roundings : sequence of Rounding
    gains : StepGains

    Returns
    -------
    dict of str to tuple of int, length S
        Bits of a difference, 0 where the layer is plain; of layers that may read differences. Multiplications times
        bits, plain steps among them, are at most what `roundings` have. No step has more than one bit less than was
        tried: an input lags behind codes that are much wider than its moves, in whole areas, and that is no noise. The
        last has no fewer: its error is the smallest, but nothing smooths it.
    """
    roundings = [rounding for rounding in roundings if rounding.is_open]
    if not roundings:
        return {}
    damage = measure_noise(model, calibration, roundings, params)
    weights = torch.tensor(gains.gains, dtype=torch.float64)
    table = _Table.of(roundings, [weights * damage[rounding.name] for rounding in roundings])
    macs = np.array([rounding.macs for rounding in roundings], dtype=np.float64)
    budget = sum(rounding.macs * sum(width or rounding.bits for width in rounding.widths[1:]) for rounding in roundings)

    def used(widths: NDArray[np.int64]) -> float:
        return float((np.where(widths == PLAIN, table.bits[:, None], widths) * macs[:, None]).sum())

    low, high = 0.0, 1.0
    while used(table.cheapest(high * macs)) > budget and high < 1e30:
        low, high = high, 8 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if used(table.cheapest(middle * macs)) > budget else (low, middle)
    chosen = table.cheapest(high * macs)
    return {rounding.name: (PLAIN, *own) for rounding, own in zip(roundings, chosen.tolist(), strict=True)}


@dataclass(frozen=True, slots=True)
class _Table:
    """What widths of codes do, of L layers at all steps but the first.

    Attributes
    ----------
    bits : array, shape (L,)
        Of plain codes.
    first : array, shape (L,)
        Width of a plain code at the first step.
    plain, spans, moves, damage : array, shape (L, S - 1)
        Width of a plain code; range of a difference without what the step before left over, and its mean absolute
        value; damage of a code per its width squared.
    least : array, shape (L, S - 1), dtype int64
        The fewest bits of a difference.
    """

    bits: NDArray[np.int64]
    first: NDArray[np.float64]
    plain: NDArray[np.float64]
    spans: NDArray[np.float64]
    moves: NDArray[np.float64]
    damage: NDArray[np.float64]
    least: NDArray[np.int64]

    @classmethod
    def of(cls, roundings: Sequence[Rounding], damages: Sequence[Tensor]) -> _Table:
        """Make the table of roundings, and what their noise of the tried width does at each step."""
        plain = np.stack([rounding.plain.double().square().mean(1).sqrt().numpy() for rounding in roundings])
        tried = np.stack([rounding.tried.double().square().mean(1).sqrt().numpy() for rounding in roundings])[:, 1:]
        bits = np.array([rounding.tried_bits for rounding in roundings])[:, 1:]
        taken = np.array([rounding.widths for rounding in roundings])[:, 1:] != PLAIN
        before = np.concatenate([plain[:, :1], np.where(taken, tried, plain[:, 1:])[:, :-1]], axis=1)
        ranges = tried * (2.0**bits - 1)
        least = bits - 1
        least[:, -1] = bits[:, -1]
        power = torch.stack(list(damages)).numpy()[:, 1:] / np.maximum(tried, 1e-30) ** 2
        return cls(
            np.array([rounding.bits for rounding in roundings]),
            plain[:, 0],
            plain[:, 1:],
            np.maximum(ranges - before, LEAST_SHARE * ranges),
            np.stack([rounding.moves.double().square().mean(1).sqrt().numpy() for rounding in roundings])[:, 1:],
            power,
            least,
        )

    def cheapest(self, price: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the widths of each layer's steps, shape (L, S - 1), with the least damage and price of bits.

        Of the paths to a width the cheapest is kept, with the width of code that it leaves.
        """
        choices = np.array([PLAIN, *SUPPORTED_BITS])
        layers, steps = self.spans.shape
        cost = np.zeros((layers, 1))
        left = self.first[:, None]
        came: list[NDArray[np.int64]] = []
        for step in range(steps):
            codes = (self.spans[:, step, None] + left)[:, :, None] / (2.0 ** choices[None, None, 1:] - 1)
            plain = np.broadcast_to(self.plain[:, step, None, None], (*codes.shape[:2], 1))
            codes = np.concatenate([plain, codes], axis=2)  # (L, before, choices)
            bits = np.where(choices == PLAIN, self.bits[:, None], choices)
            power = self.damage[:, step, None, None] * codes**2 * self._coherence(step, codes)
            total = cost[:, :, None] + power + (price[:, None] * bits)[:, None]
            refused = (choices != PLAIN) & (choices < self.least[:, step, None])
            total = np.where(refused[:, None], np.inf, total)
            best = total.argmin(axis=1)
            came.append(best)
            cost = np.take_along_axis(total, best[:, None], axis=1)[:, 0]
            left = np.take_along_axis(codes, best[:, None], axis=1)[:, 0]
        place = cost.argmin(axis=1)
        found = np.empty((layers, steps), dtype=np.int64)
        for step in reversed(range(steps)):
            found[:, step] = choices[place]
            place = came[step][np.arange(layers), place]
        return found

    def _coherence(self, step: int, codes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how much more power errors of codes make, as they stay from step to step; shape as `codes`."""
        moved = np.minimum(self.moves[:, step, None, None] / np.maximum(codes, 1e-30), 0.5)
        kept = np.clip(1 - 6 * moved * (1 - moved), 0, None)
        return np.minimum((1 + kept) / np.maximum(1 - kept, 1e-9), self.spans.shape[1])


@torch.no_grad()
def measure_noise(
    model: nn.Module, calibration: CalibrationSet, roundings: Sequence[Rounding], params: Params
) -> dict[str, Tensor]:
    """Measure what each layer's rounding noise at each step does to the prediction of that step.

    Returns
    -------
    dict of str to Tensor, shape (S,), float64
        Mean square difference of the prediction.
    """
    prefix = Prefix(model, [], {rounding.name: "" for rounding in roundings})
    samples = min(SAMPLES, calibration.samples)
    steps = torch.arange(calibration.steps)
    found = {rounding.name: torch.zeros(calibration.steps, dtype=torch.float64) for rounding in roundings}
    for sample in range(samples):
        batch = calibration.gather(steps * calibration.samples + sample)
        given = prefix.record(lambda batch=batch: replay(model, batch))  # type: ignore[misc]
        for rounding in roundings:
            generator = seed_stream(params.seed, f"rounding noise of {rounding.name}, {sample}")

            def add(
                _: nn.Module, args: tuple[Tensor, ...], own: Rounding = rounding, drawn: torch.Generator = generator
            ) -> tuple[Tensor, ...]:
                return (args[0] + own.noise(args[0], steps, drawn), *args[1:])

            with prefix.before(rounding.name):
                handle = model.get_submodule(rounding.name).register_forward_pre_hook(add)
                try:
                    error = replay(model, batch) - given
                finally:
                    handle.remove()
            found[rounding.name] += error.double().square().flatten(1).mean(1).cpu() / samples
    return found
