"""Releases in other tools' formats, from the command line to what those tools' loaders make of the files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig, SD3Transformer2DModel
from diffusers.quantizers.gguf.utils import GGUFLinear
from safetensors.torch import load_file

import quant_core  # noqa: F401  # registers the method
from orchestrator.cli.main import run_cli
from quant_core.artifact.dequantize import dequantized_state
from quant_core.nn.layers import QuantLayer
from tests.orchestrator.cli.test_pipelines import SET, difference, draw
from tests.orchestrator.in_process import InProcess
from tests.tiny_pipelines import save_sd3

Cli = Callable[..., Any]
GGUF, WEIGHTS = "transformer/diffusion_pytorch_model.gguf", "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a home in which a small pipeline's releases are, and these releases."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "prompts.txt").write_text("red heart\nred apple\nowl\nblue car\n")
    save_sd3(folder / "sd3", head_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.actions.execution.RayExecutor.start", lambda *_, **__: InProcess())
        for recipe in ("gguf-w4", "fp8-w8a8", "weights-w8"):
            told = ["--prompts", str(folder / "prompts.txt"), "--out", str(folder / recipe), "--name", recipe]
            told += ["--set", "weights.symmetric=true"] if recipe == "weights-w8" else []
            words = ["run", recipe, "--model", str(folder / "sd3"), *told, *SET]
            assert run_cli(["--home", str(folder / "home"), *words]) == 0
    return folder


@pytest.fixture
def used(made: Path, home: Path) -> Path:
    """The test's home: a copy of that in which the jobs ran; the folder of the releases."""
    shutil.copytree(made / "home", home)
    return made


@pytest.mark.parametrize("form", ["gguf", "comfy-gguf"])
def test_diffusers_draws_with_an_exported_gguf(form: str, cli: Cli, used: Path, tmp_path: Path) -> None:
    answer = cli("artifacts", "export", "gguf-w4", "--format", form, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    transformer = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "out" / GGUF),
        config=str(tmp_path / "out"),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    blocks = [module for module in transformer.modules() if isinstance(module, GGUFLinear)]
    joined = 8 if form == "comfy-gguf" else 0  # queries, keys and values of two blocks are four tensors, not twelve
    assert answer.json["types"]["Q4_1"] + answer.json["types"]["Q8_0"] == len(blocks) - joined > 20
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", transformer=transformer, dtype=torch.float32)
    release = DiffusionPipeline.from_pretrained(used / "gguf-w4", dtype=torch.float32)
    whole = DiffusionPipeline.from_pretrained(used / "sd3", dtype=torch.float32)
    told = {"height": 16, "width": 16, "max_sequence_length": 24}
    image = draw(release, **told)
    assert difference(draw(pipeline, **told), image) < 0.1 * difference(draw(whole, **told), image)


def test_an_exported_fp8_release_is_a_modelopt_checkpoint(cli: Cli, used: Path, tmp_path: Path) -> None:
    answer = cli("artifacts", "export", "fp8-w8a8", "--format", "modelopt-fp8", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "FP8_PER_CHANNEL_PER_TOKEN")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    release = SD3Transformer2DModel.from_pretrained(used / "fp8-w8a8" / "transformer")
    wanted = dequantized_state(release)
    layers = [n for n, m in release.named_modules() if isinstance(m, QuantLayer)]
    linear = [name for name in layers if f"{name}.weight_scale" in tensors]
    assert set(layers) - set(linear) == {"pos_embed.proj"}
    for name in linear:
        assert torch.equal(tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"][:, None],
                           wanted[f"{name}.weight"])  # fmt: skip
    assert tensors["pos_embed.proj.weight"].dtype == torch.float16
    assert (tmp_path / "out" / "vae" / "config.json").is_file()


def test_an_exported_int8_release_is_as_comfyui_reads_it(cli: Cli, used: Path, tmp_path: Path) -> None:
    answer = cli("artifacts", "export", "weights-w8", "--format", "comfy-int8", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    wanted = dequantized_state(SD3Transformer2DModel.from_pretrained(used / "weights-w8" / "transformer"))
    name = "joint_blocks.1.context_block.attn.qkv"
    assert json.loads(tensors[f"{name}.comfy_quant"].numpy().tobytes()) == {"format": "int8_tensorwise"}
    parts = [wanted[f"transformer_blocks.1.attn.add_{each}_proj.weight"] for each in "qkv"]
    assert torch.equal(tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"], torch.cat(parts))
    assert tensors["x_embedder.proj.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("release", "form", "wanted"),
    [
        (
            "fp8-w8a8",
            "gguf",
            r"layer \S+: got e4m3 numbers, which GGUF's blocks can't hold; wanted int codes, as gguf-w8",
        ),
        ("gguf-w4", "modelopt-fp8", r"layer \S+: got int weights and inputs as they are, .* wanted e4m3 of both"),
        ("gguf-w4", "comfy-int8", r"layer \S+: got scales per_group, .* wanted weights.granularity=per_channel"),
    ],
)
def test_what_a_format_cannot_hold_is_one_line(
    release: str, form: str, wanted: str, cli: Cli, used: Path, tmp_path: Path
) -> None:
    answer = cli("artifacts", "export", release, "--format", form, "--out", tmp_path / "out")
    assert answer.code == 2
    (line,) = answer.err.strip().splitlines()
    assert re.search(wanted, line), line
    assert not (tmp_path / "out").exists()
