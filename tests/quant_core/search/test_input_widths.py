"""Bits of inputs by layer and step: where they go."""

from __future__ import annotations

from typing import Any

import torch

from quant_core.search.input_widths import choose_widths


def told(harm: dict[str, float], steps: int = 4) -> dict[str, Any]:
    """Layers of equal size and error at each step, whose errors do this to the samples; early steps count most."""
    return {
        "own": dict.fromkeys(harm, 6),
        "choices": (5, 6, 8),
        "macs": dict.fromkeys(harm, 100),
        "damages": harm,
        "by_step": {name: torch.ones(steps) for name in harm},
        "gains": [4.0**-step for step in range(steps)],
    }


def test_bits_go_to_what_costs_most_at_the_same_mean() -> None:
    harm = {"a": 100.0, "b": 1.0, "c": 1.0, "d": 1.0}
    found = choose_widths(**told(harm))
    assert sum(map(sum, found.values())) <= 6 * 4 * len(harm)
    assert found["a"][0] == 8
    assert sum(found["a"]) > max(sum(found[name]) for name in "bcd")
    assert all(list(own[:-1]) == sorted(own[:-1], reverse=True) for own in found.values())
    assert all(own[-1] >= 6 for own in found.values())
    assert {bits for own in found.values() for bits in own} == {5, 6, 8}


def test_bits_of_small_layers_are_cheap() -> None:
    arguments = told(dict.fromkeys("ab", 1.0)) | {"macs": {"a": 1, "b": 10_000}}
    found = choose_widths(**arguments)
    assert found["a"] == (8, 8, 8, 8)
    assert sum(found["b"]) <= 24
    nothing = choose_widths(**(arguments | {"damages": dict.fromkeys("ab", 0.0)}))
    assert sum(nothing["b"]) <= 24
