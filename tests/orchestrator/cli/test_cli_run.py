"""One real job, end to end through the command line, and everything that can be done with its release."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from kernels import native
from kernels.cpu_measure import process_timings
from orchestrator.actions.progress import Pacer, progress_line, take_snapshot
from orchestrator.cli.main import run_cli
from orchestrator.db.session import open_database
from tests.orchestrator.cli.test_search import write_model
from tests.orchestrator.in_process import InProcess
from workers.storage.manifest import read_manifest
from workers.storage.private import is_private
from workers.storage.store import open_store

ROOT = Path(__file__).parents[3]
SMALL = {
    "sampler.num_inference_steps": "4",
    "calibration.seeds": "4",
    "calibration.shard_seeds": "2",
    "evaluation.seeds": "8",
    "evaluation.shard_seeds": "4",
    "evaluation.sqnr_seeds": "4",
    "evaluation.grid": "4",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]

Cli = Callable[..., Any]


def quantmill(home: Path, *words: str | Path) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTMILL", "RAY"))}
    command = [sys.executable, "-m", "orchestrator.cli", "--home", str(home), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def finished(home_with_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A home with one finished job and its release in a folder beside it; its JSON; what it wrote on stderr."""
    folder = tmp_path_factory.mktemp("finished")
    home = shutil.copytree(home_with_digits, folder / "home")
    words = ["run", "minmax-w8a8", "--model", "digits", *SET, "--name", "small", "--out", folder / "out", "--json"]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        # Without Ray: the same job through it, in a process of its own, is tests/test_end_to_end.py.
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        code = run_cli(["--home", str(home), *map(str, words)])
    assert code == 0, err.getvalue()
    return home, json.loads(out.getvalue()), err.getvalue()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be timed for long: what the times are is not the point."""
    monkeypatch.setattr("orchestrator.actions.bench.SECONDS", 0.02)
    monkeypatch.setattr("orchestrator.actions.bench.LAYER_SECONDS", 0.002)


@pytest.fixture
def done(finished: tuple[Path, dict[str, Any], str], home: Path) -> dict[str, Any]:
    """The finished job's JSON; the test's home is a copy of the home where it ran."""
    shutil.copytree(finished[0], home)
    return finished[1]


def test_run_answers_with_the_contracts_keys(finished: tuple[Path, dict[str, Any], str]) -> None:
    home, view, _ = finished
    assert (view["state"], view["model"], view["recipe"], view["release"]) == (
        "succeeded",
        "digits",
        "minmax-w8a8",
        "small@1",
    )
    assert set(view["tasks"]) == {"total", "cached", "succeeded", "failed", "running", "queued"}
    assert view["tasks"]["succeeded"] == view["tasks"]["total"] > 5
    assert view["seconds"] > 0
    assert len(view["digest"]) == 64
    assert view["error"] is None
    numbers = [
        "psnr_db",
        "psnr_db_ci95",
        "fd",
        "n",
        "weight_bits_mean",
        "act_bits_mean",
        "bytes",
        "bytes_fp16",
        "bops",
        "bops_fp32",
    ]
    assert all(isinstance(view["metrics"][name], int | float) for name in numbers)
    assert len(view["metrics"]["sqnr_db_per_step"]) == 4
    assert view["metrics"]["n"] == 8
    assert view["metrics"]["fd_extractor"]
    assert view["metrics"]["sampler"]["num_inference_steps"] == 4
    assert (
        view["metrics"]["sampler"]["scheduler"] == "DDIMScheduler"
    )  # the model's own, that it was trained with, is DDPM
    assert view["metrics"]["samples"] == "pixels"
    assert Path(view["report"]).parent == home / "reports"


def test_run_writes_the_release_and_shows_progress(finished: tuple[Path, dict[str, Any], str]) -> None:
    home, view, err = finished
    names = {path.name for path in (home.parent / "out").iterdir()}
    assert {"config.json", "manifest.json", "metrics.json", "provenance.json", "recipe.json", "README.md"} <= names
    assert f"job {view['job']}: minmax-w8a8 on digits" in err
    assert f"job {view['job']}: succeeded" in err
    lines = [line for line in err.splitlines() if line.startswith(f"job {view['job']}: running")]
    assert 1 <= len(lines) <= view["tasks"]["total"] + 2


def test_run_again_computes_nothing_and_starts_no_ray(
    cli: Cli, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("orchestrator.actions.execution.RayExecutor.start", refuse)
    again = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--name", "small", "--json")
    assert again.code == 0, again.err
    assert again.json["tasks"]["cached"] == again.json["tasks"]["total"] == done["tasks"]["total"]
    assert (again.json["release"], again.json["digest"]) == ("small@1", done["digest"])
    assert again.json["metrics"] == done["metrics"]
    dry = cli("submit", "minmax-w8a8", "--model", "digits", *SET, "--dry-run", "--json").json
    assert dry["tasks"]["cached"] == dry["tasks"]["total"]
    assert dry["estimated_seconds"] == 0


def test_run_says_what_to_type_next(cli: Cli, done: dict[str, Any], home: Path) -> None:
    text = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--name", "small").out
    assert "small@1" in text
    assert f"{done['metrics']['psnr_db']:.2f} dB" in text
    assert "x smaller" in text
    assert str(home / "reports") in text
    assert f"--home {home} artifacts pull small@1 small-1" in text


def test_jobs(cli: Cli, done: dict[str, Any]) -> None:
    waited = cli("jobs", "wait", done["job"], "--json")
    assert waited.code == 0
    assert waited.json["digest"] == done["digest"]
    assert "small@1" in cli("jobs", "ls").out
    assert "small@1" in cli("jobs", "show", done["job"][:5]).out
    events = cli("jobs", "logs", done["job"], "--json").json
    assert [event["event"] for event in events if event["job"]][-1] == "succeeded"
    finished = [event for event in events if event["event"] == "finished"]
    assert len(finished) == done["tasks"]["total"] - done["tasks"]["cached"]


def test_artifacts_ls_show_and_alias(cli: Cli, done: dict[str, Any]) -> None:
    (row,) = cli("artifacts", "ls", "--json").json
    assert set(row) == {"name", "version", "digest", "bytes", "aliases", "job", "created_at", "metrics"}
    assert (row["name"], row["version"], row["digest"], row["job"]) == ("small", 1, done["digest"], done["job"])
    assert row["aliases"] == ["latest"]
    assert "small@1" in cli("artifacts", "ls").out
    assert cli("artifacts", "alias", "small@1", "prod", "--json").json["aliases"] == ["latest", "prod"]
    for ref in ("small", "small@1", "small@prod", "small@latest", done["digest"][:8]):
        assert cli("artifacts", "show", ref, "--json").json["digest"] == done["digest"]
    assert cli("artifacts", "alias", "small@1", "latest").code == 2
    assert cli("artifacts", "show", "small@2").code == 102


def test_artifacts_pull_and_verify(cli: Cli, done: dict[str, Any], tmp_path: Path) -> None:
    assert cli("artifacts", "pull", "small@1", tmp_path / "pulled", "--json").json["digest"] == done["digest"]
    assert (tmp_path / "pulled" / "config.json").is_file()
    assert cli("artifacts", "verify", "small@1", "--json").json == {
        "release": "small@1",
        "digest": done["digest"],
        "ok": True,
        "signed_by": None,
        "problems": [],
    }


def test_artifacts_gc_keeps_what_is_referred_to(cli: Cli, done: dict[str, Any], home: Path) -> None:
    store = home / "store" / "sha256"
    assert cli("artifacts", "gc", "--grace", "0").code == 0
    before = {path.name for path in store.rglob("*") if path.is_file()}
    garbage = home / "garbage"
    garbage.write_bytes(b"nothing refers to this")
    digest = open_store(str(home / "store")).put_file(garbage)
    assert cli("artifacts", "gc", "--json").json["blobs"] == 0, "young blobs are kept"
    dry = cli("artifacts", "gc", "--grace", "0", "--dry-run", "--json").json
    assert (dry["blobs"], dry["bytes"]) == (1, 22)
    assert (store / digest[:2] / digest).is_file()
    assert cli("artifacts", "gc", "--grace", "0", "--json").json["blobs"] == 1
    assert {path.name for path in store.rglob("*") if path.is_file()} == before
    assert cli("artifacts", "verify", "small@1").code == 0


PLAIN = """
import sys, json, torch
from diffusers import UNet2DModel, DDIMScheduler
unet = UNet2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
DDIMScheduler.from_pretrained(sys.argv[2])
assert "quant_core" not in sys.modules
print(json.dumps({"layer": type(unet.conv_in).__name__, "mean": float(unet.conv_in.weight.mean())}))
"""


def test_artifacts_export(cli: Cli, done: dict[str, Any], tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    assert cli("artifacts", "export", "small@1", "--format", "diffusers", "--out", packed).code == 0
    assert {path.name for path in packed.iterdir()} == {"unet", "scheduler", "README.md"}
    assert "quantization_config" in json.loads((packed / "unet" / "config.json").read_text())
    answer = cli("artifacts", "export", "small@1", "--format", "dequantized", "--out", plain, "--json")
    assert answer.code == 0, answer.err
    assert {path.name for path in plain.iterdir()} == {"unet", "scheduler"}
    tensors = load_file(plain / "unet" / "diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    original = load_file(ROOT / "examples/models/digits/unet/diffusion_pytorch_model.safetensors")
    assert set(tensors) == set(original)
    worst = max(float(abs(tensors[name] - original[name]).max() / abs(original[name]).max()) for name in original)
    assert 0 < worst < 0.05
    script = [sys.executable, "-W", "ignore", "-c", PLAIN, str(plain / "unet"), str(plain / "scheduler")]
    run = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["layer"] == "Conv2d"
    assert cli("artifacts", "export", "small@1", "--format", "dequantized", "--out", plain).code == 2


@pytest.mark.usefixtures("hasty")
def test_bench_layers_writes_a_table_of_latencies(cli: Cli, done: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    answer = cli(
        "bench", "small@1", "--threads", "1", "--backend", "reference", "--layers", "--out", str(file), "--json"
    )
    assert answer.code == 0, answer.err
    written = json.loads(file.read_text())
    assert answer.json == {**written, "file": str(file)}
    assert written["device"]
    assert all({"float/float", "2/8", "4/8", "8/4"} <= times.keys() for times in written["layers"].values())
    refused = cli("bench", "small@1", "--layers")
    assert refused.code == 2
    assert "got one of --layers and --out, wanted both or none" in refused.err


@pytest.mark.usefixtures("hasty")
def test_bench(cli: Cli, done: dict[str, Any]) -> None:
    answer = cli("bench", "small@1", "--threads", "1", "--backend", "reference", "--no-compile", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert (found["release"], found["threads"], found["backend"]) == ("small@1", 1, "reference")
    assert found["device"]
    for side in ("release_figures", "original_figures", "bf16_figures"):
        assert set(found[side]["step_ms"]) == {"1", "8"}
        assert all(value > 0 for value in found[side]["step_ms"].values())
        assert found[side]["images_per_second"] > 0
        assert found[side]["peak_memory_bytes"] > 0
    assert (found["bf16_compiled_figures"], found["compile_error"], found["dtype"]) == (None, None, "float32")
    assert (found["way"], found["graph_error"], found["compiled_way"]) == ("eager", None, None)
    assert found["release_figures"]["eager_step_ms"] is None
    assert found["release_figures"]["bytes"] < found["original_figures"]["bytes"]
    assert found["ratios"]["bytes"] == pytest.approx(
        found["original_figures"]["bytes"] / found["release_figures"]["bytes"]
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("hasty")
def test_bench_on_a_gpu_replays_graphs_and_compiles_by_block(cli: Cli, done: dict[str, Any]) -> None:
    found = cli("bench", "small@1", "--device", "cuda", "--json").json
    assert (found["way"], found["graph_error"], found["compiled_way"]) == ("CUDA graph", None, "by block")
    for side in ("release_figures", "original_figures", "bf16_figures"):
        assert set(found[side]["eager_step_ms"]) == set(found[side]["step_ms"]) == {"1", "8"}
    assert found["bf16_compiled_figures"]["eager_step_ms"] is None
    assert all(ratio > 0 for ratio in found["ratios_bf16_compiled"]["step_ms"].values())


@pytest.mark.skipif(not native.product_level(), reason="no AVX2, or nothing is compiled")
def test_show_layers_says_what_was_timed(cli: Cli, done: dict[str, Any]) -> None:
    process_timings.cache_clear()  # whatever other tests have spent
    auto, fixed = (
        [each["reason"] for each in cli("artifacts", "show", "small@1", "--layers", *words, "--json").json["layers"]]
        for words in ([], ["--backend", "cpu"])
    )
    assert any("of float32 at" in reason for reason in auto)
    assert not any("measured" in reason for reason in fixed)


def test_show_layers(cli: Cli, done: dict[str, Any]) -> None:
    found = cli("artifacts", "show", "small@1", "--layers", "--backend", "reference", "--json").json
    assert (found["release"], found["backend"]) == ("small@1", "reference")
    layers = {each["layer"]: each for each in found["layers"]}
    assert layers["conv_in"]["weight"]["bits"] == 8
    assert layers["conv_in"]["bits"] == {"weights": 8, "activations": 8}
    assert {each["backend"] for each in found["layers"]} == {"reference"}
    assert all(each["bytes"] > 0 for each in found["layers"])
    text = cli("artifacts", "show", "small@1", "--layers").out
    assert "LAYER" in text
    assert "conv_in" in text
    refused = cli("artifacts", "show", "small@1", "--layers", "--backend", "cuda")
    assert refused.code == 2
    assert "'cuda' is not one of 'auto'" in refused.err
    for words in (["--backend", "reference"], ["--device", "cpu"]):
        idle = cli("artifacts", "show", "small@1", *words)
        assert (idle.code, idle.out) == (2, "")
        assert "got one without --layers" in idle.err
    unknown = cli("artifacts", "show", "small@1", "--layers", "--device", "tpu")
    assert unknown.code == 2
    assert "device: got 'tpu'" in unknown.err


def test_report(cli: Cli, done: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert cli("report", done["job"], "--out", path, "--json").json == {"report": str(path)}
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<svg") >= 2, "steps and layers"
    for text in ("small@1", "minmax-w8a8", done["digest"], "evaluate", "DDIMScheduler", "up_blocks.0.resnets.0"):
        assert text in page, text
    assert "http://" not in page
    assert "https://" not in page
    assert cli("report", done["job"], "--out", tmp_path / "no" / "report.html").code == 2
    own = Path(cli("report", done["job"], "--json").json["report"])
    assert is_private(own.parent)


@pytest.mark.usefixtures("without_ray")
def test_report_shows_what_the_passes_did(cli: Cli, tmp_path: Path) -> None:
    model = write_model(tmp_path / "little", 0)
    passes = {
        "activations.step_bits": "{method: snr, target_mean: 6.0, choices: [4, 8]}",
        "passes.temporal": "{method: closed_form}",
        "passes.correct": "{seeds: 4, held_out_seeds: 2, shard_seeds: 3}",
    }
    words = [word for name, value in passes.items() for word in ("--set", f"{name}={value}")]
    answer = cli("run", "fast-w4a8", "--model", model, *SET, *words, "--json")
    assert answer.code == 0, answer.err
    path = tmp_path / "report.html"
    assert cli("report", answer.json["job"], "--out", path).code == 0
    page = path.read_text()
    for heading in ("Temporal features", "Activation bits by step", "Correction of the predictions"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<svg") == 5, "errors along the trajectory, layers, features, bits, correction"


@pytest.mark.usefixtures("without_ray")
def test_a_failing_job_exits_100(cli: Cli, done: dict[str, Any], home: Path) -> None:
    store = open_store(str(home / "store"))
    files = read_manifest(store, done["model_digest"])["files"]
    store.delete(files["denoiser/diffusion_pytorch_model.safetensors"]["sha256"])
    answer = cli("run", "minmax-w8a8", "--model", "digits", *SET, "--set", "sampler.num_inference_steps=3", "--json")
    assert answer.code == 100
    assert answer.json["state"] == "failed"
    assert files["denoiser/diffusion_pytorch_model.safetensors"]["sha256"] in answer.json["error"]
    assert answer.json["release"] is None
    job = answer.json["job"]
    assert cli("jobs", "wait", job).code == 100
    refused = cli("report", job)
    assert (refused.code, refused.out) == (2, "")
    assert "failed" in refused.err


@pytest.mark.ray
def test_progress_says_which_job_is_in_front(cli: Cli, done: dict[str, Any], home: Path) -> None:
    """Other jobs that are queued run as well where they come first, so a run may seem to stand still."""
    words = ["submit", "minmax-w8a8", "--model", "digits", *SET, "--json", "--set"]
    first, second = (cli(*words, f"evaluation.grid={grid}").json["job"] for grid in (2, 3))
    with closing(sqlite3.connect(home / "quantmill.db")) as database, database:
        database.execute("update jobs set state = 'running' where id = ?", (first,))
    service = open_database(f"sqlite:///{home / 'quantmill.db'}")
    lines = [
        progress_line(take_snapshot(service, open_store(str(home / "store")), job, Pacer(service, 2, dict)))
        for job in (first, second)
    ]
    assert "behind" not in lines[0]
    assert f" tasks; behind job {first}; " in lines[1]


@pytest.mark.usefixtures("without_ray")  # in this process, where serve goes on
def test_ctrl_c_gives_the_tasks_back_and_serve_goes_on(home: Path, cli: Cli, done: dict[str, Any]) -> None:
    words = ["run", "fast-w4a8", "--model", "digits", *SET, "--name", "small", "--json"]
    process = quantmill(home, *words)
    assert process.stderr is not None
    for line in process.stderr:
        if "running" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 101, err
    view = json.loads(out)
    assert view["state"] in ("queued", "running")
    assert view["tasks"]["running"] == 0
    assert "serve --drain" in err
    served = cli("serve", "--drain", "--json")
    assert (served.code, served.json["drained"]) == (0, True), served.err
    assert served.json["executed"] > 0
    assert cli("jobs", "show", view["job"], "--json").json["release"] == "small@2"
    difference = cli("artifacts", "diff", "small@1", "small@2", "--json").json
    assert difference["recipe"]["weights.bits"] == {"a": 8, "b": 4}
    assert difference["metrics"]["bytes"]["a"] > difference["metrics"]["bytes"]["b"]
    assert {"layer": "mid_block.attentions.0.to_q"}.items() <= next(
        row.items() for row in difference["layers"] if row["layer"] == "mid_block.attentions.0.to_q"
    )
    assert "weights.bits" in cli("artifacts", "diff", "small@1", "small@2").out


@pytest.mark.usefixtures("hasty")
def test_a_measurement_is_published_in_the_card_of_the_next_version(
    cli: Cli, done: dict[str, Any], tmp_path: Path
) -> None:
    versions = [each["version"] for each in cli("artifacts", "ls", "--name", "small", "--json").json]
    answer = cli("bench", "small@1", "--threads", "1", "--no-compile", "--publish", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["published"] == f"small@{max(versions) + 1}"
    folder = tmp_path / "measured"
    assert cli("artifacts", "pull", found["published"], folder).code == 0
    card = (folder / "README.md").read_text()
    assert card.index("## Speed and memory") < card.index("## Limits")
    assert "| | this model | float32 | bfloat16 |" in card
    assert json.loads((folder / "bench.json").read_text())["ratios"] == found["ratios"]
    listed = {each["version"]: each for each in cli("artifacts", "ls", "--name", "small", "--json").json}
    assert listed[max(listed)]["metrics"] == listed[1]["metrics"]
    changed = cli("artifacts", "diff", "small@1", found["published"], "--json").json
    assert not changed["layers"]
    assert not changed["recipe"]
