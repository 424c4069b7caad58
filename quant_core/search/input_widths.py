"""Bits of each layer's input at each trajectory step, by what quantizing it does to the final sample.

How much a layer's quantized input does to the sample, over the whole trajectory, is tried (`quant_core.fit.trials`):
errors of some layers add up from step to step and those of others do not, which no step says. How that damage is spread
over the steps is the error of each step's prediction with this input quantized alone
(`quant_core.fit.input_widths.measure_steps`), times the gain of the step (`quant_core.fit.step_gains`). It goes with
the square of a code's width: by 4 for each bit.

Bits are then chosen for all layers and steps at once, with the least sum of damages, while their mean over
multiplications and steps stays what it was. Choices should not reach far below it: where inputs of whole areas round to
one code, other errors begin than those that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quant_core.search.knapsack import Choice, choose

Widths = dict[str, tuple[int, ...]]


def choose_widths(
    own: Mapping[str, int],
    choices: Sequence[int],
    macs: Mapping[str, int],
    damages: Mapping[str, float],
    by_step: Mapping[str, Tensor],
    gains: Sequence[float],
) -> Widths:
    """Choose the bits of each layer's input at each step.

    Parameters
    ----------
    own : mapping of str to int
        Bits that the layers' inputs have, at all steps.
    choices : sequence of int
        Bits that they may have instead; their own are a choice in any case.
    macs : mapping of str to int
        The layers' multiplications.
    damages : mapping of str to float
        Mean square error of the final samples with one layer's input quantized, at all steps.
    by_step : mapping of str to Tensor, shape (S,)
        Mean square error of the prediction of each step with one layer's input quantized.
    gains : sequence of float, length S
        Mean square error of the final samples per mean square error of a step's prediction.

    Returns
    -------
    dict of str to tuple of int, length S
        The last step has no fewer bits than it had: its error is the smallest, but nothing smooths it.
    """
    weights = torch.tensor(gains, dtype=torch.float64)
    steps = len(gains)
    widths = {name: sorted({bits, *choices}) for name, bits in own.items()}
    items, allowed = [], []
    most = max(max(macs[name] for name in own), 1)
    for name, bits in own.items():
        shares = weights * by_step[name]
        shares = shares / shares.sum().clamp(min=1e-300)
        for step in range(steps):
            open_ = [width for width in widths[name] if step < steps - 1 or width >= bits]
            damage = damages[name] * float(shares[step])
            items.append([Choice(damage * 4.0 ** (bits - width), width * macs[name] / most) for width in open_])
            allowed.append(open_)
    largest = max((choice.cost for item in items for choice in item), default=0.0) or 1.0
    items = [[Choice(choice.cost / largest, choice.size) for choice in item] for item in items]
    budget = sum(bits * macs[name] / most for name, bits in own.items()) * steps
    picked = [open_[place] for open_, place in zip(allowed, choose(items, budget * (1 + 1e-12)), strict=True)]
    return {name: tuple(picked[at * steps : (at + 1) * steps]) for at, name in enumerate(own)}
