from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from quant_core.search.price import price
from quant_core.search.space import Costs
from quant_spec.allocation import Allocation
from quant_spec.errors import InvalidInputError
from workers.execution.context import TaskOutput
from workers.storage.store import NodeStore

WIDTHS = (2, 3, 4, 8)
COMMON = {"objective": "psnr_db", "candidates": 8, "seed": 0}


def toy_table(layers: int = 5, *, seed: int = 0, ranges: int = 0, shares: tuple[float, ...] = ()) -> dict[str, Any]:
    """Return a table of layers of several sizes whose damage falls by about 6 dB a bit."""
    generator = np.random.default_rng(seed)
    entries: dict[str, Any] = {}
    for place in range(layers):
        parameters = int(generator.integers(1, 50)) * 1000
        scale = float(np.exp(generator.normal(0, 1.5)))
        keys = {str(width): float(width) for width in WIDTHS}
        keys |= {f"{low}+{share:g}": low + share * (high - low) for share in shares for low, high in pairwise(WIDTHS)}
        weights = {
            key: {
                "damage": scale * 4.0**-bits * float(np.exp(generator.normal(0, 0.2))),
                "bytes": round(parameters * bits / 8) + 90,
            }
            for key, bits in keys.items()
        }
        inputs = {str(width): [scale * 4.0**-width / 8] * ranges for width in (4, 6, 8)} if ranges else {}
        entries[f"unit{place // 2}.layer{place}"] = {
            "weights": weights,
            "activations": inputs,
            "keep": {"damage": 0.0, "bytes": 4 * parameters},
            "parameters": parameters,
            "macs": parameters * int(generator.integers(1, 64)),
        }
    return {"layers": entries, "base_bytes": 1000, "unit": {name: name.partition(".")[0] for name in entries}}


@pytest.fixture
def propose(run_task: Callable[..., TaskOutput], task_store: NodeStore) -> Callable[..., dict[str, Any]]:
    """Run the task on tables, by variant."""

    def run(tables: list[tuple[str, dict[str, Any]]], **params: Any) -> dict[str, Any]:
        told = {**COMMON, "budgets": [], "variants": [variant for variant, _ in tables], **params}
        digests = [task_store.put_bytes(json.dumps(table).encode()) for _, table in tables]
        output = run_task("propose", told, {"tables": digests})
        found: dict[str, Any] = json.loads(task_store.get_bytes(output.outputs["proposals"]))
        counted = {name: output.metrics[name] for name in ("points", "infeasible")}
        assert counted == {name: len(found[name]) for name in counted}
        return found

    return run


def every_allocation(table: dict[str, Any]) -> list[dict[str, int]]:
    names = list(table["layers"])
    return [dict(zip(names, widths, strict=True)) for widths in product(WIDTHS, repeat=len(names))]


def cost(table: dict[str, Any], widths: dict[str, int]) -> tuple[float, int]:
    entries = [table["layers"][name]["weights"][str(width)] for name, width in widths.items()]
    return sum(entry["damage"] for entry in entries), 1000 + sum(entry["bytes"] for entry in entries)


def measured(point: dict[str, Any], psnr_db: float) -> dict[str, Any]:
    return {"allocation": point["allocation"], "psnr_db": psnr_db, "bytes": point["predicted"]["bytes"]}


