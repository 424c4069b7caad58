"""Models called from CUDA graphs; what only a GPU has is tested on one, the rest with a stand-in for a capture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

import quant_core
from quant_core.diffusion.denoiser import call_denoiser, sample_shape
from quant_core.nn.steps import StepClock
from quant_core.runtime.replayed import Replayed, why_not_replayed
from quant_spec.errors import QuantizationError

UNET: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False, "num_class_embeds": 5,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,),
}  # fmt: skip


def in_one_memory(run: Callable[[], Any]) -> Callable[[], Any]:
    """Call anew what a graph replays: it reads what it read, and writes to where it wrote."""
    (out,) = run()

    def replay() -> Any:
        out.copy_(run()[0])
        return (out,)

    return replay


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(**UNET).eval()


def call(model: nn.Module, seed: int, timestep: float, batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    x = torch.randn(batch, *sample_shape(model), generator=draw).to(device)
    labels = torch.arange(batch, device=device)
    with torch.no_grad():
        return call_denoiser(model, x, torch.tensor(timestep, device=device), {"class_labels": labels})


def counted(captures: list[Callable[[], Any]]) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Return a stand-in for a capture that notes what is captured."""

    def capture(run: Callable[[], Any]) -> Callable[[], Any]:
        captures.append(run)
        return in_one_memory(run)

    return capture


def test_a_replay_follows_its_arguments(unet: nn.Module) -> None:
    captures: list[Callable[[], Any]] = []
    replayed = Replayed(unet, counted(captures))
    assert not replayed.training
    asked = ((0, 900.0, 2), (1, 100.0, 2), (2, 100.0, 3), (0, 900.0, 2))
    given = [call(replayed, *each) for each in asked]
    for each, got in zip(asked, given, strict=True):
        assert torch.equal(got, call(unet, *each)), "of this call, also after the later ones"
    assert len(captures) == 2, "one for each shape"


@torch.no_grad()
def test_timesteps_may_be_numbers(unet: nn.Module) -> None:
    captures: list[Callable[[], Any]] = []
    replayed = Replayed(unet, counted(captures))
    x, labels = torch.ones(2, *sample_shape(unet)), torch.tensor([0, 1])
    for timestep in (900, 100):
        want = unet(x, timestep, labels, return_dict=False)[0]
        assert torch.equal(replayed(x, timestep, labels, return_dict=False)[0], want)
        named = {"timestep": timestep, "class_labels": labels, "return_dict": False}
        assert torch.equal(replayed(x, **named)[0], want)
    assert len(captures) == 2, "one for each way of calling it"
    want = unet(x, 900.5, labels, return_dict=False)[0]
    assert torch.equal(replayed(x, 900.5, labels, return_dict=False)[0], want)


def test_a_copy_captures_its_own(unet: nn.Module) -> None:
    captures: list[Callable[[], Any]] = []
    replayed = Replayed(unet, counted(captures))
    want = call(replayed, 0, 900.0)
    twin = copy.deepcopy(replayed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.0)
    assert torch.equal(call(twin, 0, 900.0), want)
    assert len(captures) == 2
    assert twin.model is not replayed.model


def test_a_replayed_model_stands_in_a_pipeline(unet: nn.Module) -> None:
    plain = UNet2DModel(**(UNET | {"num_class_embeds": None})).eval()
    captures: list[Callable[[], Any]] = []

    def images(model: nn.Module) -> Any:
        pipeline = DDIMPipeline(plain, DDIMScheduler())
        pipeline.unet = model
        pipeline.set_progress_bar_config(disable=True)
        told = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        return pipeline(**told).images

    def capture(run: Callable[[], Any]) -> Callable[[], Any]:
        captures.append(run)
        out = run()

        def replay() -> Any:
            out.sample.copy_(run().sample)
            return out

        return replay

    assert (images(Replayed(plain, capture)) == images(plain)).all()
    assert len(captures) == 1


def test_what_the_host_follows_is_not_replayed(unet: nn.Module) -> None:
    assert why_not_replayed(unet) is None
    following = nn.Linear(1, 1)
    following.clock = StepClock([900.0, 100.0])  # type: ignore[assignment]
    assert why_not_replayed(nn.Sequential(following)) is None
    following.clock.follows = True
    assert why_not_replayed(nn.Sequential(following)) is not None


def test_graphs_are_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="replay: got device cpu, wanted a GPU"):
        quant_core.load_quantized(tmp_path, replay=True)


@pytest.mark.gpu
def test_a_graph_gives_what_the_model_gives(unet: nn.Module) -> None:
    model = copy.deepcopy(unet).cuda()
    replayed = Replayed(model)
    for timestep, batch in ((900.0, 2), (100.0, 2), (100.0, 4)):
        want, got = call(model, 0, timestep, batch), call(replayed, 0, timestep, batch)
        assert float((got - want).norm() / want.norm()) < 0.01
