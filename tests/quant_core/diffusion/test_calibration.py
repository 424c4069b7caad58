from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories, replay, select_steps
from quant_core.diffusion.denoiser import Denoiser, load_denoiser
from quant_core.diffusion.sampler import Step, make_scheduler, sample, trajectory_conditioning
from quant_core.diffusion.tensorfile import TensorInfo, create_tensor_file
from quant_core.errors import NotFiniteError
from quant_spec.errors import QuantizationError
from quant_spec.sampler import Sampler

Make = Callable[[str], nn.Module]
TRAINED = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
DDIM = Sampler(scheduler="DDIMScheduler", num_inference_steps=4)


@pytest.fixture(scope="module")
def denoiser(tiny_model: Make) -> Denoiser:
    return Denoiser(tiny_model("unet"), {}, TRAINED, None)


def record(denoiser: Denoiser, seeds: range, path: Path, sampler: Sampler = DDIM, **more: object) -> Path:
    record_trajectories(denoiser, seeds, RecordSpec(sampler, batch_size=2, **more), path)  # type: ignore[arg-type]
    return path


def test_a_shard_holds_exactly_what_the_denoiser_saw(denoiser: Denoiser, tmp_path: Path) -> None:
    shard = load_file(record(denoiser, range(3), tmp_path / "a", predictions=True, samples=True))
    conditioning = trajectory_conditioning(denoiser.model, DDIM, range(3), None)
    steps: list[Step] = []
    scheduler = make_scheduler(DDIM, TRAINED)
    samples = sample(denoiser.model, scheduler, DDIM, range(3), conditioning, batch_size=2, on_step=steps.append)
    assert shard["x"].shape == (4, 3, 3, 8, 8)
    assert torch.equal(shard["sample"], samples)
    for step in steps:
        rows = slice(step.row, step.row + len(step.x))
        assert torch.equal(shard["x"][step.index, rows], step.x)
        assert torch.equal(shard["prediction"][step.index, rows], step.prediction)
        assert shard["timesteps"][step.index] == step.timestep
    assert shard["timesteps"].tolist() == [750, 500, 250, 0]
    assert torch.equal(shard["conditioning.class_labels"], conditioning["class_labels"])


def test_one_pass_of_the_sampler(denoiser: Denoiser, tmp_path: Path) -> None:
    calls: list[int] = []
    handle = denoiser.model.register_forward_hook(lambda *_: calls.append(1))
    record(denoiser, range(4), tmp_path / "a")
    handle.remove()
    assert len(calls) == 4 * 2  # steps x batches


def test_same_seeds_same_bytes(denoiser: Denoiser, tmp_path: Path) -> None:
    one, two = (record(denoiser, range(3), tmp_path / name).read_bytes() for name in "ab")
    assert one == two
    assert one != record(denoiser, range(1, 4), tmp_path / "c").read_bytes()


def test_shards_concatenate_to_the_whole(denoiser: Denoiser, tmp_path: Path) -> None:
    whole = CalibrationSet([record(denoiser, range(6), tmp_path / "whole")])
    parts = CalibrationSet([record(denoiser, r, tmp_path / str(r.start)) for r in (range(4), range(4, 6))])
    assert (whole.steps, whole.samples, len(whole)) == (parts.steps, parts.samples, len(parts)) == (4, 6, 24)
    for a, b in zip(whole.by_step(5), parts.by_step(5), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.timestep, b.timestep)
        assert torch.equal(a.conditioning["class_labels"], b.conditioning["class_labels"])


@pytest.mark.parametrize(
    ("total", "wanted", "chosen"),
    [(4, None, (0, 1, 2, 3)), (20, 20, tuple(range(20))), (20, 5, (0, 5, 10, 14, 19)), (5, 2, (0, 4)), (5, 1, (2,))],
)
def test_select_steps_is_even(total: int, wanted: int | None, chosen: tuple[int, ...]) -> None:
    assert select_steps(total, wanted) == chosen


