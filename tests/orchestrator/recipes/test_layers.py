"""How recipes come about: resolved and digested, layer upon layer, and `--set`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipes.files import merge, shipped_names
from orchestrator.recipes.load import load_recipe, recipe_digest, recipe_from_json, resolve
from orchestrator.recipes.yaml_text import parse_yaml
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.recipe import HOW_IT_RUNS, Recipe
from tests.orchestrator.recipes.recipe_files import FILES, loaded, write

DIGESTS = Path(__file__).parent / "recorded" / "digests.json"

# --- resolving


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_resolve_is_canonical_and_complete(path: Path):
    recipe = load_recipe(path).recipe
    resolved = resolve(recipe)
    values = json.loads(resolved.json)
    assert resolved.json == json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    unsaid = {"prompts", *(() if recipe.components else ("components",))}
    assert set(values) == set(Recipe.model_fields) - {*HOW_IT_RUNS, *unsaid}
    again = recipe_from_json(values)
    assert again == recipe
    assert resolve(again) == resolved


def test_resolve_digest_leaves_out_name_and_description_only(tmp_path: Path):
    plain = resolve(loaded("extends: base", tmp_path))
    named = resolve(loaded("{extends: base, name: other, description: words}", tmp_path))
    assert named.digest == plain.digest == resolve(load_recipe("base").recipe).digest
    assert named.json != plain.json
    for override in ("seed=1", "weights.bits=4", "evaluation.grid=4", "memory.budget_gib=1", "skip_split=false"):
        assert resolve(loaded("extends: base", tmp_path, override)).digest != plain.digest


def test_resolve_does_not_depend_on_spelling(tmp_path: Path):
    one = loaded("passes: {reconstruct: {lr: 1e-3, beta: [20, 2]}}\nsampler: {guidance_scale: 1}", tmp_path)
    two = loaded("sampler: {guidance_scale: 1.0}\npasses: {reconstruct: {beta: [20.0, 2.0], lr: 0.001}}", tmp_path)
    assert resolve(one).digest == resolve(two).digest


def test_resolve_keeps_null_in_exceptions_apart_from_unstated(tmp_path: Path):
    recipe = loaded("extends: base\nlayers: [{match: a, activations: {bits: null}}, {match: b}]", tmp_path)
    values = json.loads(resolve(recipe).json)
    assert [entry["activations"] for entry in values["layers"]] == [{"bits": None}, {}]


def test_resolve_shipped_recipes_have_their_recorded_digests():
    """A digest names a release's recipe: it changes only where a recipe's text or a default does.

    A change that is meant is recorded by `python -m tests.orchestrator.recipes.test_layers`.
    """
    assert shipped_digests() == json.loads(DIGESTS.read_text())


def shipped_digests() -> dict[str, str]:
    """Return the digest of each shipped recipe."""
    return {name: recipe_digest(json.loads(resolve(load_recipe(name).recipe).json)) for name in shipped_names()}


# --- layering


def test_merge_deep_replaces_lists_and_removes_null():
    lower = {"a": {"x": 1, "y": {"z": 2}}, "l": [1, 2], "s": 1, "gone": {"k": 1}}
    upper = {"a": {"y": {"z": 3, "w": None}}, "l": [3], "s": {"now": {"a": None}}, "gone": None}
    assert merge(lower, upper) == {"a": {"x": 1, "y": {"z": 3}}, "l": [3], "s": {"now": {}}}
    assert lower["a"] == {"x": 1, "y": {"z": 2}}


def test_extends_follows_files_relative_to_the_file(tmp_path: Path):
    (tmp_path / "team").mkdir()
    write(
        tmp_path / "team",
        "ours.yaml",
        "extends: fast-w4a8\nweights: {bits: 3}\nseed: 5\ndescription: ours\nname: ours-name",
    )
    write(tmp_path / "team", "mine.yaml", "extends: ours.yaml\nweights: {range: minmax}")
    recipe = load_recipe("team/mine.yaml", folder=tmp_path).recipe
    assert (recipe.weights.bits, recipe.weights.range, recipe.seed) == (3, "minmax", 5)
    assert recipe.passes.round.method == "closed_form"
    assert (recipe.name, recipe.description) == ("mine", "")


def test_extends_null_takes_inherited_away(tmp_path: Path):
    recipe = loaded("extends: qdiffusion-w4a8\npasses: {reconstruct: null}\nactivations: {bits: null}", tmp_path)
    assert recipe.passes.reconstruct is None
    assert recipe.activations.bits is None
    assert recipe.weights.bits == 4


def test_extends_list_replaces_inherited(tmp_path: Path):
    recipe = loaded("extends: base\nlayers: [{match: 'mid*', keep: true}]", tmp_path)
    assert [entry.match for entry in recipe.layers] == ["mid*"]


def test_shipped_name_wins_over_a_file_and_a_file_without_suffix_loads(tmp_path: Path):
    write(tmp_path, "fast-w4a8", "seed: 77")
    write(tmp_path, "plain", "seed: 78")
    assert load_recipe("fast-w4a8", folder=tmp_path).recipe.seed == 0
    assert load_recipe("./fast-w4a8", folder=tmp_path).recipe.seed == 77
    assert load_recipe("plain", folder=tmp_path).recipe.seed == 78


def test_empty_file_is_all_defaults(tmp_path: Path):
    assert loaded("", tmp_path) == Recipe(name="mine")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_extends_circle_is_refused(depth: int, tmp_path: Path):
    for place in range(depth):
        write(tmp_path, f"r{place}.yaml", f"extends: r{(place + 1) % depth}.yaml")
    with pytest.raises(RecipeError, match=r"extends: got a circle \(r0.yaml -> .*r0.yaml\), wanted"):
        load_recipe(tmp_path / "r0.yaml")


def test_yaml_reads_numbers_as_people_write_them(tmp_path: Path):
    recipe = loaded(
        "passes: {reconstruct: {lr: 1e-3, learn_activation_scales: true, activation_lr: 5E-5, rounding_weight: .5}}",
        tmp_path,
    )
    reconstruct = recipe.passes.reconstruct
    assert reconstruct is not None
    assert (reconstruct.lr, reconstruct.activation_lr, reconstruct.rounding_weight) == (1e-3, 5e-5, 0.5)
    assert parse_yaml("[1, -2, 0x10, 1.5, 1e3, 2026-01-01, true, null, 1.2.3]", "") == [
        *(1, -2, 16, 1.5, 1000.0),
        *("2026-01-01", True, None, "1.2.3"),
    ]


# --- overrides


def test_set_goes_on_top_in_order():
    recipe = load_recipe("fast-w4a8", ["weights.bits=3", "weights.bits=6", "description=a b", "passes.reconstruct={}"])
    assert recipe.recipe.weights.bits == 6
    assert recipe.recipe.description == "a b"
    assert recipe.recipe.passes.reconstruct == Reconstruct()


def test_set_merges_mappings_makes_sections_and_removes():
    values = [
        "weights={bits: 4}",
        "passes.reconstruct.iterations=7",
        "activations.bits=null",
        "sampler.options.a.b=[1]",
    ]
    recipe = load_recipe("qdiffusion-w8a8", values).recipe
    assert (recipe.weights.bits, recipe.weights.range) == (4, "mse")
    assert recipe.passes.reconstruct is not None
    assert recipe.passes.reconstruct.iterations == 7
    assert recipe.activations.bits is None
    assert recipe.sampler.options == {"a": {"b": [1]}}


def test_set_steps_into_lists():
    recipe = load_recipe("base", ["layers.0.weights.bits=6", "layers.1.activations.bits=null"]).recipe
    assert recipe.layers[0].weights.bits == 6
    assert recipe.layers[0].activations.bits == 8
    assert recipe.layers[1].activations.model_fields_set == {"bits"}
    assert recipe.layers[1].activations.bits is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.bits", "--set: got 'weights.bits', wanted key=value, such as weights.bits=4"),
        ("=4", "--set: got '=4', wanted key=value, such as weights.bits=4"),
        ("a..b=4", "--set: got 'a..b=4', wanted key=value, such as weights.bits=4"),
        ("layers.2.keep=true", "--set layers.2.keep: got '2', wanted a position below 2"),
        ("layers.x.keep=true", "--set layers.x.keep: got 'x', wanted a position below 2"),
        ("seed.x=1", "--set seed.x: got 0 before 'x', wanted a mapping"),
        ("weights.bits=[", "--set weights.bits line 1: "),
    ],
)
def test_set_says_what_is_wrong(override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe("base", ["seed=0", override])
    assert str(caught.value).startswith(message)


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(shipped_digests(), indent=1, sort_keys=True) + "\n")
