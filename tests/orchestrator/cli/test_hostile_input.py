"""Recipes and models that somebody made to do harm: one line, exit code 2, in little time and memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant_spec.recipe import Recipe
from quant_spec.record import Record

ROOT = Path(__file__).parents[3]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

Cli = Callable[..., Any]
Snapshot = Callable[[], dict[str, bytes]]


def assert_refused(answer: Any, *words: str) -> None:
    """Check for exit code 2, an empty stdout, and one printable line on stderr with these words."""
    assert (answer.code, answer.out) == (2, ""), answer
    (line,) = answer.err.removesuffix("\n").split("\n")
    assert line.startswith("error: ")
    assert line.isprintable()
    for word in words:
        assert word in line, line


def bomb(levels: int, *, merge: bool = False) -> str:
    """Return YAML of a few hundred bytes that stands for 9 ** levels values."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{<<: [{aliases}]}}" if merge else f"[{aliases}]"))
    return "\n".join(lines)


DEEP = "[" * 200_000 + "]" * 200_000
BOMBS = {
    "aliases": (bomb(9), "values, with all that aliases stand for"),
    "merged aliases": (bomb(9, merge=True), "values, with all that aliases stand for"),
    "an alias within itself": ("weights: &a [1, *a]", "*a within what it stands for"),
    "deep lists": ("layers: " + "[" * 100_000, "levels"),
    "deep mappings": ('{"a":' * 40_000, "levels"),
    "deep blocks": "".join(f"{' ' * depth}a:\n" for depth in range(500)),
    "many values": ("layers: [" + "1," * 20_000 + "1]", "values"),
    "a long text": ("description: " + "x" * 300_000, "wanted at most 262144"),
    "a long number": ("seed: 0x" + "f" * 20_000, "a number of 20002 characters"),
    "a long sexagesimal": ("seed: " + "1:" * 10_000 + "1", "a number of 20001 characters"),
    "a long description": ("description: " + "x" * 20_000, "description: got", "at most 10000 characters"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_recipes_that_are_bombs(cli: Cli, tmp_path: Path, name: str) -> None:
    text, *words = (BOMBS[name], "levels") if isinstance(BOMBS[name], str) else BOMBS[name]
    recipe = tmp_path / "bomb.yaml"
    recipe.write_text(text)
    assert_refused(cli("recipes", "validate", recipe), *words)


def test_assignments_that_are_bombs(cli: Cli) -> None:
    for value, *words in (
        ("layers=" + "[" * 50_000, "levels"),
        ("a." * 1000 + "a=1", "wanted key=value"),
        ("seed=0x" + "f" * 50_000, "characters"),
        ("sampler.options={a: " + "[" * 60 + "]" * 60 + "}", "options"),
    ):
        answer = cli("recipes", "show", "base", "--set", value)
        if words == ["options"]:
            # Within the limits, it is a value like any other.
            assert answer.code == 0
        else:
            assert_refused(answer, *words)


MEASURED = """
import sys, time
from orchestrator.cli.main import run_cli
started = time.process_time()
code = run_cli(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time() - started, peak)
sys.exit(code)
"""


def test_bombs_are_refused_within_a_second_and_200_mb(tmp_path: Path) -> None:
    """In a process of its own, whose CPU time and memory are those of the refusal, with what it imports."""
    recipe, model = tmp_path / "bomb.yaml", tmp_path / "model"
    recipe.write_text(bomb(9))
    model.mkdir()
    (model / "config.json").write_text(DEEP)
    for words, expected in ((["recipes", "validate", recipe], "values"), (["models", "add", model], "levels")):
        command = [sys.executable, "-c", MEASURED, "--home", tmp_path / "home", *words]
        answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
        assert answer.returncode == 2, answer
        assert expected in answer.stderr
        seconds, peak = answer.stdout.split()
        assert int(peak) < 200 * 1024
        # A bomb takes minutes. Here it is a second, of which most is imports; the rest is for a slow machine.
        assert float(seconds) < 10.0


def sections(section: type[Record], path: str = "") -> list[tuple[str, type[Record], str]]:
    """Return (path, section, field) of every number of a recipe."""
    found = []
    for name, field in section.model_fields.items():
        place = f"{path}{name}"
        text = str(field.annotation)
        nested = next((each for each in _records(field.annotation)), None)
        if nested is not None and not text.startswith("tuple"):
            found += sections(nested, f"{place}.")
        elif re.search(r"\b(int|float)\b", text) and "Literal" not in text:
            found.append((place, section, name))
    return found


def _records(annotation: Any) -> list[type[Record]]:
    import typing

    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, Record) else []
    return [each for item in typing.get_args(annotation) for each in _records(item)]


def _schema_of(path: str) -> dict[str, Any]:
    from orchestrator.recipes.json_schema import json_schema

    whole = json_schema()
    node: Any = whole
    for part in path.split("."):
        node = node["properties"][part]
        options = [node, *node.get("anyOf", [])]
        # Of a mapping by names, what any of them may have.
        options += [each for option in options for each in option.get("patternProperties", {}).values()]
        options += [each for option in options for each in option.get("anyOf", [])]
        reference = next((each["$ref"] for each in options if "$ref" in each), None)
        if reference is not None:
            node = whole["$defs"][reference.rpartition("/")[2]]
    return dict(node)


NUMBERS = [path for path, _, _ in sections(Recipe)]


def test_there_are_numbers() -> None:
    assert len(NUMBERS) > 60
    assert "calibration.seeds" in NUMBERS
    assert "passes.reconstruct.lr" in NUMBERS


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_of_a_recipe_has_an_upper_bound(path: str) -> None:
    node = _schema_of(path)
    options = [option for option in node.get("anyOf", [node]) if option.get("type") in ("integer", "number", "array")]
    assert options, node
    for option in options:
        for each in option.get("prefixItems", [option.get("items", option) if option["type"] == "array" else option]):
            assert "enum" in each or {"maximum", "exclusiveMaximum"} & each.keys(), (path, each)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("calibration.seeds=1000000000000", ("calibration.seeds", "got 1000000000000", "at most 1000000")),
        ("evaluation.batch_size=10000000", ("evaluation.batch_size", "at most 1000000")),
        ("sampler.num_inference_steps=100000", ("sampler.num_inference_steps", "at most 10000")),
        ("calibration.seeds=200000", ("calibration.shard_seeds", "12500 tasks", "wanted at least 20", "10000 tasks")),
        ("evaluation={seeds: 20000, shard_seeds: 1}", ("evaluation.shard_seeds", "20000 tasks", "wanted at least 2")),
        ("passes.correct={seeds: 20000, shard_seeds: 1}", ("passes.correct.shard_seeds", "20032 tasks")),
        ("memory.budget_gib=1e300", ("memory.budget_gib", "at most 65536")),
        ("weights.group_size=99999999999999999999", ("weights.group_size", "at most 1000000")),
    ],
)
def test_numbers_beyond_their_bounds(
    cli: Cli, with_digits: Path, snapshot: Snapshot, assignment: str, words: tuple[str, ...]
) -> None:
    before = snapshot()
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--set", assignment), *words)
    assert snapshot() == before


