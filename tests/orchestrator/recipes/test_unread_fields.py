"""Fields that nothing reads are refused, and tasks are told only what matters to them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipes.load import load_recipe, recipe_from_json, resolve
from quant_spec.enums import RoundingMethod, UnitInputs
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.passes.round import Round
from tests.orchestrator.recipes.recipe_files import write

# --- fields that nothing reads


def test_fields_that_nothing_reads_are_refused_where_they_are_set_and_may_be_inherited(tmp_path: Path):
    said = "passes.round.damping: got 0.5, which matters only with method closed_form, wanted it left out"
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe("minmax-w8a8", ["passes.round.damping=0.5"])
    own = write(tmp_path, "own.yaml", "extends: minmax-w8a8\npasses: {round: {damping: 0.5}}\n")
    with pytest.raises(RecipeError, match=re.escape(said)):
        load_recipe(own)
    # Its own statement once more, or its default, changes nothing; nor does what a recipe says that is changed here.
    assert load_recipe("minmax-w8a8", ["passes.round.damping=0.03"]).recipe == load_recipe("minmax-w8a8").recipe
    assert load_recipe("qdiffusion-w4a8").recipe.passes.round.positions != Round().positions
    assert load_recipe("qdiffusion-w4a8", ["passes.round.method=nearest"]).recipe.passes.round.method == "nearest"
    child = write(tmp_path, "child.yaml", "extends: qdiffusion-w4a8\npasses: {round: {method: nearest}}\n")
    assert load_recipe(child).recipe.passes.round.method == "nearest"


def test_fields_that_matter_only_by_a_rule_of_their_record_are_refused_too():
    with pytest.raises(RecipeError, match=r"passes\.low_rank\.max_rank: got 7, which nothing reads beside the others"):
        load_recipe("svdquant-w4a8", ["passes.low_rank.rank=8", "passes.low_rank.max_rank=7"])


@pytest.mark.parametrize(
    ("recipe", "override", "needed"),
    [
        ("minmax-w8a8", "weights.percentile=0.9", "weights.range percentile"),
        ("minmax-w8a8", "weights.group_scale=integer", "weights.granularity per_group"),
        ("fp8-w8a8", "weights.symmetric=true", "weights.type int"),
        ("minmax-w8a8", "activations.percentile=0.9", "activations.range percentile"),
        ("svdquant-w4a4", "activations.range=mse", "activations.mode static or per_step"),
        ("svdquant-w4a4", "activations.unknown_timestep=nearest", "activations.mode per_step or passes.temporal"),
        ("fp8-w8a8", "activations.symmetric=true", "activations.type int"),
        ("weights-w4", "activations.symmetric=true", "activations.bits"),
        ("weights-w4", "attention.bits=4", "activations.bits"),
        ("weights-w4", "attention.mode=static", "activations.bits"),
        ("weights-w4", "layers=[{match: '*', activations: {mode: static}}]", "activations.bits"),
        ("minmax-w8a8", "layers=[{match: '*', weights: {percentile: 0.9}}]", "weights.range percentile"),
    ],
)
def test_fields_of_formats_that_nothing_reads_are_refused(recipe: str, override: str, needed: str):
    with pytest.raises(RecipeError, match=rf"got .*, which matters only with {needed}, wanted it left out"):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["weights.percentile=0.9", "layers=[{match: '*', weights: {range: percentile}}]"],
        ["weights.range=percentile", "layers=[{match: '*', weights: {percentile: 0.9}}]"],
        ["weights.group_scale=integer", "layers=[{match: '*', weights: {granularity: per_group, group_size: 32}}]"],
        ["activations.mode=static", "layers=[{match: '*', activations: {mode: per_step}}]"],
        ["activations.mode=dynamic_token", "activations.range=mse", "attention.mode=static"],
        ["activations.mode=static", "activations.unknown_timestep=nearest", "attention.mode=per_step"],
    ],
)
def test_a_field_of_a_format_may_be_read_in_some_layers_alone(overrides: list[str]):
    assert load_recipe("minmax-w8a8", overrides).recipe


# --- what passes tell their tasks


def test_round_leaves_out_what_does_not_matter():
    nearest = Round(method=RoundingMethod.NEAREST, samples=3, positions=9)
    assert nearest.to_json() == Round().to_json() == {"method": "nearest"}
    fitted = Round(method=RoundingMethod.CLOSED_FORM, positions=9).to_json()
    assert fitted["positions"] == 9
    assert set(fitted) == set(Round.model_fields) - {"correct_bias", "inputs"}
    assert Round(method=RoundingMethod.CLOSED_FORM, correct_bias=True).to_json()["correct_bias"]
    assert Round(method=RoundingMethod.CLOSED_FORM, inputs=UnitInputs.QUANTIZED).to_json()["inputs"] == "quantized"


def test_reconstruct_leaves_out_what_does_not_matter():
    assert Reconstruct(activation_lr=1.0).to_json() == Reconstruct().to_json()
    learned = Reconstruct(learn_activation_scales=True, activation_lr=1.0).to_json()
    assert set(learned) == set(Reconstruct.model_fields)
    assert learned["beta"] == [4.0, 2.0]


def test_what_says_how_tasks_run_is_kept_and_changes_no_digest() -> None:
    plain = resolve(load_recipe("fast-w4a8").recipe)
    recipe = load_recipe("fast-w4a8", ["resources.gpu_type=H100", "deterministic=true"]).recipe
    resolved = resolve(recipe)
    assert resolved.digest == plain.digest
    assert recipe_from_json(json.loads(resolved.json)) == recipe
    assert resolve(recipe.without_how_it_runs()) == plain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resources.device=tpu", "resources.device: got 'tpu', wanted"),
        ("resources={device: cpu, gpu_type: H100}", "gpu_type: got H100 with device cpu, wanted null"),
        ("resources.gpu_type=a b", "resources.gpu_type: got"),
        ("resources.task_minutes=0", "resources.task_minutes: got 0"),
    ],
)
def test_bad_resources_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("fast-w4a8", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
