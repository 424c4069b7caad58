"""What is planned where a job chooses weight bits by itself."""

from __future__ import annotations

import pytest

from orchestrator.errors import RecipeError
from orchestrator.planning.sensitivity import SensitivityOptions, plan_sensitivity
from quant_spec.allocation import Allocation, LayerChoice, apply_allocation
from quant_spec.errors import InvalidInputError
from quant_spec.passes.menu import Menu
from quant_spec.passes.table import kinds_of
from quant_spec.recipe import Recipe
from tests.orchestrator.planning_models import by_kind, layers, model, nodes_of, only, recipe

MENU = Menu(weight_bits=(2, 4, 8))
BASE = ("weights.bits=4", "passes.menu={weight_bits: [2, 4, 8]}")
ENDS = '{match: "@first", weights: {bits: 8}}, {match: "@last", weights: {bits: 8}}'


def chosen(*overrides: str) -> Recipe:
    return recipe("base", *BASE, "passes.choose={}", *overrides)


@pytest.mark.parametrize("more", [(), ("passes.temporal={}",), ("passes.scale={}",), ("passes.exceptions={}",)])
def test_what_is_measured_is_what_a_search_over_the_same_base_measures(more: tuple[str, ...]) -> None:
    searched = plan_sensitivity(model(), recipe("base", "weights.bits=4", *more), SensitivityOptions(widths=MENU))
    nodes = nodes_of(chosen("passes.choose={path: 2, rows: 10}", *more))
    assert {node.id for node in searched.nodes} <= {node.id for node in nodes}
    assert only(nodes, "choose").inputs["tables"] == searched.tables


def test_recipes_that_differ_in_the_budget_share_all_but_the_choice() -> None:
    one, other = (nodes_of(chosen(f"passes.choose.weight_bits_mean={mean}")) for mean in (3, 4.5))
    for kind in ("calibrate", "menu", "step_gains", "sensitivity"):
        assert [node.id for node in by_kind(one, kind)] == [node.id for node in by_kind(other, kind)] != []
    assert only(one, "choose").id != only(other, "choose").id
    coarse = nodes_of(chosen("passes.choose={rows: 2, path: 1}"))
    assert {node.id for node in by_kind(coarse, "sensitivity")}.isdisjoint(n.id for n in by_kind(one, "sensitivity"))


@pytest.mark.parametrize("kind", ["reconstruct", "distill", "exceptions", "differences", "pack"])
def test_what_comes_after_reads_the_chosen_states(kind: str) -> None:
    nodes = nodes_of(chosen(*(() if kind == "pack" else (f"passes.{kind}={{}}",))))
    assert not by_kind(nodes, "round") + by_kind(nodes, "mix")
    choice = only(nodes, "choose")
    assert {node.kind for node in nodes if choice.id in node.sources()} >= {kind}
    states = {str(item) for node in by_kind(nodes, "pack") for item in node.inputs["states"]}
    assert len(states) == len(choice.params["units"])


def test_the_task_is_told_the_recipes_own_bits_and_which_are_fixed() -> None:
    exact = "{match: blocks.0.conv1, weights: {bits: 8}}, {match: blocks.1.conv1, keep: true}"
    choice = only(nodes_of(chosen(layers(f"[{ENDS}, {exact}]"))), "choose")
    told = {name: layer for unit in choice.params["units"] for name, layer in unit["layers"].items()}
    assert told["conv_in"]["weights"] == told["blocks.0.conv1"]["weights"] == 8
    assert told["blocks.0.conv2"]["weights"] == 4
    assert "blocks.1.conv1" not in told
    assert choice.params["fixed"] == ["blocks.0.conv1"]
    assert sum(map(len, choice.params["widths"])) == len(choice.inputs["weights"])


def test_activations_are_chosen_by_exact_names_as_from_any_menu() -> None:
    menu = "passes.menu={weight_bits: [2, 4, 8], activation_bits: [6]}"
    entry = layers("[{match: blocks.0.conv1, activations: {bits: 6}}]")
    choice = only(nodes_of(chosen(menu, entry)), "choose")
    told = {name: layer for unit in choice.params["units"] for name, layer in unit["layers"].items()}
    assert told["blocks.0.conv1"]["activations"] == [6]
    assert "fixed" not in choice.params
    assert any("activations:6:blocks.0" in str(item) for item in choice.inputs["activations"])


def test_weights_alone_can_be_chosen() -> None:
    choice = only(nodes_of(chosen("activations.bits=null")), "choose")
    assert "activations" not in choice.inputs


def test_a_search_leaves_the_pass_out_and_a_release_depends_on_its_kinds() -> None:
    with_choice = chosen()
    allocation = Allocation(layers={"blocks.0.conv1": LayerChoice(weight_bits=2)})
    assert apply_allocation(with_choice, allocation, MENU).passes.choose is None
    kinds = {"step_gains", "sensitivity", "choose"}
    assert kinds <= set(kinds_of(with_choice.model_dump(mode="json")))
    assert not kinds & set(kinds_of(recipe("base", *BASE).model_dump(mode="json")))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["passes.menu=null"], r"passes\.choose: got it with passes\.menu null, wanted a menu of two widths"),
        (["passes.menu.weight_bits=[4]"], r"got it with passes\.menu weight_bits \[4\], wanted a menu of two"),
        (
            [layers("[{match: conv_in, weights: {bits: 4, promoted: 0.5}}]")],
            r"layers\.0\.weights\.promoted: got 0\.5 beside passes\.choose, wanted null",
        ),
        (["budget.weight_bits_mean=5"], r"budget\.weight_bits_mean: got 5 beside passes\.choose, wanted null"),
        (["evaluation.first_seed=5000002"], r"evaluation\.first_seed: got seeds .* wanted none of passes\.choose's"),
        (["passes.allocate={}"], r"passes\.menu: got it beside passes\.allocate"),
        (
            ["passes.differences={}", "passes.menu.activation_bits=[6]"],
            r"passes\.differences: got it beside passes\.menu\.activation_bits",
        ),
        (["passes.choose.bytes=lots"], r"passes\.choose\.bytes: got 'lots', wanted"),
        (["passes.choose.weight_bits_mean=0"], r"passes\.choose\.weight_bits_mean: got 0, wanted"),
    ],
)
def test_what_it_cannot_stand_beside_is_refused_when_the_recipe_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chosen(*overrides)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("weight_bits_mean=1.9", r"passes\.choose\.weight_bits_mean: got 1\.9, wanted 2 to 8, which is what"),
        ("bytes=1kB", r"passes\.choose\.bytes: got 1\.0 kB, wanted more than .* which codes alone take"),
    ],
)
def test_a_budget_that_codes_alone_exceed_is_refused_before_anything_runs(budget: str, message: str) -> None:
    with pytest.raises((RecipeError, InvalidInputError), match=message):
        nodes_of(chosen(f"passes.choose.{budget}"))


def test_nothing_to_choose_for_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"passes\.choose: got no layer on the menu"):
        nodes_of(chosen("passes.temporal={}", layers('[{match: "*", keep: true}, {match: "time*", keep: false}]')))
