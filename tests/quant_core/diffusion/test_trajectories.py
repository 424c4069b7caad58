"""Trajectories of whole pipelines: what the denoiser is called with inside a pipeline's call, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record, replay
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.diffusion.pipeline import load_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.diffusion.trajectories import PipelineTrajectories
from quant_core.errors import DenoiserError
from quant_spec.prompts import PromptLine
from quant_spec.sampler import Sampler
from tests.tiny_families import FAMILIES
from tests.tiny_pipelines import save_dit, save_sd3

CLASSES = (PromptLine(class_label=1), PromptLine(class_label=2))
PROMPTS = (PromptLine(prompt="red heart"), PromptLine(prompt="blue car", seed=7), PromptLine(prompt="owl"))


def trajectories(
    folder: Path, save: Callable[[Path], Path], guidance: float, lines: tuple[PromptLine, ...]
) -> PipelineTrajectories:
    denoiser = load_denoiser(save(folder / "model"))
    sampler = Sampler(num_inference_steps=3, guidance_scale=guidance)
    scheduler = make_scheduler(sampler, denoiser.scheduler_config)
    assert denoiser.folder is not None
    return PipelineTrajectories(load_pipeline(denoiser.folder, denoiser.model, scheduler), sampler, lines)


KINDS = [(save_dit, CLASSES, 4.0, 2), (save_sd3, PROMPTS, 4.0, 2), (save_sd3, PROMPTS, 1.0, 1)]


@pytest.mark.parametrize(("save", "lines", "guidance", "rows"), KINDS)
def test_what_is_recorded_replays_and_does_not_depend_on_the_batch(
    tmp_path: Path, save: Callable[[Path], Path], lines: tuple[PromptLine, ...], guidance: float, rows: int
) -> None:
    found = trajectories(tmp_path, save, guidance, lines)
    paths = [tmp_path / "one", tmp_path / "three"]
    for path, batch in zip(paths, (1, 3), strict=True):
        spec = RecordSpec(found.sampler, batch_size=batch, predictions=True, samples=True)
        record(found, range(10, 14), spec, path)
    one, three = (CalibrationSet([path]) for path in paths)
    assert (one.steps, one.samples) == (3, 4 * rows)
    every = torch.arange(len(one))
    torch.testing.assert_close(one.predictions(every), three.predictions(every), rtol=1e-4, atol=1e-5)
    batch_of = one.gather(every)
    with torch.no_grad():
        torch.testing.assert_close(replay(found.model, batch_of), one.predictions(every), rtol=1e-4, atol=1e-5)
    for key, value in one.conditioning.items():
        torch.testing.assert_close(value, three.conditioning[key])
    # both rows of a seed start from the same noise; other seeds from others
    first = one.rows(0, 0, one.samples).x.unflatten(0, (4, rows))
    assert torch.equal(first[:, 0], first[:, -1])
    assert not torch.equal(first[0], first[1])


def test_rows_of_a_seed_are_its_own_label_and_none(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_dit, 4.0, CLASSES)
    record(found, range(4), RecordSpec(found.sampler, batch_size=2), tmp_path / "shard")
    assert CalibrationSet([tmp_path / "shard"]).conditioning["class_labels"].tolist() == [1, 1000, 2, 1000] * 2


def test_samples_are_the_pixels_that_the_pipeline_gives(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_sd3, 4.0, PROMPTS)
    record(found, (0, 1), RecordSpec(found.sampler, batch_size=2, recorded_seeds=1, samples=True), tmp_path / "shard")
    shard = load_file(tmp_path / "shard")
    # line 1 has a seed of its own
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
    images = found.pipeline(
        prompt=["red heart", "blue car"],
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators,
        output_type="np",
    ).images
    np.testing.assert_allclose((shard["sample"].permute(0, 2, 3, 1) + 1) / 2, images, atol=1e-5)
    decoded = found.pipeline.vae.decode(shard["latent"]).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, shard["sample"], rtol=1e-4, atol=1e-4)
    assert shard["x"].shape[1] == 2


def test_sigmas_of_the_recipe_are_those_of_the_call(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_sd3, 1.0, PROMPTS)
    own = found.sampler.replaced(arguments={"sigmas": [1.0, 0.5]})
    script = PipelineTrajectories(found.pipeline, own, PROMPTS).script([0])
    # the scheduler shifts them by 3: 3 s / (1 + 2 s)
    torch.testing.assert_close(script.timesteps, torch.tensor([1000.0, 750.0]))


def test_a_keyword_that_changes_from_step_to_step_is_recorded_for_each(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_sd3, 4.0, PROMPTS)

    def drift(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        share = kwargs["timestep"][:, None] / 1000
        return args, kwargs | {"pooled_projections": kwargs["pooled_projections"] * share}

    hook = found.model.register_forward_pre_hook(drift, with_kwargs=True)
    spec = RecordSpec(found.sampler, steps=2, batch_size=2, predictions=True)
    record(found, range(4), spec, tmp_path / "shard")
    hook.remove()
    shard = CalibrationSet([tmp_path / "shard"])
    assert set(shard.conditioning) == {"encoder_hidden_states"}
    batch = shard.gather(torch.tensor([0, 8, 9]))
    assert not torch.equal(batch.conditioning["pooled_projections"][0], batch.conditioning["pooled_projections"][1])
    with torch.no_grad():
        expected = shard.predictions(torch.tensor([0, 8, 9]))
        torch.testing.assert_close(replay(found.model, batch), expected, rtol=1e-4, atol=1e-5)


def test_a_keyword_that_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_sd3, 4.0, PROMPTS)

    def skip(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        return args, kwargs | {"skip_layers": "none"}

    found.model.register_forward_pre_hook(skip, with_kwargs=True)
    with pytest.raises(
        DenoiserError, match=r"SD3Transformer2DModel: got skip_layers none \(str\), wanted tensors and num"
    ):
        found.script([0])


def test_numbers_and_tensors_without_rows_are_recorded_once_and_replayed(tmp_path: Path) -> None:
    family = FAMILIES["hunyuan-dit"]
    denoiser = load_denoiser(family.save(tmp_path / "model"))
    sampler = Sampler(num_inference_steps=2, guidance_scale=4.0, arguments=dict(family.arguments))
    assert denoiser.folder is not None
    pipeline = load_pipeline(denoiser.folder, denoiser.model, make_scheduler(sampler, denoiser.scheduler_config))
    found = PipelineTrajectories(pipeline, sampler, PROMPTS)

    record(found, range(4), RecordSpec(sampler, batch_size=2, predictions=True), tmp_path / "shard")
    shard = CalibrationSet([tmp_path / "shard"])
    positions = [key for key in shard.conditioning if "image_rotary_emb" in key]
    assert positions == ["shared.image_rotary_emb.#0", "shared.image_rotary_emb.#1"]
    # 4 x 4 latents in patches of 2 x 2, whatever the number of samples
    assert [len(shard.conditioning[key]) for key in positions] == [4, 4]
    batch = shard.gather(torch.tensor([0, 5, 9]))
    with torch.no_grad():
        torch.testing.assert_close(
            replay(found.model, batch), shard.predictions(torch.tensor([0, 5, 9])), rtol=1e-4, atol=1e-5
        )


def test_numbers_reach_the_denoiser_as_numbers(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_sd3, 4.0, PROMPTS)

    def skip(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> tuple[object, dict[str, Any]]:
        return args, kwargs | {"skip_layers": [0]}

    handle = found.model.register_forward_pre_hook(skip, with_kwargs=True)
    record(found, range(2), RecordSpec(found.sampler, batch_size=2, predictions=True), tmp_path / "shard")
    handle.remove()
    shard = CalibrationSet([tmp_path / "shard"])
    every = torch.arange(len(shard))
    with torch.no_grad():  # only with the number is the first layer left out again
        torch.testing.assert_close(
            replay(found.model, shard.gather(every)), shard.predictions(every), rtol=1e-4, atol=1e-5
        )


def test_a_call_without_what_the_lines_say_is_refused(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_dit, 4.0, PROMPTS)
    with pytest.raises(DenoiserError, match="DiTPipeline: got prompt, wanted what its call takes: class_labels"):
        found.script([0])


def test_the_denoiser_is_left_as_it_was(tmp_path: Path) -> None:
    found = trajectories(tmp_path, save_dit, 4.0, CLASSES)
    found.run(range(2), batch_size=2)
    assert "forward" not in found.model.__dict__
    assert "decode" not in found.pipeline.vae.__dict__
