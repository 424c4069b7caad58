"""Tuning a layer whose groups have multipliers, which stay as they are."""

from __future__ import annotations

import torch
from torch import nn

from quant_core.methods.mpqdm.low_rank import LowRankWeight
from quant_core.nn.layers import QuantLayer
from quant_core.nn.steps import StepClock
from quant_spec.formats import LayerSpec
from tests.quant_core.multiplied import multiplied, random_grid


def test_what_is_learned_is_stored_exactly_and_stays_within_int8() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = QuantLayer(nn.Linear(96, 8), LayerSpec(multiplied(), split=(64, 32)), StepClock(()))
    codes = torch.randint(0, 16, (8, 96), generator=draw, dtype=torch.uint8)
    layer.set_codes(codes, *random_grid(layer, draw))
    before, multiplier = layer.weight.clone(), layer.multiplier.clone()
    tuned = LowRankWeight(layer, before, 4, draw)
    assert torch.equal(tuned.weight(), before), "tuning begins at the codes of its start"
    with torch.no_grad():
        tuned.b.normal_(generator=draw).mul_(0.01)
        tuned.log_scale.normal_(generator=draw).mul_(0.1)
        tuned.zero_point.add_(torch.randint(-9, 10, tuned.zero_point.shape, generator=draw))
    learned = tuned.weight()
    learned.square().sum().backward()
    for name in ("a", "b", "log_scale", "zero_point"):
        gradient = tuned.parameters()[name].grad
        assert gradient is not None
        assert bool(gradient.any()), name
    tuned.commit()
    assert torch.equal(layer.weight, learned)
    assert torch.equal(layer.multiplier, multiplier)
    layer.check_multipliers()
