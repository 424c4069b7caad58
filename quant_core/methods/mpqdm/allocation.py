"""MPQ-DM: bits of each output channel by its outliers.

Feng et al., arXiv:2412.11549; its distillation is `quant_core.methods.mpqdm.distillation`.

Outlier-driven mixed quantization (OMQ): output channels whose weights have heavy tails get one bit more, as many with
light tails one bit less. Where we differ from the authors' code (mpq-dm@2b05dd7), and why:

- Their search compares no mixing with 10 % only (the sweep is commented out), leaves activations in full precision, and
  compares the bits where it means to set them (`quant_layer.py`:174 and 182), so that candidates are measured on the
  wrong number of codes. Here all candidates are swept, with the grids and the quantized activations that are deployed.
- An output channel's error depends on its own bits alone. So three quantizations per layer, at N - 1, N and N + 1 bits,
  give the error of every candidate, exactly.
- One step beyond the paper: all layers at once. A layer may promote more channels than it demotes if others do the
  reverse, all of them if it must be; chosen by one exact knapsack over the error power that each layer's error makes at
  the model's prediction.
- Their pre-scale of the input channels is not part of it.
- 1 bit: a grid has a code for zero (`quant_core.nn.ranges`), so the other code of such a channel is on one side of it.
  Its error is some thirty times that of 2 bits, so that at N = 2 the sweep in one layer ends at m = 0 on the models
  tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.methods.mpqdm.layer_errors import LayerErrors
from quant_core.search.knapsack import Choice, choose
from quant_spec.enums import AllocationMethod
from quant_spec.passes.allocate import AllocateChoice

#: In one layer m is swept in tenths of the output channels, up to half of them.
TENTHS = 5


@dataclass(frozen=True, slots=True)
class Split:
    """How many channels get one more bit, and how many one less."""

    promoted: int
    demoted: int


def channel_bits(layer: LayerErrors, split: Split) -> Tensor:
    """Return the bits of each output channel, shape (C_out,), dtype uint8: heaviest tails up, lightest down."""
    order = torch.sort(layer.kurtosis, descending=True, stable=True).indices
    bits = torch.full((layer.channels,), layer.bits, dtype=torch.uint8)
    bits[order[: split.promoted]] += 1
    if split.demoted:
        bits[order[-split.demoted :]] -= 1
    return bits


def output_error(layer: LayerErrors, split: Split) -> float:
    """Return the mean squared error of the layer's output, summed over channels."""
    place = channel_bits(layer, split).long() - (layer.bits - 1)
    return float(layer.errors.gather(1, place[:, None]).sum())


def extra_channels(layer: LayerErrors, config: AllocateChoice) -> int:
    """Return how many channels of one layer are promoted without another being demoted: at most `extra` of them."""
    return int(config.extra * layer.channels)


def choose_in_layer(layer: LayerErrors, config: AllocateChoice) -> Split:
    """Return the split with the least output error among m = 0, 10 %, ... 50 % of the channels up and as many down."""
    extra = extra_channels(layer, config)
    sweep = range(0, min(TENTHS * layer.step, (layer.channels - extra) // 2) + 1, layer.step)
    return min((Split(m + extra, m) for m in sweep), key=lambda split: output_error(layer, split))


def choose_over_layers(layers: Sequence[LayerErrors], config: AllocateChoice) -> list[Split]:
    """Return the split of each layer with the least error power at the prediction.

    All layers together have the bits that they would have at N, and `extra` more per weight: what the knapsack's splits
    leave goes to single channels, until it is less than a row of any layer that can take a bit more.
    """
    options = [_options(layer) for layer in layers]
    # Sizes count the bits over those of demoting as many as any choice does.
    least = [min(split.promoted - split.demoted for split, _ in own) for own in options]
    items = [
        [Choice(cost, (split.promoted - split.demoted - low) * layer.columns) for split, cost in own]
        for layer, own, low in zip(layers, options, least, strict=True)
    ]
    allowed = int(config.extra * sum(layer.channels * layer.columns for layer in layers))
    spent = -sum(low * layer.columns for layer, low in zip(layers, least, strict=True))
    splits = [own[place][0] for own, place in zip(options, choose(items, allowed + spent), strict=True)]
    return _spend(layers, splits, allowed)


def _spend(layers: Sequence[LayerErrors], splits: Sequence[Split], allowed: int) -> list[Split]:
    """Give what splits leave of `allowed` weight-bits to single channels, those first that lower the error the most."""
    found = list(splits)
    left = allowed - sum((s.promoted - s.demoted) * layer.columns for layer, s in zip(layers, found, strict=True))
    while True:
        best, place, taken = 0.0, -1, Split(0, 0)
        for number, (layer, split) in enumerate(zip(layers, found, strict=True)):
            more = _one_more(layer, split)
            if more is None or layer.columns > left:
                continue
            gain = layer.effect * (output_error(layer, split) - output_error(layer, more)) / layer.columns
            if place < 0 or gain > best:
                best, place, taken = gain, number, more
        if place < 0:
            return found
        found[place] = taken
        left -= layers[place].columns


def _one_more(layer: LayerErrors, split: Split) -> Split | None:
    """Return the split with one bit more in one channel; None if all are at N + 1."""
    if split.demoted:
        return Split(split.promoted, split.demoted - 1)
    return Split(split.promoted + 1, 0) if split.promoted < layer.channels else None


def _options(layer: LayerErrors) -> list[tuple[Split, float]]:
    """Return the best split for each number of bits that a layer may get, with its cost."""
    tenths = [*range(0, layer.channels, layer.step), layer.channels]
    fewest = 1 if layer.bits == 2 else 0  # a layer of nothing but 1-bit channels has no format
    best: dict[int, tuple[Split, float]] = {}
    for split in (Split(up, down) for up in tenths for down in tenths if up + down <= layer.channels):
        if split.demoted > layer.channels - fewest:
            continue
        cost = layer.effect * output_error(layer, split)
        shift = split.promoted - split.demoted
        if shift not in best or cost < best[shift][1]:
            best[shift] = split, cost
    return [best[shift] for shift in sorted(best)]


def allocate(layers: Mapping[str, LayerErrors], config: AllocateChoice) -> dict[str, Tensor]:
    """Return the bits of each output channel of each layer, shape (C_out,), dtype uint8."""
    if config.method is AllocationMethod.GLOBAL:
        splits = choose_over_layers(list(layers.values()), config)
    else:
        splits = [choose_in_layer(layer, config) for layer in layers.values()]
    return {name: channel_bits(layer, split) for (name, layer), split in zip(layers.items(), splits, strict=True)}
