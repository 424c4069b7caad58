"""Whole pipelines, end to end through the command line: from prompts to a release that is a pipeline."""

from __future__ import annotations

import copy
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file

import quant_core
from orchestrator.cli.main import run_cli
from orchestrator.prompts.choose import NEUTRAL, neutral_digest
from quant_core.errors import ArtifactError, UnknownTimestepError
from quant_core.nn.layers import QuantLayer
from quant_spec.errors import QuantizationError
from tests.backbones import save_weights
from tests.orchestrator.in_process import InProcess
from tests.tiny_families import save_clip
from tests.tiny_pipelines import EMOJI_SD, save_dit, save_sd, save_sd3
from workers.storage.manifest import read_files
from workers.storage.store import open_store

Cli = Callable[..., Any]
PROMPTS = "red heart\nred apple\nowl\nblue car\n"
SMALL = {
    "sampler.num_inference_steps": "3",
    "sampler.guidance_scale": "4",
    "calibration.seeds": "2",
    "evaluation.seeds": "3",
    "evaluation.shard_seeds": "2",
    "evaluation.sqnr_seeds": "1",
    "evaluation.grid": "2",
}
SET = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
#: Digest of the small shipped denoiser, which is no pipeline.
DIGITS = "a7fae3650d87c8461fa8350c5582b0c317c984829d962306a1ec15428fa7a99c"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which the three pipelines are registered and one job each is done, and their releases."""
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "labels.txt").write_text("0\n2\n")
    save_dit(folder / "dit")
    save_sd3(folder / "sd3")
    save_sd(folder / "sd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        home = ["--home", str(folder / "home")]
        for name, told in {"sd": "prompts.txt", "sd3": "prompts.txt", "dit": "labels.txt"}.items():
            assert run_cli([*home, "models", "add", str(folder / name)]) == 0
            words = ["run", "minmax-w8a8", "--model", name, "--prompts", str(folder / told), *SET]
            assert run_cli([*home, *words, "--out", str(folder / f"{name}-release")]) == 0
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the jobs ran; the folder of the releases."""
    shutil.copytree(made / "home", home)
    return made


