"""What a table of sensitivities says: where the next bit pays most, where bits are missed least."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.actions.sensitivity import (
    next_steps,
    read_sensitivities,
    sensitivity_text,
    smallest_within,
    spare_steps,
    total_bytes,
)
from quant_spec.errors import InvalidInputError


def entry(damages: dict[str, float], parameters: int, **more: Any) -> dict[str, Any]:
    """Return a layer of a table, a byte for eight bits."""
    weights = {
        label: {"damage": damage, "bytes": round(parameters * float(label.split("+")[0]) / 8) + 10 * ("+" in label)}
        for label, damage in damages.items()
    }
    keep = {"damage": 0.0, "bytes": parameters * 2}
    return {"weights": weights, "activations": {}, "keep": keep, "parameters": parameters, "macs": 1} | more


TABLE: dict[str, Any] = {
    "layers": {
        # A byte more takes away 0.06 / 10 here, but two widths up 0.1 / 20 + ...: the first step is the best.
        "small": entry({"2": 0.4, "4": 0.1, "4+0.5": 0.04, "8": 0.001}, 80),
        "large": entry({"2": 2.0, "4": 0.5, "8": 0.1}, 8000),
        # 5 bits are worse than 4 by noise: the best step skips them.
        "odd": entry({"4": 0.2, "5": 0.21, "8": 0.02}, 800),
        "attention": {
            "weights": {},
            "activations": {"4": [0.3, 0.1], "8": [0.01, 0.01]},
            "keep": {"damage": 0.0, "bytes": 0},
            "parameters": 0,
            "macs": 5,
        },
    },
    "base_bytes": 1000,
    "unit": {"small": "a", "large": "a", "odd": "b", "attention": "b"},
}


def test_layers_stand_in_the_order_in_which_they_run() -> None:
    found = read_sensitivities(TABLE, ["odd", "unknown", "small"])
    assert [layer.name for layer in found.layers] == ["odd", "small", "large", "attention"]
    assert found.labels == ("2", "4", "4+0.5", "5", "8", "keep")
    assert found.middle == "4"


def test_the_next_bit_pays_most_where_a_byte_takes_away_most_damage() -> None:
    found = read_sensitivities(TABLE)
    steps = next_steps(found, "4")
    assert [(step.layer.name, step.end.label) for step in steps] == [("small", "4+0.5"), ("odd", "8"), ("large", "8")]
    assert steps[0].per_byte == pytest.approx(0.06 / 10)
    assert (steps[1].bytes, steps[1].drop) == (400, pytest.approx(0.18))
    assert steps[2].per_byte == pytest.approx(0.4 / 4000)


def test_bits_are_missed_least_where_a_byte_saved_adds_least_damage() -> None:
    steps = spare_steps(read_sensitivities(TABLE), "8")
    assert [step.layer.name for step in steps] == ["large", "odd", "small"]
    assert (steps[0].end.label, steps[0].bytes) == ("4", -4000)
    assert steps[0].per_byte == pytest.approx(0.4 / 4000)


def test_totals_take_the_nearest_choice_below() -> None:
    found = read_sensitivities(TABLE)
    assert found.damage_at("4") == pytest.approx(0.1 + 0.5 + 0.2)
    assert found.damage_at("2") == pytest.approx(0.4 + 2.0 + 0.2), "odd has no 2 bits"
    assert found.damage_at("keep") == 0
    assert total_bytes(found, "4") == 1000 + 40 + 4000 + 400


def test_the_inverse_question_is_the_smallest_file_for_each_decibel() -> None:
    front = [(100, 1.0, 20.4), (200, 0.1, 30.2), (400, 0.01, 40.0), (500, 0.0, float("inf"))]
    assert smallest_within(front) == [(40.0, 400), (30.0, 200), (20.0, 100)]
    assert smallest_within(front, most=2) == [(40.0, 400), (20.0, 100)]
    assert smallest_within([]) == []


def test_text_names_layers_shares_and_steps() -> None:
    text = sensitivity_text(TABLE, model="thing", front=[(5000, 0.1, 30.0), (9000, 0.01, 40.0)])
    assert text.startswith("thing: 4 layers, 8.88k weights, 1.00 kB beside them.")
    up = text.index("where the next bit pays most, all else at 4:")
    down = text.index("where bits are missed least, all else at 4:")
    lines = [line.split() for line in text[up:down].splitlines()]
    assert lines[2][:4] == ["small", "4", "->", "4+0.5"]
    assert lines[2][4:8] == ["12.5", "%", "0.9", "%"]
    assert lines[4][0] == "large"
    assert "attention  4     0.4" in text
    assert "0.3 0.1" in text
    assert "40 dB  9.00 kB" in text
    assert len(sensitivity_text(TABLE, model="thing", most=1).splitlines()) < len(text.splitlines()) - 4
    with pytest.raises(InvalidInputError, match="--start: got 3, wanted one of 2, 4"):
        sensitivity_text(TABLE, model="thing", start="3")