# --- files that recipes name


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of this machine that no recipe has any business with."""
    path = tmp_path / "etc" / "shadow"
    path.parent.mkdir()
    path.write_text("root:hush")
    return path


def recipe_with(folder: Path, weights: str) -> Path:
    """Write a recipe that names a file of weights."""
    folder.mkdir(exist_ok=True)
    path = folder / "mine.yaml"
    path.write_text(
        f"extends: base\nevaluation: {{extractor: inception-v3, extractor_weights: {json.dumps(weights)}}}\n"
    )
    return path


def test_recipes_cannot_name_files_elsewhere(
    cli: Cli, with_digits: Path, snapshot: Snapshot, secret: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "etc").symlink_to(secret.parent)
    before = snapshot()
    for named in (str(secret), "../etc/shadow", "link", "etc/shadow", "sub/../../etc/shadow", "/no/such", "/dev/zero"):
        recipe = recipe_with(folder, named)
        assert_refused(cli("submit", recipe, "--model", "digits"), "extractor_weights", "is not below")
    assert snapshot() == before
    (folder / "base.yaml").write_text("{}")
    (tmp_path / "other.yaml").write_text("root:hush")
    for named in ("../other.yaml", str(tmp_path / "other.yaml"), "/no/such.yaml", "../../etc/passwd"):
        (folder / "mine.yaml").write_text(f"extends: {named}")
        answer = cli("recipes", "validate", folder / "mine.yaml")
        assert_refused(answer, "extends", "is not below")
        assert "hush" not in answer.err


def test_a_folder_that_the_user_allows(
    cli: Cli, with_digits: Path, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(tmp_path / "recipes", str(secret))
    words = ["recipes", "validate", recipe]
    assert cli("--allow-path", secret.parent, *words).code == 0
    assert cli("--allow-path", tmp_path / "nothing", *words).code == 2
    monkeypatch.setenv("QUANTMILL_ALLOWED_PATHS", f"/nowhere:{secret.parent}")
    assert cli(*words).code == 0
    monkeypatch.delenv("QUANTMILL_ALLOWED_PATHS")
    # Beside the recipe, and in the user's own words, a file may lie.
    inside = tmp_path / "recipes" / "inception.pth"
    inside.write_bytes(b"weights")
    assert cli("recipes", "validate", recipe_with(tmp_path / "recipes", "inception.pth")).code == 0
    own = f"evaluation={{extractor: inception-v3, extractor_weights: {secret}}}"
    assert cli("recipes", "show", "base", "--set", own).code == 0


def test_pipes_sockets_and_devices_are_never_read(cli: Cli, with_digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.yaml")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path is short
        listening.bind("socket")
        os.chdir(here)
        for name in ("pipe", "socket"):
            recipe = recipe_with(folder, name)
            assert_refused(cli("submit", recipe, "--model", "digits"), "extractor_weights", "no plain file")
        own = "evaluation={extractor: inception-v3, extractor_weights: /dev/zero}"
        assert_refused(cli("recipes", "show", "base", "--set", own), "no plain file")
        for path in (folder / "pipe.yaml", folder / "socket", "/dev/zero"):
            assert_refused(cli("recipes", "validate", path), "recipe")
        (folder / "mine.yaml").write_text("extends: pipe.yaml")
        assert_refused(cli("recipes", "validate", folder / "mine.yaml"), "no plain file")


# --- model folders


@pytest.fixture
def model(digits: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return shutil.copytree(digits, tmp_path / "model")


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json"])
def test_links_out_of_a_model_folder(cli: Cli, model: Path, tmp_path: Path, snapshot: Snapshot, name: str) -> None:
    outside = tmp_path / "outside" / Path(name).name
    outside.parent.mkdir()
    (model / name).rename(outside)
    (model / name).symlink_to(outside)
    cli("init")
    before = snapshot()
    assert_refused(cli("models", "add", model), "is not below", "--allow-path")
    assert snapshot() == before
    assert cli("--allow-path", outside.parent, "models", "add", model).code == 0


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json"])
def test_pipes_in_a_model_folder(cli: Cli, model: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    assert_refused(cli("models", "add", model), "no plain file")


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "..", "", "a/../b.safetensors", "pipe.safetensors"]
)
def test_an_index_that_names_files_elsewhere(cli: Cli, model: Path, shard: str) -> None:
    (model / WEIGHTS).rename(model / "outside.safetensors")
    os.mkfifo(model / "unet" / "pipe.safetensors")
    index = {"weight_map": {"conv_in.weight": shard}}
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(cli("models", "add", model), "wanted")


@pytest.mark.parametrize(
    "name", ["unet/config.json", "scheduler/scheduler_config.json", f"{WEIGHTS}.index.json", "model_index.json"]
)
@pytest.mark.parametrize(
    "text",
    [DEEP, "[" * 200_000, '{"a":' * 90 + "1" + "}" * 90, "[" + "0," * 1_100_000 + "0]", "\ud800", "{"],
    ids=range(6),
)
def test_json_beyond_the_limits(cli: Cli, model: Path, name: str, text: str) -> None:
    if name.endswith("index.json") and "safetensors" in name:
        (model / WEIGHTS).unlink()
    if name == "model_index.json":
        config = json.loads((model / "unet/config.json").read_text())
        assert config["in_channels"] in (1, 3, 4), "else nobody reads the pipeline's index"
    (model / name).write_text(text, errors="surrogatepass", encoding="utf-8")
    assert_refused(cli("models", "add", model), Path(name).name)


def test_json_of_other_components_beyond_the_limits(cli: Cli, tmp_path: Path) -> None:
    """Nobody reads it before a task loads the pipeline."""
    pipeline = shutil.copytree(ROOT / "examples" / "models" / "emoji-sd", tmp_path / "model")
    for name in ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "vae/config.json"):
        kept = (pipeline / name).read_bytes()
        (pipeline / name).write_text(DEEP)
        assert_refused(cli("models", "add", pipeline), Path(name).name, "levels")
        (pipeline / name).write_bytes(kept)
    assert cli("models", "ls", "--json").json == []


def test_a_pipelines_index_that_is_not_one_is_told(cli: Cli, tmp_path: Path) -> None:
    pipeline = shutil.copytree(ROOT / "examples" / "models" / "emoji-sd", tmp_path / "model")
    path = pipeline / "model_index.json"
    index = json.loads(path.read_text())
    for text in ("[]", "null", '"x"'):
        path.write_text(text)
        assert_refused(cli("models", "add", pipeline), "model_index.json", "wanted an object")
    cases = {
        "names no pipeline (_class_name)": {},
        "does not name unet": {**index, "unet": [None, None]},
        "names image_encoder, got no such folder": {**index, "image_encoder": ["transformers", "CLIPModel"]},
    }
    for told, each in cases.items():
        path.write_text(json.dumps(each))
        answer = cli("models", "add", pipeline)
        assert f"note: {pipeline} is taken as a denoiser alone: {path} {told}" in answer.err
        assert (answer.code, answer.out.partition(",")[0]) == (0, "model model (UNet2DConditionModel)")
    assert len(cli("models", "ls", "--json").json) == 1


def safetensors(header: str | bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header."""
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (safetensors(DEEP), "levels"),
        (safetensors('{"a":' * 100 + "1" + "}" * 100), "levels"),
        (safetensors(json.dumps({str(n): {} for n in range(600_000)})), "values"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated"),
        (safetensors('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                     '"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)), "one before"),
        (safetensors('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', bytes(8)), "one before"),
        (safetensors('{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', bytes(1)), "F4"),
    ],
    ids=["very deep", "deep", "many", "long", "overlap", "hole", "unknown dtype"],
)  # fmt: skip
def test_headers_beyond_the_limits(cli: Cli, model: Path, content: bytes, word: str) -> None:
    (model / WEIGHTS).write_bytes(content)
    assert_refused(cli("models", "add", model), word)


# dtype -> (bytes of a number, finite bits, {what: bits})
BITS = {
    "F64": (8, 0x3FF0_0000_0000_0000, {"nan": 0x7FF8_0000_0000_0001, "inf": 0x7FF0 << 48, "-inf": 0xFFF0 << 48}),
    "F32": (4, 0x3F80_0000, {"nan": 0x7FC0_0001, "inf": 0x7F80_0000, "-inf": 0xFF80_0000, "signalling": 0x7F80_0001}),
    "F16": (2, 0x3C00, {"nan": 0x7E00, "inf": 0x7C00, "-inf": 0xFC00}),
    "BF16": (2, 0x3F80, {"nan": 0x7FC0, "inf": 0x7F80, "-inf": 0xFF80}),
    "F8_E4M3": (1, 0x38, {"nan": 0x7F, "-nan": 0xFF}),
    "F8_E5M2": (1, 0x3C, {"nan": 0x7E, "inf": 0x7C, "-inf": 0xFC}),
}
CASES = [(dtype, what) for dtype, (_, _, bad) in BITS.items() for what in bad]


@pytest.mark.parametrize(("dtype", "what"), CASES)
def test_numbers_that_are_not_finite(cli: Cli, model: Path, dtype: str, what: str) -> None:
    """Also in a tensor of which no layer knows, as the last of more numbers than are looked at at once."""
    width, good, bad = BITS[dtype]
    numbers = np.full((8 << 20) // width + 3, good, f"<u{width}")
    numbers[-1] = bad[what]
    header = {"strange": {"dtype": dtype, "shape": [len(numbers)], "data_offsets": [0, numbers.nbytes]}}
    (model / WEIGHTS).write_bytes(safetensors(json.dumps(header), numbers.tobytes()))
    assert_refused(cli("models", "add", model), "got 1 of", "NaN or infinite in strange")


def test_largest_finite_numbers_are_no_infinity() -> None:
    from workers.storage.safetensors_check import _not_finite

    for dtype, largest in {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B, "BF16": 0x7F7F, "F16": 0x7BFF, "F32": 0x7F7F_FFFF}.items():
        assert not _not_finite(np.array([largest], f"<u{BITS[dtype][0]}"), dtype).any()


CONFIGS = [
    *({"sample_size": size} for size in (float("nan"), "8", 10**9, 0, [8, 0.5])),
    *({"in_channels": channels} for channels in (2**80, -1, 1.5)),
    {"down_block_types": ["os"]},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_configs_that_no_model_can_be_made_of(
    cli: Cli, model: Path, snapshot: Snapshot, values: dict[str, Any]
) -> None:
    path = model / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    cli("init")
    before = snapshot()
    answer = cli("models", "add", model)
    assert (answer.code, answer.out) == (2, ""), answer
    # What is no JSON is not inspected at all.
    assert [line.split(":")[0] for line in answer.err.splitlines()] in ([f"inspecting {model}", "error"], ["error"])
    assert {name for name in snapshot() if name not in before} <= {name for name in snapshot() if "sha256" in name}


SCHEDULER_VALUES = [
    ({"beta_start": float("nan")}, "NaN is no number"),
    ({"beta_end": float("inf")}, "beta_end: got inf, wanted a finite number"),
    ({"num_train_timesteps": 10**9}, "num_train_timesteps: got 1000000000, wanted an integer from 1 to 1000000"),
]


@pytest.mark.parametrize(("values", "said"), SCHEDULER_VALUES, ids=str)
def test_schedulers_that_no_sample_could_be_drawn_with(
    cli: Cli, digits: Path, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    model = Path(shutil.copytree(digits, tmp_path / "model"))
    path = model / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "linear"} | values))
    answer = cli("submit", "fast-w4a8", "--model", model)
    assert (answer.code, answer.out) == (2, ""), answer
    assert answer.err.splitlines()[-1].startswith("error: ")
    assert said in answer.err.splitlines()[-1]
    assert "registered as" not in answer.err
    assert (cli("jobs", "ls", "--json").json, cli("models", "ls", "--json").json) == ([], [])


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        *(("recipes", "validate", f"./{LONG}"), ("submit", "base", "--model", f"./{LONG}"), ("models", "add", LONG)),
        *(
            ("run", "base", "--model", "digits", "--out", place)
            for place in ("/proc/x", f"/tmp/{LONG}", f"/tmp/{'n' * 250}")
        ),
        ("submit", "base", "--model", "digits", "--prompts", f"/tmp/{LONG}"),
        ("--home", f"/tmp/{LONG}", "models", "add", "x"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_places_that_cannot_be(cli: Cli, with_digits: Path, words: tuple[str, ...]) -> None:
    answer = cli(*words)
    assert_refused(answer)
    assert cli("jobs", "ls", "--json").json == []


def test_numbers_that_are_none(cli: Cli, with_digits: Path) -> None:
    job = cli("submit", "fast-w4a8", "--model", "digits", "--json").json["job"]
    for words in (["jobs", "wait", job, "--timeout"], ["artifacts", "gc", "--yes", "--grace"]):
        for number in ("nan", "inf"):
            answer = cli(*words, number)
            assert (answer.code, answer.out) == (2, ""), answer
            assert "not a finite number" in answer.err
    assert_refused(cli("submit", "fast-w4a8", "--model", ""), "model: got ''")


# --- texts that are no UTF-8

CAFE = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("where", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_texts_that_are_not_utf_8(
    cli: Cli, digits: Path, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    """On Postgres they were taken for an outage, and waited out for ever."""
    of = ["--db", request.getfixturevalue("empty_postgres_url")] if where == "postgres" else []
    assert cli(*of, "init").code == 0
    folder = shutil.copytree(digits, tmp_path / CAFE / "model")
    recipe = tmp_path / f"{CAFE}.yaml"
    recipe.write_text("extends: base\n")
    assert_refused(cli(*of, "models", "add", folder, "--name", "digits"), "UTF-8", "\\udce9")
    assert_refused(cli(*of, "submit", "base", "--model", folder), "UTF-8", "\\udce9")
    assert cli(*of, "models", "add", digits).code == 0
    assert_refused(cli(*of, "submit", recipe, "--model", "digits"), "UTF-8", "\\udce9")
    assert_refused(cli(*of, "submit", "base", "--model", "digits", "--set", 'name="\\ud800"'), "UTF-8")
    assert cli(*of, "jobs", "ls", "--json").json == []


# --- names that steer a terminal

STEERING = ["\x1b[31mred", "\x1b]0;title\x07", "a\x00b", "a\rb", "a\x9bb", "\u202eabc", "a\u2028b", "a\x7fb", "é", "A"]


@pytest.mark.parametrize("name", STEERING)
def test_names_that_steer_a_terminal(cli: Cli, with_digits: Path, digits: Path, snapshot: Snapshot, name: str) -> None:
    before = snapshot()
    assert_refused(cli("models", "add", digits, "--name", name), "name")
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--name", name), "name")
    assert_refused(cli("submit", "fast-w4a8", "--model", "digits", "--set", f"name={json.dumps(name)}"), "name")
    assert snapshot() == before


def test_class_names_and_tensor_names_that_steer_a_terminal(cli: Cli, model: Path) -> None:
    config = json.loads((model / "unet/config.json").read_text())
    (model / "unet/config.json").write_text(json.dumps(config | {"_class_name": "\x1b[2J"}))
    assert_refused(cli("models", "add", model), "_class_name")
    (model / "unet/config.json").write_text(json.dumps(config))
    header = {"\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    (model / WEIGHTS).write_bytes(safetensors(json.dumps(header), struct.pack("<f", float("nan"))))
    assert_refused(cli("models", "add", model), "\\x1b[2J")


def test_what_the_database_says_does_not_steer_a_terminal(cli: Cli, with_digits: Path, home: Path) -> None:
    """Somebody else may have written to it."""
    import sqlite3

    with sqlite3.connect(home / "quantmill.db") as connection:
        connection.execute("UPDATE models SET source = ?, class_name = ?", ("\x1b]0;t\x07\u202e", "\x1b[2J"))
    connection.close()
    for words in (["models", "ls"], ["models", "show", "digits"]):
        answer = cli(*words)
        assert answer.code == 0
        assert all(line.isprintable() for line in answer.out.split("\n")), answer.out
        assert "\\x1b" in answer.out
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--json")
    job = answer.json["job"]
    with sqlite3.connect(home / "quantmill.db") as connection:
        connection.execute("UPDATE events SET data = ? WHERE event = 'created'", (json.dumps({"error": "\x1b[2J"}),))
        connection.execute("UPDATE jobs SET recipe_name = ?", ("\x1b[2J",))
    connection.close()
    for words in (["jobs", "ls"], ["jobs", "show", job], ["jobs", "logs", job]):
        answer = cli(*words)
        assert "\x1b" not in answer.out + answer.err
