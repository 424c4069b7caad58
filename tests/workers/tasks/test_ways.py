"""Ways of calling a denoiser; what only a GPU has is tested on one, the rest with a stand-in for a capture."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, UNet1DModel, UNet2DModel
from torch import nn

from quant_core.nn.steps import StepClock
from tests.quant_core.runtime.test_replayed import UNET, call
from workers.tasks.ways import GraphError, check_replay, choose_way, compile_model, repeated_blocks

BLOCK = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(**UNET).eval()


def test_a_replay_that_is_another_call_is_refused(unet: nn.Module) -> None:
    check_replay(lambda: call(unet, 0, 900.0), lambda: call(unet, 0, 900.0))
    with pytest.raises(GraphError, match="relative difference"):
        check_replay(lambda: call(unet, 0, 900.0), lambda: call(unet, 0, 100.0))


def test_graphs_are_for_gpus_and_for_models_whose_steps_the_host_does_not_follow(unet: nn.Module) -> None:
    gpu = torch.device("cuda")
    assert choose_way(torch.device("cpu"), [unet]) == ("eager", None)
    assert choose_way(gpu, [unet]) == ("CUDA graph", None)
    following = nn.Linear(1, 1)
    following.clock = StepClock([900.0, 100.0])  # type: ignore[assignment]
    assert choose_way(gpu, [unet, following])[0] == "CUDA graph"
    following.clock.follows = True
    way, reason = choose_way(gpu, [unet, nn.Sequential(following)])
    assert (way, reason) == ("eager", "layers hold differences between steps, whose order the host follows")


@pytest.mark.filterwarnings("ignore")  # what torch warns of while it imports its compiler
def test_blocks_are_compiled_on_gpus_and_where_there_are_some(unet: nn.Module) -> None:
    flux = {"num_single_layers": 3, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    with torch.device("meta"):
        models = [UNet2DModel(**UNET), DiTTransformer2DModel(**BLOCK), FluxTransformer2DModel(**BLOCK, **flux)]
        signal = UNet1DModel(block_out_channels=(32,), down_block_types=("DownBlock1D",), up_block_types=("UpBlock1D",))
    kinds = [[type(block).__name__ for block in repeated_blocks(model)] for model in models]
    assert set(kinds[0]) == {"ResnetBlock2D"}
    assert kinds[1:] == [
        ["BasicTransformerBlock"] * 2,
        ["FluxTransformerBlock"] * 2 + ["FluxSingleTransformerBlock"] * 3,
    ]
    gpu = torch.device("cuda")
    for model in models:
        assert compile_model(model, gpu) == "by block"
        assert all(block._compiled_call_impl for block in repeated_blocks(model))
        assert model._compiled_call_impl is None
    assert compile_model(signal, gpu) == "whole", "diffusers names no block of it"
    assert compile_model(models[0], torch.device("cpu")) == "whole"
    assert models[0]._compiled_call_impl
