"""The shipped and example recipes, and what is published of recipes: the JSON schema and the reference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.errors import RecipeError
from orchestrator.recipes import reference
from orchestrator.recipes.files import shipped_names
from orchestrator.recipes.json_schema import json_schema
from orchestrator.recipes.load import load_recipe, resolve, shipped_recipes
from quant_spec.recipe_formats import Activations, ActivationsException, Weights, WeightsException
from quant_spec.record import Record
from tests.orchestrator.recipes.recipe_files import EXAMPLES, FILES, ROOT, write

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
    promised |= {"text-w8-svdquant-w4a8", "auto-w4a8", "gptaq-w4a8"}
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
    ends = (
        None if is_tfmq or is_auto or name in ("fast-w4a8", "gptaq-w4a8") else 8
    )  # whether the image's ends are quantized
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
    has_exceptions = name in ("tfmq-w8a8", "dmq-w8a8") or name.startswith("dynamic") or name.endswith("w4a6")
    has_exceptions = has_exceptions and not is_modiff
    assert (recipe.passes.exceptions is not None) == has_exceptions
    if recipe.passes.exceptions is not None:
        assert recipe.passes.exceptions.choices == ((5, 6, 8) if name.endswith("w4a6") else ())
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
    assert recipe.passes.round.answers == name.startswith("gptaq")
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
