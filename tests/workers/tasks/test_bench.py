"""The benchmark of a release against its original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from kernels.backend import resolve_backend
from tests.workers.tasks.conftest import pack
from workers.storage.model_folder import import_model
from workers.storage.store import NodeStore

RunTask = Callable[..., Any]


@pytest.mark.filterwarnings("ignore")  # what torch and diffusers warn of while they compile
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bench_measures_a_release_and_its_original(
    run_task: RunTask, digits: str, packed_digits: str, seeds: Callable[..., dict[str, Any]], compiles: bool
) -> None:
    params = {"sampler": seeds(0, 1)["sampler"], "batches": [1, 4], "seconds": 0.05}
    params |= {"backend": "auto", "compile": compiles}
    metrics = run_task("bench", params, {"artifact": [packed_digits], "model": [digits]}).metrics
    backend = str(resolve_backend("auto", torch.device("cpu")))
    assert (metrics["threads"], metrics["backend"]) == (1, backend)
    assert set(metrics["layers"]) <= {backend, "reference"}
    assert metrics["device"]
    sides = ["release_figures", "original_figures", "bf16_figures"]
    for side in sides + ["bf16_compiled_figures"] * compiles:
        figures = metrics[side]
        assert set(figures["step_ms"]) == {"1", "4"}
        assert all(value > 0 for value in figures["step_ms"].values())
        assert figures["images_per_second"] > 0
    for side in sides:
        # Loading alone takes the weights; a small model's call takes a few times as much.
        assert metrics[side]["peak_memory_bytes"] > metrics[side]["bytes"] / 2
    assert (metrics["bf16_compiled_figures"] is None) is not compiles
    assert metrics["release_figures"]["bytes"] < metrics["original_figures"]["bytes"] / 4


def test_layers_say_how_they_are_stored_and_run(run_task: RunTask, packed_digits: str) -> None:
    metrics = run_task("layers", {"backend": "triton"}, {"artifact": [packed_digits]}).metrics
    assert metrics["backend"] == "triton"
    assert metrics["device"]
    layers = {each.pop("layer"): each for each in metrics["layers"]}
    # conv_in: its input is not quantized, and convolutions multiply integers; time_embedding.linear_1: float x 4 bits
    conv, linear = layers["conv_in"], layers["time_embedding.linear_1"]
    assert (conv["backend"], linear["backend"]) == ("reference", "triton")
    assert "not quantized" in conv["reason"]
    assert linear["weight"]["bits"] == 4
    assert linear["activation"] is None
    outputs, inputs = 64, 16
    assert (outputs * inputs // 2 + outputs * (4 + 1 + 4)) == linear["bytes"], "codes, scale, zero point, bias"


@pytest.mark.filterwarnings("ignore")  # as above
def test_a_compiler_that_is_not_there_costs_its_own_figures_only(
    run_task: RunTask,
    task_store: NodeStore,
    seeds: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    small = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks)
    small.save_pretrained(tmp_path / "small" / "unet")
    DDIMScheduler().save_pretrained(tmp_path / "small" / "scheduler")
    model = import_model(task_store, tmp_path / "small").digest
    artifact = pack(tmp_path / "small", task_store, tmp_path / "packed")

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "fx_graph_cache", False)
    torch.compiler.reset()
    params = {"sampler": seeds(0, 1)["sampler"], "batches": [1], "seconds": 0.05}
    params |= {"backend": "reference", "compile": True}
    metrics = run_task("bench", params, {"artifact": [artifact], "model": [model]}).metrics
    torch.compiler.reset()
    assert metrics["bf16_compiled_figures"] is None
    assert "no-such-compiler" in metrics["compile_error"]
    assert metrics["bf16_figures"]["images_per_second"] > 0


def test_layers_are_timed_in_each_format(
    run_task: RunTask, digits: str, packed_digits: str, seeds: Callable[..., dict[str, Any]]
) -> None:
    params = {"sampler": seeds(0, 1)["sampler"], "weight_bits": [4, 8], "activation_bits": [8], "seconds": 0.01}
    metrics = run_task(
        "layer_times", params | {"backend": "auto"}, {"artifact": [packed_digits], "model": [digits]}
    ).metrics
    assert metrics["device"]
    assert metrics["rest_ms"] > 0
    formats = {"float/float", "4/float", "8/float"}  # its inputs are as they are
    assert {frozenset(times) for times in metrics["layers"].values()} == {frozenset(formats)}
    assert all(time > 0 for times in metrics["layers"].values() for time in times.values())
    assert "conv_in" in metrics["layers"]
