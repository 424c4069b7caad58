"""LoRA files, variants, shards, image sizes and prompts files of whole pipelines, through the command line."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from orchestrator.cli.main import run_cli
from tests.orchestrator.cli.test_pipelines import SET
from tests.tiny_pipelines import save_dit, save_sd
from workers.storage.manifest import pull_tree
from workers.storage.store import open_store

Cli = Callable[..., Any]
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion."""
    return save_sd(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def home_with_sd(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which it is registered; to be copied, not used."""
    folder = tmp_path_factory.mktemp("with-sd") / "home"
    assert run_cli(["--home", str(folder), "models", "add", str(sd)]) == 0
    return folder


@pytest.fixture
def with_sd(home: Path, home_with_sd: Path) -> None:
    """The test's home, with that model registered."""
    shutil.copytree(home_with_sd, home)


def save_lora(path: Path, scale: float = 1.0, *, text: bool = False, seed: int = 0) -> tuple[Path, Tensor]:
    """Write a LoRA of a layer of that UNet, and of its text encoder; return it and what it adds to the UNet's."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(4, 128, generator=generator) * scale
    up = torch.randn(64, 4, generator=generator) * 0.1
    tensors = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    if text:
        name = f"text_encoder.{TEXT_LAYER}"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 128), f"{name}.lora_B.weight": torch.ones(128, 2)}
    save_file(tensors, path)
    return path, up @ down


def weights(home: Path, digest: str, folder: Path) -> dict[str, Tensor]:
    """Return the UNet's weights of a model in the store."""
    if not folder.exists():
        pull_tree(open_store(str(home / "store")), digest, folder)
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def draw(folder: Path, prompt: str, seed: int, **more: Any) -> np.ndarray[Any, Any]:
    """Draw a sample as the evaluation does."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    told = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np", **more}
    images: np.ndarray[Any, Any] = pipeline(prompt, generator=torch.Generator().manual_seed(seed), **told).images[0]
    return images


def psnr_db(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(-10 * np.log10(np.square(one - other).mean()))


def test_loras_are_fused_and_recorded(cli: Cli, home: Path, sd: Path, with_sd: None, tmp_path: Path) -> None:
    one, added = save_lora(tmp_path / "one.safetensors", text=True)
    two, more = save_lora(tmp_path / "two.safetensors", seed=1)
    answer = cli("models", "add", sd, "--lora", one, "--lora", f"{two}:-0.5", "--name", "both", "--json")
    assert answer.code == 0, answer.err
    fused = answer.json
    assert [(each["file"], each["scale"]) for each in fused["loras"]] == [
        ("one.safetensors", 1),
        ("two.safetensors", -0.5),
    ]
    (base,) = (row for row in cli("models", "ls", "--json").json if row["name"] == "sd")
    assert fused["digest"] != base["digest"]
    before, after = (weights(home, row["digest"], tmp_path / row["name"]) for row in (base, fused))
    want = before[f"{LAYER}.weight"].float() + added - 0.5 * more
    assert after[f"{LAYER}.weight"].dtype is torch.float16
    torch.testing.assert_close(after[f"{LAYER}.weight"].float(), want, atol=2e-3, rtol=2e-3)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{LAYER}.weight"}
    texts = [load_file(tmp_path / name / "text_encoder" / "model.safetensors") for name in ("sd", "both")]
    changed = [name for name in texts[0] if not torch.equal(texts[0][name], texts[1][name])]
    assert len(changed) == 1
    assert changed[0].endswith("encoder.layers.0.self_attn.q_proj.weight")
    assert json.loads((tmp_path / "both" / "loras.json").read_text()) == [
        {"scale": each["scale"], "sha256": each["sha256"]} for each in fused["loras"]
    ]
    # what diffusers itself makes of it
    pipeline = StableDiffusionPipeline.from_pretrained(sd, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        pipeline.load_lora_weights(tmp_path, weight_name="one.safetensors", adapter_name="one")
        pipeline.load_lora_weights(tmp_path, weight_name="two.safetensors", adapter_name="two")
    pipeline.set_adapters(["one", "two"], [1.0, -0.5])
    ours = DiffusionPipeline.from_pretrained(tmp_path / "both", dtype=torch.float32)
    images = []
    for each in (pipeline, ours):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        told = {"num_inference_steps": 2, "output_type": "np", "height": 64, "width": 64}
        images.append(each("owl", generator=generator, **told).images[0])
    assert float(np.abs(images[0] - images[1]).max()) < 0.02
    # the same again is the same model, whatever it is called by
    again = cli("models", "add", "sd", "--lora", one, "--lora", f"{two}:-0.5", "--json")
    assert again.json["digest"] == fused["digest"]
    shown = cli("models", "show", "both").out
    assert "one.safetensors, scale 1, sha256" in shown


def test_a_job_with_a_lora_tells_it_in_its_release(cli: Cli, sd: Path, tmp_path: Path, without_ray: None) -> None:
    lora, _ = save_lora(tmp_path / "style.safetensors", 2.0)
    (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
    words = ["--prompts", tmp_path / "prompts.txt", *SET, "--lora", f"{lora}:0.8"]
    dry = cli("submit", "minmax-w8a8", "--model", sd, *words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert cli("models", "ls", "--json").json == []
    answer = cli("run", "minmax-w8a8", "--model", sd, *words, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["model"] == "sd-style"
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    (told,) = provenance["model"]["loras"]
    assert (told["file"], told["scale"]) == ("style.safetensors", 0.8)
    (row,) = cli("models", "ls", "--json").json
    assert provenance["inputs"]["model"] == [row["digest"]]
    cached = cli("submit", "minmax-w8a8", "--model", sd, *words, "--dry-run", "--json").json
    assert cached["tasks"]["queued"] == 0
    plain = cli("submit", "minmax-w8a8", "--model", sd, *words[:-2], "--dry-run", "--json").json
    assert plain["tasks"]["cached"] == 0


@pytest.mark.usefixtures("with_sd", "without_ray")
@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_a_lora_of_a_text_encoder_alone_is_in_the_release(cli: Cli, sd: Path, tmp_path: Path, layout: str) -> None:
    first, second = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)), torch.ones(128, 2)
    name = f"text_encoder.{TEXT_LAYER}"
    tensors = {f"{name}.lora_A.weight": first, f"{name}.lora_B.weight": second}
    if layout == "kohya":  # of a query alone, by which diffusers cannot tell this layout
        name = f"lora_te_{TEXT_LAYER.replace('.', '_')}"
        tensors = {f"{name}.lora_down.weight": first, f"{name}.lora_up.weight": second, f"{name}.alpha": torch.ones(())}
    save_file(tensors, tmp_path / "words.safetensors")
    (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
    words = ["--prompts", tmp_path / "prompts.txt", *SET, "--lora", tmp_path / "words.safetensors"]
    answer = cli("run", "minmax-w8a8", "--model", sd, *words, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (sd, tmp_path / "out"))
    (changed,) = (name for name in before if not torch.equal(before[name], after[name]))
    assert changed.endswith("encoder.layers.0.self_attn.q_proj.weight")
    added = second @ first * (0.5 if layout == "kohya" else 1.0)
    torch.testing.assert_close(after[changed].float(), before[changed].float() + added, atol=5e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.safetensors", "--lora: got nowhere.safetensors, wanted a safetensors file that exists"),
        ("GOOD:much", "--lora: got scale 'much', wanted a number"),
        ("GOOD:1000", "--lora: got scale '1000', wanted a number"),
        ("OTHER", "wanted"),
        ("PART", "got a file for 2 layers, 1 of which its loader does not find in StableDiffusionPipeline"),
        ("TEXT", "wanted a safetensors file that exists"),
        ("NAN", "nan.safetensors"),
        ("EMPTY", "empty.safetensors without a tensor, wanted a LoRA"),
    ],
)
def test_files_that_are_no_loras_of_the_model_are_refused(
    cli: Cli, sd: Path, tmp_path: Path, text: str, message: str
) -> None:
    good, _ = save_lora(tmp_path / "good.safetensors")
    (tmp_path / "text.txt").write_text("a")
    name = "unet.nowhere.at_all"
    other = {f"{name}.lora_A.weight": torch.ones(1, 3), f"{name}.lora_B.weight": torch.ones(3, 1)}
    save_file(other, tmp_path / "other.safetensors")
    save_file({"unet.x.lora_A.weight": torch.full((1, 3), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    save_file(load_file(good) | other, tmp_path / "part.safetensors")
    places = {"GOOD": good, "TEXT": tmp_path / "text.txt"}
    places |= {name.upper(): tmp_path / f"{name}.safetensors" for name in ("part", "other", "nan", "empty")}
    name, colon, scale = text.partition(":")
    answer = cli("models", "add", sd, "--lora", f"{places.get(name, name)}{colon}{scale}")
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert cli("models", "ls", "--json").json == []


def test_a_lora_for_a_bare_denoiser_is_refused(cli: Cli, with_digits: Path, tmp_path: Path) -> None:
    lora, _ = save_lora(tmp_path / "style.safetensors")
    answer = cli("submit", "fast-w4a8", "--model", "digits", "--lora", lora)
    assert (answer.code, answer.out) == (2, "")
    assert "--lora: got it for model digits, a bare denoiser" in answer.err


@pytest.fixture(scope="module")
def sharded(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same saved in shards, as a variant, in bfloat16."""
    folder = tmp_path_factory.mktemp("sharded") / "sharded"
    pipeline = StableDiffusionPipeline.from_pretrained(sd, dtype=torch.bfloat16)
    pipeline.save_pretrained(folder, variant="bf16", max_shard_size="500KB")
    return folder


@pytest.mark.slow
def test_a_variant_in_shards_is_quantized_and_takes_a_lora(
    cli: Cli, home: Path, sharded: Path, tmp_path: Path, without_ray: None
) -> None:
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    lora, added = save_lora(tmp_path / "style.safetensors")
    (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
    words = ["--prompts", tmp_path / "prompts.txt", *SET, "--lora", lora, "--out", tmp_path / "out", "--json"]
    answer = cli("run", "minmax-w8a8", "--model", sharded, *words)
    assert answer.code == 0, answer.err
    pull_tree(open_store(str(home / "store")), cli("models", "ls", "--json").json[0]["digest"], tmp_path / "fused")
    files = sorted((tmp_path / "fused" / "unet").glob("*.safetensors"))
    assert len(files) > 1
    after = {name: tensor for path in files for name, tensor in load_file(path).items()}
    before = {
        name: tensor for path in (sharded / "unet").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert after[f"{LAYER}.weight"].dtype is torch.bfloat16
    want = before[f"{LAYER}.weight"].float() + added
    torch.testing.assert_close(after[f"{LAYER}.weight"].float(), want, atol=1e-2, rtol=1e-2)
    DiffusionPipeline.from_pretrained(tmp_path / "out")


class TestSizes:
    """--size, and sizes, seeds and negative prompts of a prompts file."""

    @pytest.mark.usefixtures("with_sd", "without_ray")
    def test_a_job_of_another_size(self, cli: Cli, sd: Path, tmp_path: Path) -> None:
        (tmp_path / "prompts.txt").write_text("red heart\nowl\n")
        words = ["run", "minmax-w8a8", "--model", "sd", "--prompts", tmp_path / "prompts.txt", *SET]
        answer = cli(*words, "--size", "32x48", "--out", tmp_path / "out", "--json")
        assert answer.code == 0, answer.err
        assert answer.json["metrics"]["sampler"]["arguments"] == {"height": 32, "width": 48}
        # and the figures are of that size: all three seeds are told the second line
        told = {"height": 32, "width": 48}
        images = [draw(folder, "owl", seed, **told) for folder in (sd, tmp_path / "out") for seed in range(3)]
        assert images[0].shape == (32, 48, 3)
        psnr = np.mean([psnr_db(one, other) for one, other in zip(images[:3], images[3:], strict=True)])
        assert answer.json["metrics"]["psnr_db"] == pytest.approx(psnr, abs=0.05)

    def test_estimates_go_by_the_size(self, cli: Cli, with_sd: None) -> None:
        words = ["submit", "minmax-w8a8", "--model", "sd", "--dry-run", "--json"]
        small, large = (cli(*words, "--size", size).json["kinds"] for size in ("64", "128"))
        for kind in ("reference", "evaluate", "calibrate"):
            assert large[kind]["estimated_cpu_seconds"] > 2 * small[kind]["estimated_cpu_seconds"]

    def test_a_size_where_the_call_takes_none_is_refused(self, cli: Cli, tmp_path: Path) -> None:
        assert cli("models", "add", save_dit(tmp_path / "dit")).code == 0
        answer = cli("submit", "fast-w4a8", "--model", "dit", "--size", "32")
        assert (answer.code, answer.out) == (2, "")
        assert "got height, width, wanted what the call of model dit (DiTPipeline) takes" in answer.err

    @pytest.mark.parametrize("size", ["0", "64x", "x64", "64x64x3", "-1", "large"])
    def test_what_is_no_size_is_refused(self, cli: Cli, sd: Path, size: str) -> None:
        answer = cli("submit", "fast-w4a8", "--model", sd, "--size", size)
        assert (answer.code, answer.out) == (2, "")
        assert "wanted pixels above 0, or height and width as in 512x768" in answer.err

    @pytest.mark.usefixtures("with_sd", "without_ray")
    @pytest.mark.parametrize("form", ["tsv", pytest.param("jsonl", marks=pytest.mark.slow)])
    def test_lines_have_a_size_a_seed_and_a_negative_prompt(
        self, cli: Cli, sd: Path, tmp_path: Path, form: str
    ) -> None:
        rows = [("red heart", "blue", 7, "32x48"), ("owl", "red", 8, "32x48"), ("cat", "", 9, "32x48")]
        rows.append(rows[1])
        keys = ("prompt", "negative_prompt", "seed", "size")
        path = tmp_path / f"prompts.{form}"
        if form == "tsv":
            path.write_text("\n".join("\t".join(map(str, row)) for row in (keys, *rows)) + "\n")
        else:
            path.write_text("\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows) + "\n")
        words = ["run", "minmax-w8a8", "--model", "sd", "--prompts", path, *SET]
        words += ["--set", "evaluation.seeds=2", "--out", tmp_path / "out"]
        answer = cli(*words, "--json")
        assert answer.code == 0, answer.err
        # the second and the fourth line are the evaluation's: the same one, with a seed of its own
        told = {"negative_prompt": "red", "height": 32, "width": 48}
        one, other = (draw(folder, "owl", 8, **told) for folder in (sd, tmp_path / "out"))
        assert one.shape == (32, 48, 3)
        assert answer.json["metrics"]["psnr_db"] == pytest.approx(psnr_db(one, other), abs=0.05)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("prompt\tsize\na\t64\nb\t32\n", "got sizes 32x32, 64x64, wanted the same in every line"),
            ("prompt\tsize\na\t64\nb\t\n", "got sizes none, 64x64, wanted the same in every line"),
            ('{"prompt": "a", "size": "big"}\n', "size: got 'big', wanted pixels above 0"),
            ('{"prompt": "a", "seed": -1}\n', "got seed '-1', wanted a number from 0"),
            ("prompt\tsiz\na\t64\n", "and columns of numbers are class_label, seed and size"),
            ("prompt\tsiz\na\tbig\n", "got columns siz in "),
        ],
    )
    def test_lines_that_do_not_fit_are_refused(
        self, cli: Cli, with_sd: None, tmp_path: Path, text: str, message: str
    ) -> None:
        (tmp_path / "prompts").write_text(text)
        answer = cli("submit", "fast-w4a8", "--model", "sd", "--prompts", tmp_path / "prompts")
        assert (answer.code, answer.out) == (2, "")
        assert message in answer.err
