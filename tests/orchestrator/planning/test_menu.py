from __future__ import annotations

import pytest

from orchestrator.errors import RecipeError
from orchestrator.graph import TaskNode
from orchestrator.planning.formats import _Rules, choose_formats, weight_bits_mean
from orchestrator.planning.model import ModelInfo
from quant_spec.allocation import Allocation, LayerChoice, apply_allocation
from quant_spec.passes.menu import Menu
from quant_spec.recipe import Recipe
from tests.orchestrator.planning_models import by_kind, inspection, layers, model, nodes_of, recipe

WIDTHS = Menu(weight_bits=(2, 4, 8), activation_bits=(6,))
BASE = ("weights.bits=4", layers('[{match: "@first", weights: {bits: 8}}]'))


def base(*overrides: str) -> Recipe:
    return recipe("base", *BASE, *overrides)


def mixed(choices: dict[str, LayerChoice], *overrides: str) -> list[TaskNode]:
    return nodes_of(apply_allocation(base(*overrides), Allocation(layers=choices), WIDTHS))


def taken(nodes: list[TaskNode]) -> dict[str, dict[str, object]]:
    """Return what mixes are told of each layer and attention."""
    units = [unit for node in by_kind(nodes, "mix") for unit in node.params["units"]]
    return {name: told for unit in units for part in ("layers", "attentions") for name, told in unit[part].items()}


def test_a_menu_stands_in_for_round_and_candidates_share_it() -> None:
    one = mixed({"blocks.0.conv1": LayerChoice(weight_bits=2)})
    other = mixed({"conv_in": LayerChoice(weight_bits=2), "mid.attn": LayerChoice(activation_bits=6)})
    assert not by_kind(one, "round")
    assert [node.id for node in by_kind(one, "menu")] == [node.id for node in by_kind(other, "menu")]
    assert [node.id for node in by_kind(one, "mix")] != [node.id for node in by_kind(other, "mix")]
    states = {name for node in by_kind(one, "pack") for name in map(str, node.inputs["states"])}
    assert all("state:" in state for state in states)


def test_mixes_are_told_what_names_choose_and_else_the_base() -> None:
    found = taken(
        mixed(
            {
                "blocks.0.conv1": LayerChoice(weight_bits=2, promoted=0.5, activation_bits=(8, 6)),
                "blocks.1.conv1": LayerChoice(keep=True),
                "mid.attn": LayerChoice(activation_bits=6),
            }
        )
    )
    assert found["blocks.0.conv1"] == {"weights": 2, "promoted": 0.5, "promoted_bits": 4, "activations": [8, 6]}
    assert found["blocks.0.conv2"] == {"weights": 4, "activations": [8]}
    assert found["conv_in"] == {"weights": 8, "activations": [8]}
    assert found["mid.attn"] == {"activations": [6], "softmax": 16}
    assert found["mid.attn.to_q"] == {"weights": 4, "activations": [8]}
    assert "blocks.1.conv1" not in found


def test_scales_are_fitted_once_at_the_bits_of_the_base() -> None:
    choices = {"blocks.0.conv1": LayerChoice(weight_bits=2, activation_bits=6)}
    scaled = [by_kind(nodes, "scale") for nodes in (mixed(choices, "passes.scale={}"), mixed({}, "passes.scale={}"))]
    plain = by_kind(nodes_of(base("passes.scale={}")), "scale")
    assert [node.id for node in scaled[0]] == [node.id for node in scaled[1]] == [node.id for node in plain]


@pytest.mark.parametrize("pass_", ["passes.reconstruct={}", "passes.distill={}", "passes.correct={}"])
def test_what_comes_after_reads_mixed_states(pass_: str) -> None:
    nodes = mixed({"blocks.0.conv1": LayerChoice(weight_bits=2)}, pass_)
    kind = pass_.removeprefix("passes.").removesuffix("={}")
    mixes = {node.id for node in by_kind(nodes, "mix")}
    readers = {node.kind for node in nodes if node.sources() & mixes}
    assert (kind if kind != "correct" else "pack") in readers
    assert by_kind(nodes, kind)


def test_the_temporal_block_has_the_bits_that_names_give_and_no_mix() -> None:
    choices = {"time_embedding.linear_1": LayerChoice(weight_bits=2), "conv_out": LayerChoice(weight_bits=2)}
    nodes = mixed(choices, "passes.temporal={}")
    (block,) = by_kind(nodes, "temporal")
    assert block.params["layers"]["time_embedding.linear_1"]["weight"]["bits"] == 2
    assert not any("time_embedding" in name for name in taken(nodes))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"blocks.0.conv1": LayerChoice(weight_bits=3)}, "weights.bits: got 3 bits, wanted one of the menu's 2, 4, 8"),
        ({"blocks.0.conv1": LayerChoice(activation_bits=4)}, "blocks.0.conv1: activations: got 4 bits"),
        ({"blocks.0.conv1": LayerChoice(activation_bits=(8, 4))}, "blocks.0.conv1: activations: got 4 bits"),
        ({"mid.attn": LayerChoice(activation_bits=5)}, "mid.attn: activations: got 5 bits"),
        ({"blocks.0.conv1": LayerChoice(weight_bits=8, promoted=0.5)}, "wanted wider ones in passes.menu.weight_bits"),
    ],
)
def test_what_is_not_on_the_menu_is_refused(choices: dict[str, LayerChoice], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        mixed(choices)


def test_promoted_channels_need_scales_of_their_own() -> None:
    grouped = "weights={granularity: per_group, group_size: 16}"
    with pytest.raises(RecipeError, match=r"weights\.promoted: got weights per_group, wanted per_channel"):
        mixed({"blocks.0.conv1": LayerChoice(weight_bits=2, promoted=0.5)}, grouped)


def test_a_budget_counts_promoted_channels() -> None:
    choices = {"blocks.0.conv1": LayerChoice(weight_bits=2, promoted=0.5)}
    row = model()
    info = ModelInfo.read(row.digest, row.inspection)
    units = choose_formats(info, apply_allocation(base(), Allocation(layers=choices), WIDTHS))
    share = next(layer.weights for layer in info.layers if layer.name == "blocks.0.conv1")
    total = sum(layer.weights for layer in info.layers)
    promoted, plain = (weight_bits_mean(info, units, 0.0, widths) for widths in (WIDTHS.weight_bits, ()))
    assert promoted - plain == pytest.approx(0.5 * 2 * share / total)
    allocation = Allocation(layers=choices)
    with pytest.raises(RecipeError, match=r"budget\.weight_bits_mean"):
        nodes_of(apply_allocation(base(f"budget.weight_bits_mean={plain + 1e-3}"), allocation, WIDTHS))


def test_thousands_of_exact_names_are_looked_up() -> None:
    """A regex for each of n exceptions, tried on n layers, would be n squared matches."""
    row = model(inspection(blocks=1000))
    info = ModelInfo.read(row.digest, row.inspection)
    choices = {layer.name: LayerChoice(weight_bits=2) for layer in info.layers}
    chosen = apply_allocation(base(), Allocation(layers=choices), WIDTHS)
    assert _Rules(info, chosen).patterns == []
    units = choose_formats(info, chosen)
    assert {layer.weight.bits for unit in units for layer in unit.planned.layers.values()} == {2}
