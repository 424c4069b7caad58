"""What a small model is distilled from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from quant_core.diffusion.calibration import CalibrationSet, RecordSpec, record_trajectories
from quant_core.diffusion.denoiser import Denoiser
from quant_spec.sampler import Sampler

Calibrated = Callable[..., tuple[Denoiser, CalibrationSet]]


@pytest.fixture(scope="module")
def trajectories(calibrated: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    denoiser, _ = calibrated("unet")
    path = tmp_path_factory.mktemp("pool") / "shard"
    spec = RecordSpec(Sampler(num_inference_steps=3), batch_size=4, predictions=True)
    record_trajectories(denoiser, range(50, 54), spec, path)
    return CalibrationSet([path])