@pytest.mark.parametrize("wanted", [0, 6])
def test_select_steps_refuses(wanted: int) -> None:
    with pytest.raises(QuantizationError, match=f"got {wanted}, wanted 1 to 5"):
        select_steps(5, wanted)


def test_some_steps_of_the_trajectory(denoiser: Denoiser, tmp_path: Path) -> None:
    every = load_file(record(denoiser, range(2), tmp_path / "all"))
    some = load_file(record(denoiser, range(2), tmp_path / "some", steps=2))
    assert some["step_index"].tolist() == [0, 3]
    assert torch.equal(some["x"], every["x"][[0, 3]])
    assert torch.equal(some["timesteps"], every["timesteps"][[0, 3]])


def test_only_the_first_seeds(denoiser: Denoiser, tmp_path: Path) -> None:
    every = load_file(record(denoiser, range(4), tmp_path / "all", samples=True))
    some = load_file(record(denoiser, range(4), tmp_path / "some", recorded_seeds=3, samples=True))
    assert torch.equal(some["x"], every["x"][:, :3])
    assert torch.equal(some["sample"], every["sample"])
    assert len(CalibrationSet([tmp_path / "some"]).conditioning["class_labels"]) == 3
    assert "x" not in load_file(record(denoiser, range(2), tmp_path / "none", recorded_seeds=0, samples=True))


def test_guidance_records_both_calls(tiny_model: Make, tmp_path: Path) -> None:
    dit = Denoiser(tiny_model("dit"), {}, TRAINED, None)
    guided = Sampler(scheduler="DDIMScheduler", num_inference_steps=3, guidance_scale=3.0)
    found = CalibrationSet([record(dit, range(3), tmp_path / "a", guided)])
    assert found.samples == 6
    assert found.conditioning["class_labels"][1::2].tolist() == [6, 6, 6]
    assert bool((found.conditioning["class_labels"][0::2] < 6).all())
    for batch in found.by_step(6):
        assert torch.equal(batch.x[0::2], batch.x[1::2])
    first = CalibrationSet([record(dit, range(3), tmp_path / "b", guided, recorded_seeds=1)])
    assert first.samples == 2


def test_prompts_from_a_file(tiny_model: Make, tmp_path: Path) -> None:
    file = tmp_path / "conditioning.safetensors"
    keys = {
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "added_cond_kwargs.text_embeds": torch.randn(2, 10),
        "added_cond_kwargs.time_ids": torch.ones(2, 6),
    }
    save_file(keys, file)
    sdxl = Denoiser(tiny_model("sdxl_unet"), {}, TRAINED, file)
    found = CalibrationSet([record(sdxl, range(3), tmp_path / "a", predictions=True)])
    assert set(found.conditioning) == set(keys)
    predictions = load_file(tmp_path / "a")["prediction"]
    batch = found.rows(1, 0, 3)
    torch.testing.assert_close(replay(sdxl.model, batch), predictions[1], rtol=1e-4, atol=1e-5)


def test_packed_latents_keep_their_positions(tiny_model: Make, tmp_path: Path) -> None:
    file = tmp_path / "conditioning.safetensors"
    keys = {
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 6),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    save_file(keys, file)
    flux = Denoiser(tiny_model("flux"), {}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, file)
    spec = Sampler(num_inference_steps=3, timestep_scale=0.001)
    parts = [record(flux, r, tmp_path / str(r.start), spec) for r in (range(2), range(2, 3))]
    found = CalibrationSet(parts)
    assert found.sample_shape == (16, 4)
    assert torch.equal(found.conditioning["img_ids"], keys["img_ids"])
    assert found.conditioning["encoder_hidden_states"].shape == (3, 5, 12)
    assert float(found.timesteps.max()) <= 1
    assert all(replay(flux.model, batch).shape == batch.x.shape for batch in found.by_step(2))


