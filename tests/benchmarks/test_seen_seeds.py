"""The comparison of calibration's own seeds with new ones: releases as pulled, each beside full precision."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import seen_seeds
from quant_core.artifact.folder import write_artifact
from quant_core.diffusion.denoiser import load_denoiser
from quant_core.fit.layer_rounding import nearest_codes, weight_grid
from quant_core.nn.layers import QUANTIZABLE, weight_matrix
from quant_core.nn.model import build_quantized
from quant_spec.formats import LayerSpec, ModelFormat, WeightSpec
from quant_spec.quantization_config import quantization_config
from quant_spec.ranges import RangeSpec
from quant_spec.sampler import Sampler

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits"


def release(folder: Path, bits: int) -> Path:
    """Write the digits' model with weights rounded to so many bits."""
    denoiser = load_denoiser(DIGITS)
    model = denoiser.model
    weights = {
        name: each.get_parameter("weight").detach().clone()
        for name, each in model.named_modules()
        if isinstance(each, QUANTIZABLE)
    }
    made = ModelFormat(dict.fromkeys(weights, LayerSpec(WeightSpec(bits), None)), {}, ())
    for name, layer in build_quantized(model, made).layers.items():
        matrix = weight_matrix(weights[name])
        grid = weight_grid(matrix, layer.spec, layer.group_index, RangeSpec())
        codes = nearest_codes(matrix, grid, bits, layer.group_index)
        layer.set_codes(codes, grid.scale, grid.zero_point, grid.multiplier)
    write_artifact(model, denoiser.config, quantization_config(made), denoiser.scheduler_config, folder)
    return folder


def test_releases_are_measured_on_both_sets_of_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seen_seeds, "SAMPLER", Sampler(scheduler="DDIMScheduler", num_inference_steps=3))
    monkeypatch.setattr(seen_seeds, "SEEN", range(100, 103))
    monkeypatch.setattr(seen_seeds, "NEW", range(5))
    folders = [str(release(tmp_path / name, bits)) for name, bits in (("fine", 8), ("coarse", 4))]
    monkeypatch.setattr("sys.argv", ["seen_seeds", "--model", str(DIGITS), "--releases", *folders])
    seen_seeds.main()
    fine, coarse = json.loads(capsys.readouterr().out)["rows"]
    assert (fine["release"], coarse["release"]) == ("fine", "coarse")
    for seeds, count in (("seen", 3), ("new", 5)):
        assert fine[seeds]["n"] == coarse[seeds]["n"] == count
        assert fine[seeds]["psnr_db"] > coarse[seeds]["psnr_db"] + 10 > 20
    assert coarse["seen"]["psnr_db"] != coarse["new"]["psnr_db"]
    assert coarse["loss_db"] == pytest.approx(coarse["seen"]["psnr_db"] - coarse["new"]["psnr_db"], abs=2e-4)
    widths = coarse["seen"]["ci95"], coarse["new"]["ci95"]
    assert coarse["loss_db_ci95"] == pytest.approx(math.hypot(*widths), abs=2e-4)
