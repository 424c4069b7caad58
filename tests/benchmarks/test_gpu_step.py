"""What is timed on a GPU builds and runs, small and on a CPU."""

from __future__ import annotations

import fcntl
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_step import STEPS, figures, half_model, packed_model, turn
from benchmarks.stacks import STACKS
from quant_core import layer_runs
from quant_spec.enums import KernelBackend
from workers.tasks.ways import repeated_blocks

SMALL: dict[str, dict[str, Any]] = {
    "sdxl": {
        "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1),
        "attention_head_dim": (2, 4), "cross_attention_dim": 32, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64, "layers_per_block": 1,
    },
    "dit-xl": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_embeds_ada_norm": 10},
    "sd3": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "joint_attention_dim": 32,
        "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8,
    },
    "flux": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1, "in_channels": 16,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("weight", ["W8A8", "W4A8 g64 of integers", "W4A8 g64 of integers, packed", "FP8"])
@torch.no_grad()
def test_a_stack_builds_and_runs(name: str, weight: str) -> None:
    stack = replace(STACKS[name], shapes=STACKS[name].shapes | {"sample_size": 8} | SMALL[name])
    if name == "flux":
        stack = replace(stack, shapes={key: value for key, value in stack.shapes.items() if key != "sample_size"})
    told = stack.told(stack.shapes, 2, 8, "cpu")
    told["timestep"].fill_(STEPS[9])
    plain = half_model(stack, "cpu")(**told, return_dict=False)[0]
    packed = packed_model(stack, weight, "cpu", KernelBackend.CPU)
    got = packed(**told, return_dict=False)[0]
    assert got.shape == plain.shape
    assert got.dtype is torch.bfloat16
    assert bool(got.isfinite().all())
    assert bool(plain.isfinite().all())
    runs = layer_runs(packed)
    assert not {run.layer for run in runs} & set(stack.floats)
    assert {run.backend for run in runs} == {KernelBackend.REFERENCE if weight == "FP8" else KernelBackend.CPU}
    assert repeated_blocks(half_model(stack, "meta"))


def test_a_graph_is_compared_with_bfloat16_of_compiled_blocks_too() -> None:
    times = {
        "bfloat16, eager": 9.0, "bfloat16, CUDA graph": 8.0, "bfloat16, compiled by block, CUDA graph": 6.0,
        "W8A8, eager": 18.0, "W8A8, CUDA graph": 4.0,
    }  # fmt: skip
    assert figures("W8A8", times)["speedup"] == {
        "eager": 0.5, "CUDA graph": 2.0, "CUDA graph over compiled by block": 1.5,
    }  # fmt: skip


def test_a_turn_waits_until_the_others_are_ready_and_keeps_them_out(tmp_path: Path) -> None:
    path, other = tmp_path / "turn", tmp_path / "turn.ready.other"
    threading.Timer(0.3, other.touch).start()
    with turn(path, others=1):
        assert other.exists()
        with path.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