def test_by_step_never_mixes_steps(denoiser: Denoiser, tmp_path: Path) -> None:
    found = CalibrationSet([record(denoiser, range(5), tmp_path / "a")])
    batches = list(found.by_step(2))
    assert [len(batch) for batch in batches] == [2, 2, 1] * 4
    assert [set(batch.step.tolist()) for batch in batches] == [{step} for step in range(4) for _ in range(3)]
    assert all(torch.equal(batch.timestep, found.timesteps[batch.step]) for batch in batches)


def test_replay_gives_the_prediction_again(denoiser: Denoiser, tmp_path: Path) -> None:
    path = record(denoiser, range(2), tmp_path / "a", predictions=True)
    predictions = load_file(path)["prediction"]
    for batch in CalibrationSet([path]).by_step(2):
        assert torch.equal(replay(denoiser.model, batch), predictions[int(batch.step[0])])


def test_calibration_set_refuses_shards_of_other_trajectories(denoiser: Denoiser, tmp_path: Path) -> None:
    one = record(denoiser, range(2), tmp_path / "a")
    other = record(denoiser, range(2, 4), tmp_path / "b", Sampler(scheduler="DDIMScheduler", num_inference_steps=5))
    with pytest.raises(QuantizationError, match="wanted the same timesteps"):
        CalibrationSet([one, other])
    with pytest.raises(QuantizationError, match="got no shards"):
        CalibrationSet([])


@pytest.mark.parametrize(("name", "value"), [("x", float("nan")), ("x", float("inf")), ("prediction", float("nan"))])
def test_a_stored_set_that_is_not_finite_is_refused_where_it_is_read(
    denoiser: Denoiser, tmp_path: Path, name: str, value: float
) -> None:
    """As shards of older releases may be, which did not check trajectories; results that are stored are used again."""
    tensors = load_file(record(denoiser, range(3), tmp_path / "a", predictions=True))
    tensors[name][2, 1, 0, 0, 0] = value
    save_file(tensors, tmp_path / "b")
    found = CalibrationSet([tmp_path / "b"])
    step, row = torch.arange(len(found)) // found.samples, torch.arange(len(found)) % found.samples
    good = torch.arange(len(found))[(step != 2) | (row != 1)]
    assert len(found.gather(good)) == len(found.predictions(good)) == len(found) - 1
    message = rf"got NaN or infinity at step 2 \(timestep {float(found.timesteps[2]):g}\), wanted finite"
    with pytest.raises(NotFiniteError, match=message):
        found.predictions(torch.tensor([0, 2 * found.samples + 1])) if name == "prediction" else list(found.by_step(2))
    if name == "x":
        with pytest.raises(NotFiniteError, match=message):
            found.gather(torch.tensor([2 * found.samples + 1, 0]))


def test_record_trajectories_wants_seeds(denoiser: Denoiser, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="seeds: got none"):
        record(denoiser, range(0), tmp_path / "a")


def test_tensor_file_is_aligned_and_readable(tmp_path: Path) -> None:
    kinds = {"b": torch.bool, "d": torch.float64, "f": torch.float32, "l": torch.int64}
    tensors = {name: torch.ones(3, dtype=kind) for name, kind in kinds.items()}
    path = tmp_path / "a"
    maps = create_tensor_file(path, {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}, {"k": "v"})
    for name, tensor in tensors.items():
        maps[name][:] = tensor.numpy()
        maps[name].flush()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"k": "v"}
    with pytest.raises(QuantizationError, match="tensor h: got float16"):
        create_tensor_file(path, {"h": TensorInfo.of(torch.ones(1, dtype=torch.float16))}, {})


def test_the_shipped_model_is_calibrated(emoji32: Path, tmp_path: Path) -> None:
    found = CalibrationSet(
        [
            record(
                load_denoiser(emoji32),
                range(2),
                tmp_path / "a",
                Sampler(scheduler="DDIMScheduler", num_inference_steps=3),
            )
        ]
    )
    assert found.timesteps.tolist() == [666, 333, 0]
    # noise at the first step, nearly an image at the last
    assert 0.8 < float(found.rows(0, 0, 2).x.std()) < 1.2
    assert float(found.rows(2, 0, 2).x.abs().max()) <= 1.5
