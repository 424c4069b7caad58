"""Recipes: layers, messages, digests, the shipped ones."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.errors import RecipeError
from orchestrator.recipes import reference
from orchestrator.recipes.files import merge, recipe_path, shipped_names
from orchestrator.recipes.json_schema import json_schema
from orchestrator.recipes.load import load_recipe, recipe_digest, recipe_from_json, resolve, shipped_recipes
from orchestrator.recipes.yaml_text import parse_yaml
from quant_spec.enums import RoundingMethod
from quant_spec.errors import InvalidInputError
from quant_spec.passes.reconstruct import Reconstruct
from quant_spec.passes.round import Round
from quant_spec.recipe import HOW_IT_RUNS, Recipe
from quant_spec.recipe_formats import Activations, ActivationsException, Weights, WeightsException
from quant_spec.record import Record

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
FILES = [*(recipe_path(name, ROOT) for name in shipped_names()), *EXAMPLES]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def loaded(text: str, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, "mine.yaml", text), overrides).recipe


# --- shipped and example recipes


def test_shipped_recipes_are_those_that_are_promised():
    promised = {"base", "minmax-w8a8", "qdiffusion-w8a8", "qdiffusion-w4a8", "fast-w4a8", "tfmq-w8a8", "tfmq-w4a8"}
    promised |= {"ptqd-w8a8", "ptqd-w4a8", "ptqd-w4-mixed", "tfmq-ptqd-w4a8"}
    promised |= {"dmq-w8a8", "dmq-w4a8", "dmq-w4a6", "dmq-ptqd-w4a6"}
    promised |= {
        "svdquant-w4a8",
        "svdquant-w4a4",
        "dynamic-w8a8",
        "dynamic-w4a8",
        "fp8-w8a8",
        "weights-w4",
        "weights-w8",
        "gguf-w4",
        "gguf-w8",
    }
    promised |= {"text-w8-svdquant-w4a8", "auto-w4a8"}
    promised |= {f"modiff-{bits}" for bits in ("w4a6", "w4a4", "w4a3", "w2a4")}
    promised |= {f"mpqdm-w{bits}a4{plus}" for bits in (4, 3, 2) for plus in ("", "-plus")}
    assert promised <= set(shipped_names())


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_recipe_keeps_its_promise(name: str):
    recipe = load_recipe(name).recipe
    assert recipe.name == name
    assert recipe.description
    is_modiff = name.startswith("modiff")
    is_tfmq = name.startswith(("tfmq", "dmq", "modiff"))  # DMQ's lie on TFMQ-DM's, MoDiff's on DMQ's
    is_auto = name.startswith("auto")
    chooses = is_auto or is_modiff or (name.startswith("dmq") and "w4" in name)
    ends = None if is_tfmq or is_auto else 8  # whether the image's ends are quantized
    assert [(e.match, e.weights.bits, e.activations.bits, e.keep) for e in recipe.layers[:2]] == [
        ("@first", 8, ends, False),
        ("@last", 8, ends, False),
    ]
    assert (recipe.passes.temporal is not None and recipe.passes.temporal.cache) == is_tfmq
    if name != "base":
        both = {"w4a8": (4, 8), "w4a6": (4, 6), "w8a8": (8, 8), "mixed": (4, 8)}
        both |= {"w4a3": (4, 3)} | {f"w{bits}a4": (bits, 4) for bits in (4, 3, 2)} | {"w4": (4, None), "w8": (8, None)}
        both |= {"w2a4": (4, 4)} if is_modiff else {}  # scales are for 4 bits; the chosen bits' mean is below
        differences = recipe.passes.differences
        inputs = recipe.activations.bits if differences is None else differences.bits
        assert (recipe.weights.bits, inputs) == both[name.removesuffix("-plus").rpartition("-")[2]]
    assert (recipe.activations.step_bits is not None) == name.endswith("mixed")
    assert (recipe.passes.menu is not None, recipe.passes.choose is not None) == (chooses, chooses)
    if recipe.passes.choose is not None:
        assert recipe.passes.choose.weight_bits_mean == (2.25 if name == "modiff-w2a4" else None)
    has_exceptions = name in ("tfmq-w8a8", "dmq-w8a8") or name.startswith("dynamic")
    assert (recipe.passes.exceptions is not None) == has_exceptions
    assert (recipe.activations.mode == "dynamic_token") == (name.startswith(("dynamic", "fp8")) or "svdquant" in name)
    assert (recipe.passes.reconstruct is not None) == name.startswith(("qdiffusion", "ptqd", "tfmq", "dmq"))
    assert (recipe.passes.low_rank is not None) == ("svdquant" in name)
    assert set(recipe.components) == ({"text_encoder*"} if name.startswith("text-w8") else set())
    assert {recipe.weights.type, recipe.activations.type} == {"e4m3" if name.startswith("fp8") else "int"}
    scale = recipe.passes.scale
    assert (scale is not None and (scale.method, scale.shift) == ("learned", "skip")) == name.startswith("dmq")
    assert (recipe.passes.differences is not None and recipe.passes.differences.by_effect) == is_modiff
    assert not is_modiff or (scale is not None and (scale.method, scale.shift) == ("learned", "none"))
    assert (recipe.passes.correct is not None) == ("ptqd" in name)
    is_mpqdm = name.startswith("mpqdm")
    assert (recipe.passes.distill is not None, recipe.passes.allocate is not None) == (is_mpqdm, is_mpqdm)
    if recipe.passes.allocate is not None:
        extra = 0.1 if name.endswith("-plus") else 0.0
        assert (recipe.passes.allocate.method, recipe.passes.allocate.extra) == ("global", extra)
    assert recipe.passes.round.method == "closed_form" or not name.startswith("fast")
    assert (recipe.sampler.scheduler, recipe.sampler.num_inference_steps) == (None, 20)
    assert (recipe.sampler.eta, recipe.evaluation.seeds) == (0.0, 256)


def test_shipped_recipes_returns_all():
    assert list(shipped_recipes()) == shipped_names()


def test_shipped_description_is_not_inherited():
    descriptions = [recipe.description for recipe in shipped_recipes().values()]
    assert len(set(descriptions)) == len(descriptions)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_extends_a_shipped_recipe(path: Path):
    values = yaml.safe_load(path.read_text())
    assert values["extends"] in shipped_names()
    assert load_recipe(path).recipe.name == path.stem


# --- JSON schema


def test_json_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_reference_is_published():
    """Both files are what `make reference` writes."""
    assert (ROOT / reference.SCHEMA_FILE).read_text() == reference.schema_text(), "run: make reference"
    page = (ROOT / reference.FIELDS_FILE).read_text()
    assert page == reference.with_tables(page), "run: make reference"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_json_schema_accepts_recipe_as_written_and_resolved(path: Path):
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(yaml.safe_load(path.read_text()))
    validator.validate(json.loads(resolve(load_recipe(path).recipe).json))


@pytest.mark.parametrize(
    "values",
    [
        {"weights": {"bits": 7}},
        {"wieghts": {}},
        {"layers": [{"keep": True}]},
        {"passes": {"round": {"method": "guess"}}},
        {"passes": {"prune": {}}},
        {"extends": 3},
    ],
)
def test_json_schema_refuses_what_loading_refuses(values: dict[str, Any], tmp_path: Path):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json_schema())
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, "bad.yaml", yaml.safe_dump(values)))


@pytest.mark.parametrize("values", [{"weights": None}, {"weights": {"bits": None}}, {"extends": None}])
def test_json_schema_accepts_null_where_loading_does(values: dict[str, Any], tmp_path: Path):
    jsonschema.validate(values, json_schema())
    assert load_recipe(write(tmp_path, "null.yaml", yaml.safe_dump(values))).recipe.weights.bits == 8


def test_documentation_names_every_shipped_recipe():
    text = (ROOT / reference.FIELDS_FILE).read_text()
    assert set(shipped_names()) <= set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`\n]+)`", text))))


# --- the reference


@pytest.mark.parametrize(("name", "section"), list(reference.sections()), ids=lambda value: str(value))
def test_reference_tells_of_every_field_what_it_may_be_and_means(name: str, section: type[Record]):
    rows = reference.field_table(name, section).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(section.model_fields)
    for row in rows:
        *_, values, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        assert values not in ("", "any"), row
        assert meaning.endswith("."), row


def test_reference_shows_bounds_choices_and_what_base_says():
    tables = {name: reference.field_table(name, section) for name, section in reference.sections()}
    assert "| `bits` | `null` (`base`: `8`) | `2`, `3`, `4`, `5`, `6`, `8` or null |" in tables["activations"]
    assert "| `warmup` | `0.0` | 0 ≤ number < 1 |" in tables["passes.reconstruct"]
    assert "| `beta` | `[4.0, 2.0]` | [0 < number ≤ 10^9, 0 < number ≤ 10^9] |" in tables["passes.reconstruct"]
    assert "| `seed` | `0` | 0 ≤ integer < 2^62 |" in tables[reference.WHOLE]
    assert "| `range` | `minmax` | `minmax`, `mse`, `percentile` |" in tables["weights"]


def test_reference_refuses_a_page_without_a_place_for_each_section():
    page = (ROOT / reference.FIELDS_FILE).read_text()
    with pytest.raises(ValueError, match=r"missing: passes\.scale"):
        reference.with_tables(page.replace("<!-- fields of passes.scale -->", ""))
    stale = page.replace("| `seeds` | `32` |", "| `seeds` | `31` |")
    assert stale != page
    assert reference.with_tables(stale) == page


@pytest.mark.parametrize(
    ("exception", "section", "own", "chosen"),
    [
        (WeightsException, Weights, set(), {"promoted"}),
        (ActivationsException, Activations, {"step_bits", "unknown_timestep"}, {"range_bits"}),
    ],
)
def test_exceptions_take_the_values_of_the_section(
    exception: type[Record], section: type[Record], own: set[str], chosen: set[str]
):
    def values(record: type[Record]) -> dict[str, Any]:
        """Return what each field may be, null aside."""
        found = {}
        for name, field in record.model_json_schema()["properties"].items():
            plain = {key: value for key, value in field.items() if key not in ("default", "description", "title")}
            found[name] = [option for option in plain.get("anyOf", [plain]) if option != {"type": "null"}]
        return found

    stated = {name: value for name, value in values(exception).items() if name not in chosen}
    assert stated == {name: value for name, value in values(section).items() if name not in own}


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

    These were recorded when `base` named a scheduler, no guidance was 1, relations were summed over 256 positions and
    `passes.round` said whose inputs it read and nothing of biases, groups had float scales and twice the size, no
    recipe had exceptions or bits found by measurement, and attention's products the mode of inputs, and
    choices were measured on more; no more has changed.
    """
    recorded = json.loads((Path(__file__).parent / "recorded" / "digests.json").read_text())
    before = ["sampler.scheduler=DDIMScheduler", "sampler.guidance_scale=1", "attention.softmax_bits=8"]
    before += ["attention.mode=null"]
    summed = ["passes.distill.relation_weight=100"]
    named = {}
    for name in shipped_names():
        weights = load_recipe(name).recipe.weights
        changed = summed if name.startswith("mpqdm") else []
        if weights.group_scale == "integer" and weights.group_size is not None:
            wide = max(128 if "svdquant" in name or name == "dynamic-w4a8" else 0, 2 * weights.group_size)
            changed = [*changed, "weights.group_scale=float", f"weights.group_size={wide}"]
        if name.startswith(("dmq-w4", "dmq-ptqd-w4", "modiff")):
            changed = [*changed, "passes.choose=null", "passes.menu=null"]
        if name == "auto-w4a8":
            changed = [*changed, "passes.choose={path: 2, rows: 10}"]
        named[name] = load_recipe(name, before + changed).recipe
    values = {name: json.loads(resolve(recipe).json) for name, recipe in named.items()}
    for each in values.values():
        assert not each["passes"]["round"].pop("correct_bias")
        each["passes"].pop("exceptions", None)
        # Neither counted steps by their effect.
        for name, field in (("distill", "effect"), ("differences", "by_effect")):
            (each["passes"].get(name) or {}).pop(field, None)
        each["passes"]["round"]["inputs"] = "fp"
    assert {name: recipe_digest(each) for name, each in values.items()} == recorded