@pytest.fixture(scope="module")
def pipeline(made: Path) -> Any:
    """The release of sd, as a user loads it."""
    loaded = DiffusionPipeline.from_pretrained(made / "sd-release")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(
    pipeline: Any, steps: int = 3, *, prompt: str = "red apple", seed: int = 0, **more: Any
) -> np.ndarray[Any, Any]:
    """Draw one sample as an evaluation does: of seed 0 it told the second line, of the evaluation's part."""
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray[Any, Any] = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        **more,
    ).images[0]
    return images


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Return the greatest difference of two images in [0, 1]."""
    return float(np.abs(one - other).max())


def test_models_add_shows_components_and_what_is_quantized(cli: Cli) -> None:
    answer = cli("models", "add", EMOJI_SD)
    lines = {line.split()[0]: line for line in answer.out.splitlines() if line}
    assert lines["model"].startswith("model emoji-sd (StableDiffusionPipeline, UNet2DConditionModel), digest ")
    assert lines["unet"].endswith("quantized")
    assert "6.08M" in lines["unet"]
    for name in ("scheduler", "tokenizer", "vae"):
        assert lines[name].endswith("as it is")
    assert lines["text_encoder"].endswith("as it is, unless components.text_encoder")
    view = cli("models", "ls", "--json").json[0]
    assert view["pipeline"] == "StableDiffusionPipeline"
    assert [part["name"] for part in view["components"] if part["quantized"]] == ["unet"]


def test_a_bare_denoiser_keeps_its_digest(cli: Cli, digits: Path) -> None:
    assert cli("models", "add", digits, "--json").json["digest"] == DIGITS


def test_a_job_measures_pixels_and_names_the_worst_prompts(cli: Cli, used: Path) -> None:
    metrics = cli("artifacts", "show", "sd-minmax-w8a8", "--json").json["metrics"]
    assert metrics["samples"] == "pixels"
    assert 10 < metrics["psnr_db"] < 60
    assert 0 < metrics["ssim"] <= 1
    assert metrics["latent_sqnr_db"] > 5
    assert len(metrics["sqnr_db_per_step"]) == 3
    worst = metrics["worst_prompts"]
    assert [each["psnr_db"] for each in worst] == sorted(each["psnr_db"] for each in worst)
    # seeds 0, 1, 2 are told the second and the fourth line
    assert metrics["shown_prompts"] == ["red apple", "blue car"]
    assert {(each["seed"], each["prompt"]) for each in worst} <= {(0, "red apple"), (1, "blue car"), (2, "red apple")}
    assert metrics["prompts"]["part"] == "evaluation"
    assert metrics["sampler"]["guidance_scale"] == 4


def test_clip_scores_lpips_and_the_worst_pictures_on_request(
    cli: Cli, used: Path, tmp_path: Path, without_ray: None
) -> None:
    words = ["run", "minmax-w8a8", "--model", "sd", "--prompts", used / "prompts.txt", *SET]
    weights = save_weights(tmp_path / "alexnet.pth")
    asked = ["--set", f"evaluation.clip={save_clip(tmp_path / 'clip')}", "--set", "evaluation.shown=worst"]
    asked += ["--set", f"evaluation.lpips={weights}"]
    answer = cli(*words, *asked, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["tasks"]["succeeded"] - answer.json["tasks"]["cached"] == 2  # score and release alone
    metrics = answer.json["metrics"]
    assert 0 <= metrics["clip_score"] <= 100
    assert metrics["clip_score"] == pytest.approx(metrics["clip_score_full_precision"], abs=20)
    assert metrics["lpips"] > 0
    assert metrics["lpips_network"] == "alex"
    assert metrics["shown_seeds"] == [each["seed"] for each in metrics["worst_prompts"]]
    assert metrics["shown_prompts"] == [each["prompt"] for each in metrics["worst_prompts"]]
    assert cli("report", answer.json["job"], "--out", tmp_path / "report.html").code == 0
    report = (tmp_path / "report.html").read_text()
    assert "".join(f"<span>{seed}</span>" for seed in metrics["shown_seeds"]) in report
    assert "CLIP score" in report
    assert "LPIPS" in report
    shown = cli("jobs", "show", answer.json["job"]).out
    assert f"{metrics['lpips']:.4f} ± {metrics['lpips_ci95']:.4f} (alex)" in shown
    assert f"{metrics['clip_score']:.2f}, full precision {metrics['clip_score_full_precision']:.2f}" in shown
    assert cli("artifacts", "pull", answer.json["release"], tmp_path / "pulled").code == 0
    assert f"| LPIPS, alex | {metrics['lpips']:.4f}" in (tmp_path / "pulled" / "README.md").read_text()
    for model, value, message in (
        ("dit", f"clip={tmp_path / 'clip'}", "evaluation.clip: got a model for dit, whose samples have no prompts"),
        ("sd", f"clip={used}", "evaluation.clip: got"),
        ("sd", f"lpips={used}", "evaluation.lpips: got"),
        ("sd", "lpips=/no/such", "evaluation.lpips: got /no/such (No such file or directory), wanted a readable file"),
    ):
        answer = cli("submit", "minmax-w8a8", "--model", model, "--set", f"evaluation.{value}")
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err


@pytest.mark.parametrize("name", ["sd", "sd3", "dit"])
def test_a_release_is_a_pipeline_whose_other_components_are_the_models_blobs(
    cli: Cli, used: Path, home: Path, name: str
) -> None:
    store = open_store(str(home / "store"))
    release = read_files(store, cli("artifacts", "show", f"{name}-minmax-w8a8", "--json").json["digest"])
    (model,) = (row for row in cli("models", "ls", "--json").json if row["name"] == name)
    original = read_files(store, model["digest"])
    quantized = "unet" if name == "sd" else "transformer"
    for path, entry in original.items():
        if path.partition("/")[0] not in (quantized, "scheduler", "model_index.json"):
            assert release[path] == entry
    assert (
        release[f"{quantized}/diffusion_pytorch_model.safetensors"][1]
        < 0.8 * original[f"{quantized}/diffusion_pytorch_model.safetensors"][1]
    )


def test_a_release_draws_what_its_evaluation_measured(made: Path, pipeline: Any) -> None:
    full, packed = (
        DiffusionPipeline.from_pretrained(made / name, dtype=torch.float32) for name in ("sd", "sd-release")
    )
    worst = json.loads((made / "sd-release" / "metrics.json").read_text())["worst_prompts"][0]
    told = {"prompt": worst["prompt"], "seed": worst["seed"]}
    difference = draw(packed, **told) - draw(full, **told)
    assert -10 * np.log10(np.square(difference).mean()) == pytest.approx(worst["psnr_db"], abs=0.05)
    image = draw(packed)
    # without a dtype, what encodes text is in the checkpoint's, float16: the original does not even run so
    assert pipeline.text_encoder.dtype is torch.float16
    assert np.square(draw(pipeline) - image).mean() < 0.02
    assert any(isinstance(module, QuantLayer) for module in pipeline.unet.modules())


@pytest.mark.parametrize("name", ["sd3", "dit"])
def test_other_families_load_and_draw(made: Path, name: str) -> None:
    loaded = DiffusionPipeline.from_pretrained(made / f"{name}-release")
    loaded.set_progress_bar_config(disable=True)
    assert any(isinstance(module, QuantLayer) for module in loaded.transformer.modules())
    told = {"class_labels": [2]} if name == "dit" else {"prompt": "owl"}
    images = loaded(**told, num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_another_number_of_steps_is_named(pipeline: Any) -> None:
    with pytest.raises(
        UnknownTimestepError, match=r"this UNet2DConditionModel was calibrated on.*num_inference_steps=3"
    ):
        draw(pipeline, steps=5)


def test_denoiser_only_is_the_form_that_load_quantized_takes(cli: Cli, used: Path, tmp_path: Path) -> None:
    assert cli("artifacts", "pull", "sd-minmax-w8a8", tmp_path / "unet", "--denoiser-only").code == 0
    assert not (tmp_path / "unet" / "vae").exists()
    alone = quant_core.load_quantized(tmp_path / "unet", backend="reference")
    whole = quant_core.load_quantized(used / "sd-release", backend="reference")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


def test_sigmas_of_ones_own_are_named_where_steps_alone_give_others(
    cli: Cli, used: Path, tmp_path: Path, without_ray: None
) -> None:
    told = {"sigmas": [1.0, 0.6, 0.3], "max_sequence_length": 16}
    words = ["--prompts", used / "prompts.txt", *SET, "--set", "sampler.num_inference_steps=20"]
    words += ["--set", f"sampler.arguments={json.dumps(told)}", "--out", tmp_path / "out"]
    answer = cli("run", "minmax-w8a8", "--model", "sd3", *words)
    assert answer.code == 0, answer.err
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    with pytest.raises(UnknownTimestepError, match=r"num_inference_steps=20, and with what else its README.md calls"):
        draw(loaded, 20, height=16, width=16, max_sequence_length=16)
    assert draw(loaded, 20, height=16, width=16, **told).shape == (16, 16, 3)


def test_denoiser_only_of_a_bare_release_is_refused(
    cli: Cli, used: Path, tmp_path: Path, without_ray: None, digits: Path
) -> None:
    words = [word for name, value in SMALL.items() if "guidance" not in name for word in ("--set", f"{name}={value}")]
    assert cli("run", "minmax-w8a8", "--model", digits, *words).code == 0
    answer = cli("artifacts", "pull", "digits-minmax-w8a8", tmp_path / "out", "--denoiser-only")
    assert (answer.code, (tmp_path / "out").exists()) == (2, False)
    assert "which is a denoiser alone" in answer.err


@pytest.mark.parametrize("layout", ["diffusers", "dequantized"])
def test_an_export_is_a_pipeline_too(cli: Cli, used: Path, tmp_path: Path, layout: str) -> None:
    answer = cli("artifacts", "export", "dit-minmax-w8a8", "--out", tmp_path / "out", "--format", layout)
    assert answer.code == 0, answer.err
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    is_packed = any(isinstance(module, QuantLayer) for module in loaded.transformer.modules())
    assert is_packed == (layout == "diffusers")
    images = loaded(class_labels=[2], num_inference_steps=3, guidance_scale=4.0, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_card_and_report_show_prompts_and_the_pipelines_call(cli: Cli, used: Path, tmp_path: Path) -> None:
    card = (used / "sd-release" / "README.md").read_text()
    assert "A StableDiffusionPipeline whose UNet2DConditionModel is quantized" in card
    assert 'pipeline = DiffusionPipeline.from_pretrained("FOLDER")' in card
    assert "num_inference_steps=3, guidance_scale=4.0" in card
    job = cli("jobs", "ls", "--json").json
    name = next(each["job"] for each in job if each["model"] == "sd")
    assert cli("report", name, "--out", tmp_path / "report.html").code == 0
    report = (tmp_path / "report.html").read_text()
    assert '<div class="prompts"><span>red apple</span><span>blue car</span></div>' in report
    assert "Prompts farthest from full precision" in report


def test_a_dry_run_counts_encoding_and_decoding(cli: Cli, used: Path) -> None:
    few = ["--set", "evaluation.seeds=3", "--set", "sampler.num_inference_steps=3"]
    found = cli(
        "submit", "fast-w4a8", "--model", "sd", *few, "--set", "evaluation.seeds=256", "--dry-run", "--json"
    ).json
    assert found["kinds"]["reference"]["estimated_cpu_seconds"] > 0
    inspection = cli("models", "show", "sd", "--json").json["inspection"]["pipeline"]
    assert inspection["decode_gmacs"] == pytest.approx(0.793, abs=0.01)
    assert inspection["encode_gmacs"] > 0


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        (
            "sd",
            ["--set", "sampler.arguments={strength: 1}"],
            "sampler.arguments: got strength, wanted what the call of",
        ),
        (
            "sd",
            ["--set", "sampler.arguments={prompt: a}"],
            "sampler.arguments: got prompt, wanted the recipe's own field",
        ),
        ("sd", ["--set", "sampler.null_class=1"], "sampler.null_class: got 1 for model sd"),
        ("sd", ["--prompts", "LABELS"], "prompts: got class labels in"),
        ("dit", ["--prompts", "PROMPTS"], "prompts: got prompts in"),
        ("dit", ["--prompts", "FAR"], "prompts: got class label 5000 in"),
        ("sd", ["--prompts", "NOWHERE"], "prompts: "),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_at_submit(
    cli: Cli, used: Path, home: Path, tmp_path: Path, model: str, words: list[str], message: str
) -> None:
    (tmp_path / "far.txt").write_text("0\n5000\n")
    places = {
        "LABELS": str(used / "labels.txt"),
        "PROMPTS": str(used / "prompts.txt"),
        "FAR": str(tmp_path / "far.txt"),
        "NOWHERE": str(tmp_path / "nowhere.txt"),
    }
    before = len(cli("jobs", "ls", "--json").json)
    answer = cli("submit", "fast-w4a8", "--model", model, *(places.get(word, word) for word in words))
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert len(cli("jobs", "ls", "--json").json) == before


def test_prompts_of_a_bare_denoiser_are_refused(cli: Cli, with_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--prompts", tmp_path / "prompts.txt")
    assert (answer.code, answer.out) == (2, "")
    assert "prompts: got a file for model digits, which is told no prompts" in answer.err


def test_without_a_file_the_shipped_prompts_are_recorded_by_digest(cli: Cli, used: Path, home: Path) -> None:
    answer = cli("submit", "fast-w4a8", "--model", "sd", "--json")
    assert answer.code == 0, answer.err
    assert open_store(str(home / "store")).get_bytes(neutral_digest()) == NEUTRAL.read_bytes()
    with sqlite3.connect(home / "quantmill.db") as connection:
        ((recipe,),) = connection.execute("SELECT recipe FROM jobs WHERE id = ?", (answer.json["job"],)).fetchall()
    connection.close()
    assert json.loads(recipe)["prompts"] == neutral_digest()
    assert json.loads(recipe)["sampler"]["guidance_scale"] == 7.5  # the default of its call


class TestWhatUsersDoWithAPipeline:
    """Each works, or is refused with a reason; nothing is silently unquantized."""

    @pytest.fixture
    def fresh(self, made: Path) -> Any:
        loaded = DiffusionPipeline.from_pretrained(made / "sd-release")
        loaded.set_progress_bar_config(disable=True)
        return loaded

    def test_moving_it(self, fresh: Any, pipeline: Any) -> None:
        assert difference(draw(fresh.to("cpu")), draw(pipeline)) == 0

    def test_bfloat16(self, made: Path, pipeline: Any) -> None:
        loaded = DiffusionPipeline.from_pretrained(made / "sd-release", dtype=torch.bfloat16)
        loaded.set_progress_bar_config(disable=True)
        assert any(isinstance(module, QuantLayer) for module in loaded.unet.modules())
        image = draw(loaded)
        assert np.square(image - draw(pipeline)).mean() < 0.02

    def test_bfloat16_of_a_transformer_whose_weights_are_all_packed(self, made: Path, tmp_path: Path) -> None:
        loaded = DiffusionPipeline.from_pretrained(made / "sd3-release", dtype=torch.bfloat16)
        assert not [name for name in loaded.transformer.state_dict() if "computes" in name]
        assert loaded.transformer.dtype == torch.bfloat16
        image = draw(loaded, height=16, width=16, max_sequence_length=16)
        loaded.save_pretrained(tmp_path / "again")
        again = DiffusionPipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
        assert difference(draw(again, height=16, width=16, max_sequence_length=16), image) == 0
        assert difference(draw(copy.deepcopy(again), height=16, width=16, max_sequence_length=16), image) == 0

    def test_saving_and_loading_it_again(self, fresh: Any, pipeline: Any, tmp_path: Path) -> None:
        fresh.save_pretrained(tmp_path / "again")
        again = DiffusionPipeline.from_pretrained(tmp_path / "again")
        again.set_progress_bar_config(disable=True)
        assert difference(draw(again), draw(pipeline)) == 0

    def test_attention_slicing_is_refused_where_matmuls_are_quantized(self, fresh: Any, pipeline: Any) -> None:
        fresh.enable_attention_slicing()
        with pytest.raises(QuantizationError, match="got processor SlicedAttnProcessor, which does not call"):
            draw(fresh)
        fresh.disable_attention_slicing()
        assert difference(draw(fresh), draw(pipeline)) == 0

    def test_the_default_processor_is_refused_where_it_multiplies_by_itself(self, fresh: Any, pipeline: Any) -> None:
        with pytest.raises(ArtifactError, match="set_default_attn_processor: got a packed model"):
            fresh.unet.set_default_attn_processor()
        assert difference(draw(fresh), draw(pipeline)) == 0

    def test_attention_backends_are_those_whose_matmuls_are_quantized(self, fresh: Any, pipeline: Any) -> None:
        with pytest.raises(ArtifactError, match=r"set_attention_backend: got 'flex' .* \(native, "):
            fresh.unet.set_attention_backend("flex")
        for backend in ("_native_math", "native"):
            fresh.unet.set_attention_backend(backend)
            assert difference(draw(fresh), draw(pipeline)) < 1e-3

    def test_group_offloading_works(self, fresh: Any, pipeline: Any) -> None:
        cpu = torch.device("cpu")
        for kind in ("leaf_level", "block_level"):
            again = copy.deepcopy(fresh)
            blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            again.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
            assert difference(draw(again), draw(pipeline)) == 0

    def test_another_processor_is_quantized_too(self, fresh: Any, pipeline: Any) -> None:
        fresh.unet.set_attn_processor(AttnProcessor2_0())
        assert difference(draw(fresh), draw(pipeline)) == 0
        assert all("Quantized" in type(each).__name__ for each in fresh.unet.attn_processors.values())

    def test_fusing_projections_is_refused(self, fresh: Any, pipeline: Any) -> None:
        with pytest.raises(ArtifactError, match="fuse_qkv_projections: got a packed model"):
            fresh.unet.fuse_qkv_projections()
        assert difference(draw(fresh), draw(pipeline)) == 0

    def test_fusing_projections_of_the_pipeline_is_refused(self, fresh: Any, pipeline: Any) -> None:
        with pytest.raises(ArtifactError, match="fuse_qkv_projections: got a packed model"):
            fresh.fuse_qkv_projections()

    def test_casting_it_is_refused(self, fresh: Any, pipeline: Any) -> None:
        with pytest.raises(ValueError, match=r"Casting a quantized model .* use the `torch_dtype` argument"):
            fresh.to(torch.bfloat16)

    def test_every_other_cast_is_refused_before_it_begins(self, fresh: Any, pipeline: Any) -> None:
        narrow = torch.empty(0, dtype=torch.float16)
        for cast in (
            lambda model: model.double(),
            lambda model: model.bfloat16(),
            lambda model: model.type(torch.float16),
            lambda model: model.to(narrow),
            lambda model: copy.deepcopy(model).double(),
        ):
            with pytest.raises(ArtifactError, match=r"cast: got torch\.\w+ for a packed UNet2D.*wanted torch_dtype"):
                cast(fresh.unet)
        assert difference(draw(fresh), draw(pipeline)) == 0

    def test_an_adapter_is_refused(self, fresh: Any, pipeline: Any) -> None:
        for name in ("load_lora_adapter", "add_adapter"):
            with pytest.raises(ArtifactError, match=f"{name}: got a packed model.* wanted the LoRA fused into"):
                getattr(fresh.unet, name)({})
        assert difference(draw(fresh), draw(pipeline)) == 0

    def test_offloading_needs_an_accelerator(self, fresh: Any) -> None:
        if torch.cuda.is_available():
            fresh.enable_model_cpu_offload()
            assert np.isfinite(draw(fresh)).all()
            return
        with pytest.raises(RuntimeError, match="requires accelerator"):
            fresh.enable_model_cpu_offload()

    def test_a_lora_is_refused(self, fresh: Any, tmp_path: Path) -> None:
        down, up = torch.zeros(4, 128), torch.zeros(64, 4)
        name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
        # without PEFT, diffusers refuses before it asks the model
        with pytest.raises((ArtifactError, ValueError), match=r"load_lora_adapter: got a packed model|PEFT backend is"):
            fresh.load_lora_weights(tmp_path, weight_name="lora.safetensors")
