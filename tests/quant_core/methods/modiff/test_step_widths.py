"""Bits of steps: what a path of widths costs, and the least within a price."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from quant_core.methods.modiff.step_widths import PLAIN, _Table
from quant_spec.formats import SUPPORTED_BITS


def cost_of(table: _Table, layer: int, path: tuple[int, ...], price: float) -> float:
    """What one layer's widths cost, by the formulas of the module."""
    left, total = float(table.first[layer]), 0.0
    for step, bits in enumerate(path):
        if bits == PLAIN:
            left, taken = float(table.plain[layer, step]), int(table.bits[layer])
        else:
            left, taken = (float(table.spans[layer, step]) + left) / (2**bits - 1), bits
        moved = min(float(table.moves[layer, step]) / left, 0.5)
        kept = max(0.0, 1 - 6 * moved * (1 - moved))
        coherence = min((1 + kept) / max(1 - kept, 1e-9), len(path))
        total += float(table.damage[layer, step]) * left**2 * coherence + price * taken
    return total


def a_table(seed: int) -> _Table:
    draw = np.random.default_rng(seed)
    spans: NDArray[np.float64] = draw.lognormal(0, 1, (2, 3))
    return _Table(
        bits=np.array([8, 8]),
        first=np.full(2, 0.05),
        plain=np.full((2, 3), 0.05),
        spans=spans,
        moves=spans * draw.uniform(0.02, 0.3, (2, 3)),
        damage=draw.lognormal(0, 2, (2, 3)),
        least=np.array([[2, 2, 3], [2, 2, 4]]),
    )


@pytest.mark.parametrize("seed", range(5))
def test_paths_are_next_to_the_cheapest_of_all(seed: int) -> None:
    table = a_table(seed)
    prices = np.array([0.01, 0.3])
    found = table.cheapest(prices)
    for layer in range(2):
        paths = itertools.product((PLAIN, *SUPPORTED_BITS), repeat=3)
        allowed = [path for path in paths if path[2] == PLAIN or path[2] >= table.least[layer, 2]]
        least = min(cost_of(table, layer, path, float(prices[layer])) for path in allowed)
        assert cost_of(table, layer, tuple(found[layer].tolist()), float(prices[layer])) <= 1.02 * least


def test_dearer_bits_are_fewer() -> None:
    table = a_table(0)
    used = [
        int(np.where(found == PLAIN, 8, found).sum())
        for found in map(table.cheapest, np.outer((0.001, 0.1, 10), (1, 1)))
    ]
    assert used == sorted(used, reverse=True)
    assert used[0] > used[-1]