def test_recipes_that_say_whose_inputs_round_reads_are_still_read(tmp_path: Path):
    """It had one value; jobs that are recorded hold it, and recipes may."""
    plain = load_recipe("base").recipe
    assert loaded("extends: base\npasses: {round: {inputs: fp}}", tmp_path).passes == plain.passes
    stored = plain.model_dump(mode="json")
    stored["passes"]["round"]["inputs"] = "fp"
    assert recipe_from_json(stored) == plain


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


# --- messages

PROBLEMS = [
    ("weights.bits=9", "weights.bits: got 9, wanted one of 2, 3, 4, 5, 6, 8"),
    ("weights.bits=1", "weights.bits: got 1, wanted one of 2, 3, 4, 5, 6, 8"),
    ("weights.bits=7", "weights.bits: got 7, wanted one of 2, 3, 4, 5, 6, 8"),
    ("weights.bits='4'", "weights.bits: got '4', wanted one of 2, 3, 4, 5, 6, 8"),
    ("activations.bits=16", "activations.bits: got 16, wanted one of 2, 3, 4, 5, 6, 8"),
    ("attention.softmax_bits=7", "attention.softmax_bits: got 7, wanted one of 2, 3, 4, 5, 6, 8, 16"),
    ("layers.0.weights.bits=9", "layers.0.weights.bits: got 9, wanted one of 2, 3, 4, 5, 6, 8"),
    ("layers.0.weights.bits=null", "layers.0.weights.bits: got null, wanted one of 2, 3, 4, 5, 6, 8"),
    ("layers.0.weights.range=null", "layers.0.weights.range: got null, wanted one of minmax, mse, percentile"),
    ("layers.0.activations.mode=true", "layers.0.activations.mode: got true, wanted one of static, per_step, dynamic"),
    ("passes.scale.method=0", "passes.scale.method: got 0, wanted one of learned, smooth, none"),
    ("weights.range=mes", "weights.range: got 'mes', wanted one of minmax, mse, percentile"),
    ("wieghts.bits=4", "wieghts: unknown key; nearest: weights"),
    ("weights.bit=4", "weights.bit: unknown key; nearest: bits"),
    ("passes.recontruct={}", "passes.recontruct: unknown key; nearest: reconstruct"),
    ("passes.reconstruct.iteration=5", "passes.reconstruct.iteration: unknown key; nearest: iterations"),
    ("layers.1.weights.bitz=4", "layers.1.weights.bitz: unknown key; nearest: bits"),
    ("memory.zzz=4", "memory.zzz: unknown key; known: budget_gib"),
    ("weights=8", "weights: got 8, wanted a mapping"),
    ("layers=8", "layers: got 8, wanted a list"),
    ("layers=[{}]", "layers.0.match: got nothing, wanted a value"),
    ("layers=[{match: '@middle'}]", "layers.0.match: got '@middle', wanted text like ^(@first|@last|[^@].*)$"),
    ("skip_split=1", "skip_split: got 1, wanted true or false"),
    ("seed=1.5", "seed: got 1.5, wanted an integer"),
    ("seed=-1", "seed: got -1, wanted at least 0"),
    ("description=3", "description: got 3, wanted text"),
    ("sampler.num_inference_steps=0", "sampler.num_inference_steps: got 0, wanted at least 1"),
    ("sampler.eta=1.5", "sampler.eta: got 1.5, wanted at most 1.0"),
    ("sampler.eta=.nan", "sampler.eta: got NaN, wanted a finite number"),
    ("weights.percentile=0.5", "weights.percentile: got 0.5, wanted more than 0.5"),
    ("memory.budget_gib=0", "memory.budget_gib: got 0, wanted more than 0.0"),
    ("passes.reconstruct.warmup=1", "passes.reconstruct.warmup: got 1, wanted less than 1.0"),
    ("passes.round.inputs=quantized", "passes.round.inputs: unknown key"),
    ("passes.reconstruct.beta=[2, 20]", "passes.reconstruct.beta: got [2.0, 20.0], wanted a start that is not below"),
    ("passes.reconstruct.beta=[20]", "passes.reconstruct.beta.1: got nothing, wanted a value"),
    ("weights.granularity=per_group", "weights.group_size: got null with granularity per_group, wanted a size"),
    ("weights.group_size=32", "weights.group_size: got 32 with granularity per_channel, wanted null"),
    ("layers.0.weights.group_size=32", "layers.0.weights.group_size: got 32 with granularity per_channel, wanted null"),
    (
        "evaluation.extractor=inception-v3",
        "evaluation.extractor_weights: got null with extractor inception-v3, wanted a file",
    ),
    ("evaluation.extractor_weights=/no/such", "evaluation.extractor_weights: got /no/such (No such file or directory)"),
    ("calibration.steps=30", "calibration.steps: got 30, wanted at most the sampler's 20"),
    ("calibration.steps=5", "calibration.steps: got 5 with activations per_step, wanted null (each of the 20 steps)"),
    (
        "evaluation.first_seed=1000031",
        "evaluation.first_seed: got seeds 1000031..1000286, wanted none of calibration's 1000000..1000031",
    ),
    (
        "passes.correct={first_seed: 200}",
        "evaluation.first_seed: got seeds 0..255, wanted none of passes.correct's 200..295",
    ),
    (
        "passes.exceptions={first_seed: 255}",
        "evaluation.first_seed: got seeds 0..255, wanted none of passes.exceptions's 255..256",
    ),
    (
        "activations.step_bits={first_seed: 250}",
        "evaluation.first_seed: got seeds 0..255, wanted none of activations.step_bits's 250..265",
    ),
    (
        "activations={mode: static, step_bits: {}}",
        "activations.step_bits: got a mapping with bits 8, mode static, wanted bits and mode per_step",
    ),
    ("activations.step_bits.target_mean=3", "activations.step_bits.target_mean: got 3, wanted at least 4"),
    (
        "activations.step_bits={method: effect, threshold: 2.0}",
        "activations.step_bits.threshold: got 2.0 with method effect, wanted null",
    ),
    (
        "activations.step_bits={choices: [4, 6], least_last: 8}",
        "activations.step_bits.least_last: got 8, wanted at most the greatest choice, 6",
    ),
    (
        "activations.step_bits.choices=[8, 4]",
        "activations.step_bits.choices: got [8, 4], wanted different bits in rising order",
    ),
    (
        "evaluation.first_seed=999745",
        "evaluation.first_seed: got seeds 999745..1000000, wanted none of calibration's 1000000..1000031",
    ),
    ("name=A b", "name: got 'A b', wanted text like"),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["passes.scale.shift=skip", "skip_split=false"],
            "passes.scale.shift: got skip with skip_split false, wanted skip_split true, or variance",
        ),
        (
            ["passes.scale.shift=variance", "activations.mode=dynamic_sample"],
            "passes.scale.shift: got variance with activations dynamic_sample, wanted static or per_step ranges",
        ),
        (
            ["passes.exceptions={}", "activations.bits=null"],
            "passes.exceptions: got activations.bits null, wanted quantized activations",
        ),
        (
            ["passes.allocate.method=global", "weights={bits: 2, symmetric: true}"],
            "passes.allocate: got symmetric weights of 2 bits, of which some channels would have 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_without_effect_are_refused(overrides: list[str], message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe("base", overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("override", "message"), PROBLEMS, ids=[override for override, _ in PROBLEMS])
def test_problem_is_one_line_with_exit_code_2(override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe("base", [override])
    text = str(caught.value)
    assert text.startswith(message)
    assert "\n" not in text
    assert isinstance(caught.value, InvalidInputError)
    assert caught.value.exit_code == 2


def test_problems_are_counted():
    with pytest.raises(RecipeError, match=r"^weights.bits: got 9, .* \(and 1 more\)$"):
        load_recipe("base", ["weights.bits=9", "seed=x"])


@pytest.mark.parametrize("first", [999_744, 1_000_032])
def test_seeds_that_touch_do_not_overlap(first: int):
    assert load_recipe("base", [f"evaluation.first_seed={first}"]).recipe.evaluation.first_seed == first


def test_calibration_steps_fit_where_nothing_is_per_step(tmp_path: Path):
    static = ["calibration.steps=5", "activations.mode=static"]
    assert load_recipe("base", static).recipe.calibration.steps == 5
    assert load_recipe("base", ["calibration.steps=5", "activations.bits=null"]).recipe.calibration.steps == 5
    with pytest.raises(RecipeError, match=r"calibration.steps: got 5 with activations per_step"):
        load_recipe("base", [*static, "layers.0.activations.mode=per_step"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: [", "line 1: "),
        ("a: 1\na: 2", "line 2: got key 'a' twice"),
        ("1: 2", "line 1: got key 1 where a name belongs"),
        ("- 1", ": got [1], wanted a mapping"),
        ("extends: [base]", ": extends: got ['base'], wanted a shipped recipe's name or a file"),
        ("seed: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path):
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert message.replace("'", '"') in str(caught.value).replace("'", '"')
    assert "\n" not in str(caught.value)


def test_file_that_cannot_be_read_is_refused(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"description: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match=r"recipe: got 'nope.yaml', wanted a file that exists"):
        load_recipe("nope.yaml", folder=tmp_path)
    with pytest.raises(
        RecipeError, match=r"recipe: got 'fast-w4a9', wanted a file or a shipped recipe; nearest: fast-w4"
    ):
        load_recipe("fast-w4a9", folder=tmp_path)
    with pytest.raises(RecipeError, match=r"wanted a file or a shipped recipe; nearest: base"):
        load_recipe(write(tmp_path, "orphan.yaml", "extends: bas"))


@pytest.mark.parametrize("values", [{"seed": float("nan")}, {"seed": object()}, {1: 2}, {"weights": {"bits": 9}}])
def test_recipe_from_json_refuses_what_is_no_recipe(values: Any):
    with pytest.raises(RecipeError):
        recipe_from_json(values)


# --- the extractor's weights


def test_extractor_weights_become_a_digest_wherever_the_file_lies(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    weights = tmp_path / "deep" / "inception.pth"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    text = "extends: base\nevaluation: {extractor: inception-v3, extractor_weights: inception.pth}"
    write(tmp_path / "deep", "one.yaml", text)
    write(tmp_path, "two.yaml", "extends: deep/one.yaml")
    two = load_recipe("two.yaml", folder=tmp_path)
    override = ["evaluation={extractor: inception-v3, extractor_weights: deep/inception.pth}"]
    three = load_recipe("base", override, folder=tmp_path)
    assert two.recipe.evaluation.extractor_weights == digest
    assert {key: path.read_bytes() for key, path in two.files.items()} == {digest: b"weights"}
    assert resolve(two.recipe).digest == resolve(three.recipe).digest
    assert str(tmp_path) not in resolve(two.recipe).json
    assert recipe_from_json(json.loads(resolve(two.recipe).json)) == two.recipe


def test_weights_for_the_lpips_become_a_digest_and_lie_below_the_recipe(tmp_path: Path):
    write(tmp_path, "alexnet.pth", "weights")
    write(tmp_path, "one.yaml", "extends: base\nevaluation: {lpips: alexnet.pth}")
    one = load_recipe("one.yaml", folder=tmp_path)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert one.recipe.evaluation.lpips == digest
    assert {key: path.read_bytes() for key, path in one.files.items()} == {digest: b"weights"}
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", "two.yaml", "extends: base\nevaluation: {lpips: ../alexnet.pth}")
    with pytest.raises(RecipeError, match=r"evaluation\.lpips: .*is not below"):
        load_recipe("below/two.yaml", folder=tmp_path)


def test_extractor_weights_are_refused_where_the_extractor_has_its_own(tmp_path: Path):
    write(tmp_path, "w", "")
    with pytest.raises(
        RecipeError, match=r"extractor_weights: got a file with extractor efficientnet-lite0, wanted null"
    ):
        load_recipe("base", ["evaluation.extractor_weights=w"], folder=tmp_path)


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
    assert set(fitted) == set(Round.model_fields) - {"correct_bias"}
    assert Round(method=RoundingMethod.CLOSED_FORM, correct_bias=True).to_json()["correct_bias"]


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
