"""What is no recipe is refused in one line that names the field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RecipeError
from orchestrator.recipes.load import load_recipe, recipe_from_json, resolve
from quant_spec.errors import InvalidInputError
from tests.orchestrator.recipes.recipe_files import write

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
    ("passes.round.inputs=int", "passes.round.inputs: got 'int', wanted one of fp, quantized"),
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
            ["passes.exceptions={choices: [5, 6]}", "activations.mode=static"],
            "passes.exceptions.choices: got activations of mode static, type int, wanted mode per_step and type int",
        ),
        (
            ["passes.exceptions={choices: [5, 6]}", "activations.step_bits={}"],
            "passes.exceptions.choices: got it beside activations.step_bits, wanted one choice of input bits",
        ),
        (
            ["passes.exceptions={choices: [5, 6]}", "passes.differences={}"],
            "passes.exceptions.choices: got it beside passes.differences, wanted one choice of input bits",
        ),
        (
            ["passes.exceptions={choices: [6]}"],
            "passes.exceptions.choices: got [6], wanted different bits in rising order, or none",
        ),
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