def test_a_budget_gets_the_best_of_all_allocations(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table()
    sizes = sorted(cost(table, each)[1] for each in every_allocation(table))
    budget = sizes[len(sizes) // 3]
    found = propose([("base", table)], budgets=[{"bytes": budget}])
    best = min(damage for damage, size in (cost(table, each) for each in every_allocation(table)) if size <= budget)
    point = found["points"][0]
    assert (point["origin"], point["budget"]) == ("budget", 0)
    assert point["predicted"]["damage"] == pytest.approx(best, rel=1e-5)
    assert point["predicted"]["bytes"] <= budget
    allocation = Allocation.model_validate_json(json.dumps(point["allocation"]))
    again = price(table, allocation, Costs())
    assert (again.damage, again.uses["bytes"]) == pytest.approx((best, point["predicted"]["bytes"]))


def test_the_front_rises_and_is_proposed_from_end_to_end(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table()
    found = propose([("base", table)], uniform=True)
    sizes, damages, psnrs = zip(*found["front"], strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(damages) == sorted(damages, reverse=True)
    assert psnrs[0] == pytest.approx(10 * math.log10(4 / damages[0]), abs=1e-3)
    smallest, largest = (cost(table, dict.fromkeys(table["layers"], width))[1] for width in (2, 8))
    assert (sizes[0], sizes[-1]) == (smallest, largest)
    origins = [point["origin"] for point in found["points"]]
    # The smallest and the largest of the front are uniform themselves, and nothing is proposed twice.
    assert origins == ["uniform-2", "uniform-3", "uniform-4", "uniform-8", "front", "front"]


def test_several_limits_hold_at_once(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table()
    weights = sum(entry["parameters"] for entry in table["layers"].values())
    free = propose([("base", table)], budgets=[{"weight_bits_mean": 4.2}])["points"][0]["predicted"]
    bops = 0.9 * free["bops"]
    both = propose([("base", table)], budgets=[{"weight_bits_mean": 4.2, "bops": bops}])["points"][0]["predicted"]
    assert both["bops"] <= bops
    assert both["bits_mean"] <= free["bits_mean"] <= 4.2
    tried = []
    for each in every_allocation(table):
        bits = sum(table["layers"][name]["parameters"] * width for name, width in each.items()) / weights
        macs = sum(table["layers"][name]["macs"] * width * 8 for name, width in each.items())
        if bits <= 4.2 and macs <= bops:
            tried.append(cost(table, each)[0])
    assert both["damage"] == pytest.approx(min(tried), rel=1e-5)


def test_budgets_that_nothing_meets_say_what_can_be_met(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table()
    smallest, largest = (cost(table, dict.fromkeys(table["layers"], width))[1] for width in (2, 8))
    few_bops = 1.01 * sum(entry["macs"] * 2 * 8 for entry in table["layers"].values())
    budgets = [
        {"bytes": smallest - 1},
        {"bytes": smallest},
        {"bytes": largest + 1},
        {"weight_bits_mean": 1.9},
        {"latency_ms": 1.0},
    ]
    latency = {name: {f"{width}/8": float(width) for width in WIDTHS} for name in table["layers"]}
    found = propose([("base", table)], budgets=budgets, latency=latency)
    assert found["points"] == found["front"] == []
    assert [(each["budget"], each["limit"], each["got"]) for each in found["infeasible"]] == [
        (0, "bytes", smallest - 1),
        (2, "bytes", largest + 1),
        (3, "weight_bits_mean", 1.9),
        (4, "latency_ms", 1.0),
    ]
    reach = [(each["smallest"], each["largest"]) for each in found["infeasible"]]
    assert reach == [(smallest, largest), (smallest, largest), (2, 8), (10, 40)]
    assert propose([("base", table)], budgets=[{"bytes": smallest, "bops": few_bops}])["infeasible"] == []


def test_layers_of_a_unit_share_their_bits(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table()
    found = propose([("base", table)], budgets=[{"bytes": 1000 + 60_000}], per_unit=True)
    for point in found["points"]:
        layers = point["allocation"]["layers"]
        for unit in set(table["unit"].values()):
            assert len({layers[name]["weight_bits"] for name, own in table["unit"].items() if own == unit}) == 1


def test_inputs_have_bits_at_each_range_of_steps(propose: Callable[..., dict[str, Any]]) -> None:
    """Where bit operations are limited, inputs pay too; the layer that damages least at a range pays there."""
    table = toy_table(3, ranges=2)
    size = cost(table, dict.fromkeys(table["layers"], 4))[1]
    free = propose([("base", table)], budgets=[{"bytes": size}])["points"][0]
    assert {choice["activation_bits"] for choice in free["allocation"]["layers"].values()} == {8}
    limit = 0.8 * free["predicted"]["bops"]
    least = min(table["layers"], key=lambda name: table["layers"][name]["activations"]["4"][0])
    for key in ("4", "6"):
        table["layers"][least]["activations"][key][0] = 0.0
    bound = propose([("base", table)], budgets=[{"bytes": size, "bops": limit}])["points"][0]
    assert bound["predicted"]["bops"] <= limit
    assert bound["allocation"]["layers"][least]["activation_bits"][0] == 4


def test_full_precision_and_shares_of_channels_are_choices(propose: Callable[..., dict[str, Any]]) -> None:
    table = toy_table(shares=(0.5,))
    points = propose([("base", table)], keep=True, candidates=40)["points"]
    choices = [choice for point in points for choice in point["allocation"]["layers"].values()]
    assert any(choice.get("keep") for choice in choices)
    assert any(choice.get("promoted") == 0.5 for choice in choices)
    assert points[-1]["predicted"]["damage"] == 0


def test_of_variants_the_better_is_proposed(propose: Callable[..., dict[str, Any]]) -> None:
    good, bad = toy_table(), toy_table()
    for entry in bad["layers"].values():
        for cost_ in entry["weights"].values():
            cost_["damage"] *= 2
    found = propose([("bad", bad), ("base", good)], budgets=[{"bytes": 60_000}])
    assert [point["allocation"]["variant"] for point in found["points"][:2]] == ["base", "bad"]
    assert {point["allocation"].get("variant", "base") for point in found["points"][2:]} == {"base"}


def test_later_proposals_learn_from_what_was_measured(propose: Callable[..., dict[str, Any]]) -> None:
    """2 bits do 20 times what the table says: that is learned, and the budget's choice has fewer of them."""
    table = toy_table(12)
    truth = json.loads(json.dumps(table))
    for entry in truth["layers"].values():
        entry["weights"]["2"]["damage"] *= 20
    budget = {"bytes": cost(table, dict.fromkeys(table["layers"], 3))[1]}

    def psnr(point: dict[str, Any]) -> float:
        allocation = Allocation.model_validate_json(json.dumps(point["allocation"]))
        return 10 * math.log10(4 / price(truth, allocation, Costs()).damage)

    first = propose([("base", table)], budgets=[budget], uniform=True)
    points = [measured(point, psnr(point)) for point in first["points"]]
    later = propose([("base", table)], budgets=[budget], measured=points)
    assert later["surrogate"]["n"] == len(points)
    assert later == propose([("base", table)], budgets=[budget], measured=points)
    known = {json.dumps(point["allocation"], sort_keys=True) for point in points}
    assert not known & {json.dumps(point["allocation"], sort_keys=True) for point in later["points"]}
    within = [psnr(point) for point in later["points"] if point["predicted"]["bytes"] <= budget["bytes"]]
    assert max(within) > psnr(first["points"][0]) + 1
    told = [point["predicted"]["psnr_db"] - psnr(point) for point in later["points"]]
    naive = [10 * math.log10(4 / point["predicted"]["damage"]) - psnr(point) for point in later["points"]]
    assert np.square(told).mean() < 0.5 * np.square(naive).mean()


def test_as_many_tables_as_variants_are_wanted(propose: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(InvalidInputError, match="variants: got 2, wanted one for each of 1 tables"):
        propose([("base", toy_table())], variants=["base", "other"])
