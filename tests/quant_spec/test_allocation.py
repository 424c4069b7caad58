from __future__ import annotations

import pytest
from pydantic import ValidationError

from quant_spec.allocation import Allocation, LayerChoice, apply_allocation, escaped, without_choices
from quant_spec.enums import RangeMethod
from quant_spec.errors import InvalidInputError
from quant_spec.keys import canonical_json
from quant_spec.passes.menu import Menu
from quant_spec.recipe import Recipe
from quant_spec.recipe_formats import LayerException, WeightsException, exact_name

CHOICES = {
    "down[0].conv": LayerChoice(weight_bits=3, promoted=0.5),
    "mid.attn": LayerChoice(activation_bits=(8, 6)),
    "out": LayerChoice(keep=True),
    "nothing": LayerChoice(),
}


@pytest.mark.parametrize("name", ["a.b", "down[0].conv", "what?", "a*b", "[[x]]"])
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    assert exact_name(escaped(name)) == name


@pytest.mark.parametrize("pattern", ["@first", "a*", "a?b", "a[bc]"])
def test_patterns_are_no_exact_names(pattern: str) -> None:
    assert exact_name(pattern) is None


def test_an_allocation_is_exceptions_and_a_menu() -> None:
    recipe = Recipe(layers=(LayerException(match="*.conv"),))
    made = apply_allocation(recipe, Allocation(layers=CHOICES), Menu(activation_bits=(6, 8)))
    assert [entry.model_dump(mode="json") | {"required": True} for entry in made.layers[1:]] == [
        {"match": "down[[]0].conv", "weights": {"bits": 3, "promoted": 0.5}, "activations": {}, **FLAGS},
        {"match": "mid.attn", "weights": {}, "activations": {"range_bits": [8, 6]}, **FLAGS},
        {"match": "out", "weights": {}, "activations": {}, **FLAGS | {"keep": True}},
    ]
    assert made.passes.menu == Menu(activation_bits=(6, 8))
    assert without_choices(made).layers == recipe.layers


FLAGS = {"keep": False, "required": True}


def test_what_an_exact_name_says_beside_bits_belongs_to_the_base() -> None:
    entry = LayerException(match="a", weights=WeightsException(bits=3, range=RangeMethod.MSE))
    left = without_choices(Recipe(layers=(entry,))).layers
    assert [e.weights.model_dump(mode="json") for e in left] == [{"range": "mse"}]


def test_the_digest_is_that_of_what_is_chosen() -> None:
    allocation = Allocation(layers=CHOICES)
    chosen = {name: choice for name, choice in CHOICES.items() if name != "nothing"}
    assert allocation.digest == Allocation(layers=dict(reversed(chosen.items()))).digest
    assert allocation.digest != Allocation(variant="other", layers=CHOICES).digest
    assert Allocation.model_validate_json(canonical_json(allocation.to_json())) == allocation


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"keep": True, "weight_bits": 4}, "keep: got true beside bits"),
        ({"promoted": 0.5}, "promoted: got 0.5 without weight_bits"),
        ({"weight_bits": 7}, "weight_bits"),
    ],
)
def test_choices_that_contradict_themselves_are_refused(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LayerChoice(**choice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exception", "message"),
    [
        ({"match": "a*", "weights": {"promoted": 0.5}}, "layers.0.weights.promoted: got match 'a*', passes.menu set"),
        ({"match": "a*", "activations": {"range_bits": [4, 8]}}, "layers.0.activations.range_bits: got match 'a*'"),
        (
            {"match": "a", "activations": {"range_bits": [4, 8], "mode": "static"}},
            "layers.0.activations.range_bits: got mode static, wanted per_step",
        ),
    ],
)
def test_choices_need_an_exact_name(exception: dict[str, object], message: str) -> None:
    layers = canonical_json([exception])
    for menu in ("{}", "null"):
        text = f'{{"layers": {layers}, "activations": {{"bits": 8}}, "passes": {{"menu": {menu}}}}}'
        with pytest.raises(ValidationError) as caught:
            Recipe.model_validate_json(text)
        assert (message if menu == "{}" else "layers.0.") in str(caught.value)


def test_a_menu_beside_another_choice_of_bits_is_refused() -> None:
    recipe = Recipe.model_validate_json('{"weights": {"bits": 4}, "passes": {"allocate": {}}}')
    with pytest.raises(InvalidInputError, match=r"passes\.menu: got it beside passes\.allocate"):
        apply_allocation(recipe, Allocation(), Menu())
