"""Denoisers whose weights stay in their files: the same releases, byte for byte, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel

from orchestrator.cli.main import run_cli
from quant_core.diffusion import streamed
from quant_core.diffusion.denoiser import load_denoiser
from tests.orchestrator.cli.test_pipelines import SET
from tests.tiny_pipelines import save_dit

Cli = Callable[..., Any]
#: Layers of the model that are large enough to be left in their file.
LARGE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline in bfloat16, in shards, some of whose layers have more than 2**16 weights."""
    made = save_dit(tmp_path_factory.mktemp("large") / "dit")
    model = DiTTransformer2DModel.from_pretrained(made / "transformer")
    config = {**model.config, "attention_head_dim": 64}
    torch.manual_seed(1)
    for path in (made / "transformer").glob("*.safetensors"):
        path.unlink()
    wide = DiTTransformer2DModel.from_config(config).to(torch.bfloat16)
    wide.save_pretrained(made / "transformer", max_shard_size="500KB")
    assert len(list((made / "transformer").glob("*.safetensors"))) > 1
    return made


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Leave the weights of every model in their files; what is read of them, in order."""
    reads: list[str] = []
    read = streamed.StoredTensor.read

    def noted(stored: streamed.StoredTensor, device: torch.device) -> torch.Tensor:
        reads.append(str(stored.shape))
        return read(stored, device)

    monkeypatch.setattr(streamed, "STREAMED_BYTES", 0)
    monkeypatch.setattr(streamed.StoredTensor, "read", noted)
    return reads


@pytest.mark.parametrize("recipe", [pytest.param("minmax-w8a8", marks=pytest.mark.slow), "fast-w4a8"])
def test_a_release_is_the_same_bytes(
    folder: Path, tmp_path: Path, without_ray: None, capfd: pytest.CaptureFixture[str], recipe: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    def run(home: str) -> str:
        words = ["run", recipe, "--model", str(folder), *SET, "--set", "memory.budget_gib=1", "--json"]
        capfd.readouterr()
        assert run_cli(["--home", str(tmp_path / home), *words]) == 0
        digest: str = json.loads(capfd.readouterr().out)["digest"]
        return digest

    held = run("held")
    reads = request.getfixturevalue("stream")
    assert run("streamed") == held
    assert len(reads) > 20


def test_weights_are_read_when_they_are_asked_for_and_not_held(folder: Path, stream: list[str]) -> None:
    held, left = load_denoiser(folder).model, load_denoiser(folder, streamed=True).model
    large = {name: module for name, module in left.named_modules() if "_stored" in vars(module)}
    assert len(large) >= LARGE
    before = len(stream)
    for name, module in large.items():
        assert torch.equal(module.weight, held.get_submodule(name).weight)
        assert module.weight.dtype is torch.float32
        assert module._parameters["weight"].untyped_storage().nbytes() == 4
    assert len(stream) >= before + 2 * len(large)
    assert sum(p.numel() for p in left.parameters()) == sum(p.numel() for p in held.parameters())
    states = held.state_dict(), left.to("cpu").state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
