"""The report: charts, strips of samples, and a page that needs nothing else."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from orchestrator.report.charts import Column, column_chart, line_chart
from orchestrator.report.data import CorrectionRow, FeatureRow, KindTime, LayerRow, ReportData, UnitRow
from orchestrator.report.images import GAP, make_strips
from orchestrator.report.render import render_report
from orchestrator.report.svg import nice_ticks
from quant_spec.layer_bits import LayerBits
from tests.orchestrator.report.pages import Outside

METRICS = {
    "psnr_db": 33.25,
    "psnr_db_ci95": 0.5,
    "fd": 0.0421,
    "fd_extractor": "efficientnet-lite0",
    "n": 8,
    "weight_bits_mean": 4.25,
    "act_bits_mean": 8.0,
    "bytes": 2_500_000,
    "bytes_fp16": 8_640_000,
    "bops": 1e12,
    "bops_fp32": 3.2e13,
    "sqnr_db_per_step": [30.0, 28.5, 27.0],
    "sampler": {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "eta": 0.0, "guidance_scale": 1.0},
    "seeds": {"first": 0, "count": 8},
}


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (27.1, 33.9, [26, 28, 30, 32, 34]),
        (5, 5, [4.5, 4.75, 5.0, 5.25, 5.5]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose(low: float, high: float, wanted: list[float]) -> None:
    assert nice_ticks(low, high) == wanted


def test_line_chart_draws_every_value_and_leaves_gaps() -> None:
    chart = ElementTree.fromstring(line_chart([30.0, 20.0, math.nan, 25.0], x_name="step", y_name="dB"))
    lines = [element.get("points", "").split() for element in chart.iter("polyline")]
    assert [len(points) for points in lines] == [2, 1]
    assert len(list(chart.iter("circle"))) == 3
    (_, top), (_, bottom) = (point.split(",") for point in lines[0])
    assert float(top) < float(bottom)
    assert line_chart([math.inf], x_name="step", y_name="dB") == ""


def test_column_chart_is_to_scale_and_escapes() -> None:
    columns = [Column(10.0, "low", "a <b>"), Column(20.0, "high", "c & d"), Column(math.nan, "low", "none")]
    text = column_chart(columns, x_name="layers", y_name="dB")
    chart = ElementTree.fromstring(text)
    heights = [float(element.get("height", "0")) for element in chart.iter("rect")]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert [element.text for element in chart.iter("title")] == ["a <b>", "c & d"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_strips_hold_the_images_side_by_side(channels: int) -> None:
    reference = np.full((2, channels, 4, 6), -1.0, dtype=np.float32)
    reference[1] = 1.0
    quantized = reference.copy()
    quantized[0] += 0.1
    strips = make_strips(reference, quantized, (5, 6))
    pixels = decode(strips.reference)
    assert pixels.size == (6 + GAP + 6, 4) == (strips.width, 4)
    assert pixels.convert("L").getpixel((0, 0)) == 0
    assert pixels.convert("L").getpixel((13, 3)) == 255
    difference = decode(strips.difference).convert("L")
    assert difference.getpixel((0, 0)) == pytest.approx(255 * (0.5 + 0.05 * 4), abs=0.6)
    assert difference.getpixel((13, 0)) == 128
    with pytest.raises(ValueError, match="wanted"):
        make_strips(reference, quantized[:1], (5, 6))


def decode(uri: str) -> Image.Image:
    """Read an image from a data URI."""
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def data() -> ReportData:
    """A small report."""
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 3, 8, 8)).astype(np.float32)
    return ReportData(
        job="0123456789ab",
        release="thing@1",
        digest="d" * 64,
        model="thing",
        model_class="UNet2DModel",
        model_digest="e" * 64,
        parameters=4_320_000,
        recipe="mine",
        recipe_digest="f" * 64,
        recipe_yaml="name: mine\ndescription: <script>alert(1)</script>\n",
        finished="2026-11-21T09:00:00Z",
        wall_seconds=75.0,
        metrics=METRICS,
        protocol=(("n", "8"),),
        provenance=(("model", "thing, from /models/thing"),),
        strips=(make_strips(images, images * 0.9, (0, 1, 2)),),
        layers=(
            LayerRow("conv_in", "conv_in", "Conv2d", (8, 3, 3, 3), LayerBits(8, 8), 0.001, 41.5),
            LayerRow("mid.to_q", "mid", "Linear", (8, 8), LayerBits(4), 0.002, 22.25),
            LayerRow("mid.kept", "mid", "Linear", (8, 8), None, 0.002, None),
        ),
        units=(UnitRow("conv_in", 41.5, 41.75), UnitRow("mid", 20.0, 26.5)),
        features=(FeatureRow("mid.time_emb_proj", "table, 8 bits", 37.5, 48.25, 0.999991),),
        step_bits=(8, 6, 4),
        corrections=(CorrectionRow(-0.01, 0.02, True, False, 0.25), CorrectionRow(0.0, 0.0, False, False, 0.0)),
        kinds=(KindTime("calibrate", 2, 1, 4.5), KindTime("release", 1, 0, 0.0)),
    )


def test_page_needs_nothing_else(data: ReportData) -> None:
    page = render_report(data)
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert outside.open == []
    assert not outside.tags & {"script", "link", "iframe", "object"}
    assert "@import" not in page
    assert re.findall(r"url\(", page) == []
    assert re.findall(r"https?://", page) == []


def test_page_shows_what_was_measured(data: ReportData) -> None:
    page = render_report(data)
    for text in ("thing@1", "33.25 dB", "n = 8", "3.46×", "4.25 / 8.00", "32.0×", "1 min 15 s", "mid.to_q", "27.0 dB"):
        assert text in page, text
    assert page.count("<svg") == 6
    assert page.count("data:image/png") == 3
    assert "conv_in: W8 A8, 41.5 dB" in page
    assert "mid, after reconstruction: 26.5 dB" in page
    assert "mid.time_emb_proj, from its table, 8 bits: 48.2 dB, cosine 0.999991" in page
    assert "step 2: 4 bits" in page
    assert "step 0: k -0.01000, r² 0.0200; uses k; error 0.250 dB lower" in page
    assert "step 1: k 0.00000, r² 0.0000; uses nothing; error 0.000 dB lower" in page
    assert "DDIMScheduler, 3 steps, eta 0, seeds 0 to 7" in page


def test_page_escapes_what_users_wrote(data: ReportData) -> None:
    page = render_report(data)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_page_does_without_samples_and_errors(data: ReportData) -> None:
    layers = tuple(replace(layer, sqnr_db=None) for layer in data.layers)
    metrics = {**METRICS, "sqnr_db_per_step": []}
    passes = {"units": (), "features": (), "step_bits": (), "corrections": ()}
    page = render_report(replace(data, strips=(), layers=layers, kinds=(), metrics=metrics, **passes))
    assert "<svg" not in page
    assert "data:image" not in page
