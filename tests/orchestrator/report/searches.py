"""Searches as their reports see them, of the shape and the size that real ones have, from made-up sensitivities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from orchestrator.actions.sensitivity import read_sensitivities
from orchestrator.report.images import make_strips
from orchestrator.report.search_data import (
    ModelReport,
    PointRow,
    SearchReportData,
    StageCost,
    Surrogate,
)
from quant_spec.allocation import Allocation, LayerChoice

WIDTHS = (2, 3, 4, 5, 6, 8)
_BESIDE = 310_000
_BLOCKS = (
    *(f"down_blocks.{block}.resnets.{resnet}" for block in range(3) for resnet in range(2)),
    *("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    *(f"up_blocks.{block}.resnets.{resnet}" for block in range(3) for resnet in range(3)),
)
_PARTS = {"resnets": ("conv1", "time_emb_proj", "conv2"), "attentions": ("to_q", "to_k", "to_v", "to_out.0")}


def layer_names() -> list[tuple[str, str]]:
    """Return (layer, unit) of a small UNet, in order."""
    found = [("conv_in", "conv_in")]
    for block in _BLOCKS:
        kind = block.split(".")[-2]
        found += [(f"{block}.{part}", block) for part in _PARTS[kind]]
    return [*found, ("conv_out", "conv_out")]


def table_json(*, activations: bool = False) -> dict[str, Any]:
    """Return a table as the task kind `sensitivity` writes it; in the order of names, as canonical JSON is."""
    rng = np.random.default_rng(3)
    layers = {}
    for name, _ in layer_names():
        parameters = int(rng.integers(2_000, 160_000))
        base = float(10 ** rng.normal(-3.6, 0.55))
        layers[name] = {
            "weights": {
                str(bits): {"damage": base * 4.0 ** (3 - bits) * 1.15, "bytes": parameters * bits // 8 + 256}
                for bits in WIDTHS
            },
            "keep": {"damage": 0.0, "bytes": parameters * 2},
            "parameters": parameters,
            "macs": parameters * 64,
        }
        if activations:
            layers[name]["activations"] = {"4": [base * 2, base, base / 2], "8": [base / 64] * 3}
    return {"layers": dict(sorted(layers.items())), "base_bytes": _BESIDE, "unit": dict(layer_names())}


def _psnr(damage: float) -> float:
    return 10 * math.log10(4 / damage)


def _point(
    number: int,
    table: dict[str, Any],
    bits: dict[str, int],
    rng: np.random.Generator,
    *,
    origin: str = "front",
    stage: str = "final",
    **more: Any,
) -> PointRow:
    """Return a point with these bits, measured as its damage predicts and some noise."""
    damage = sum(table["layers"][name]["weights"][str(width)]["damage"] for name, width in bits.items())
    size = _BESIDE + sum(table["layers"][name]["weights"][str(width)]["bytes"] for name, width in bits.items())
    weights = sum(table["layers"][name]["parameters"] for name in bits)
    mean = sum(table["layers"][name]["parameters"] * width for name, width in bits.items()) / weights
    psnr = _psnr(damage) - 1.1 + float(rng.normal(0, 0.35)) - (2.5 if origin.startswith("uniform") else 0.0)
    final = stage == "final"
    reference = np.random.default_rng(0).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)
    noise = rng.normal(0, 2 / 10 ** (psnr / 20), reference.shape).astype(np.float32)
    allocation = Allocation(layers={name: LayerChoice(weight_bits=width) for name, width in bits.items()})
    return PointRow(
        number=number,
        origin=origin,
        stage=stage,
        round=1,
        budget=more.pop("budget", None),
        allocation=allocation,
        digest=allocation.digest,
        predicted={"damage": damage, "psnr_db": _psnr(damage) - 0.9, "bytes": size},
        bytes=size,
        bits_mean=mean,
        bops=2.1e9 * mean,
        psnr_db=psnr,
        psnr_db_ci95=0.28 if final else 0.9,
        fd=2.0 + 300 * damage,
        n=256 if final else 16,
        job=f"{number:012x}",
        seconds=21.0 if final else 6.5,
        saved_seconds=88.0,
        grid=make_strips(reference, reference + noise, tuple(range(4))) if final else None,
        **more,
    )


def _within(table: dict[str, Any], limit: float) -> dict[str, int]:
    """Return the bits that steps with the most damage per byte lead to within a limit of bytes."""
    bits = dict.fromkeys(table["layers"], 2)
    size = _BESIDE + sum(entry["weights"]["2"]["bytes"] for entry in table["layers"].values())
    while True:
        best, gain = None, 0.0
        for name, width in bits.items():
            if width == 8:
                continue
            now, then = (table["layers"][name]["weights"][str(each)] for each in (width, _next(width)))
            cost = then["bytes"] - now["bytes"]
            if size + cost <= limit and (now["damage"] - then["damage"]) / cost > gain:
                best, gain = name, (now["damage"] - then["damage"]) / cost
        if best is None:
            return bits
        now, then = (table["layers"][best]["weights"][str(each)] for each in (bits[best], _next(bits[best])))
        size += then["bytes"] - now["bytes"]
        bits[best] = _next(bits[best])


def _next(width: int) -> int:
    return WIDTHS[WIDTHS.index(width) + 1]


def model_report(name: str = "emoji32", seed: int = 0) -> ModelReport:
    """Return a model whose search is done: a front with releases, baselines, and what was screened only."""
    rng = np.random.default_rng(seed)
    table = table_json()
    least = _BESIDE + sum(entry["weights"]["2"]["bytes"] for entry in table["layers"].values())
    most = _BESIDE + sum(entry["weights"]["8"]["bytes"] for entry in table["layers"].values())
    sizes = np.linspace(least * 1.05, most * 0.97, 9)
    points = [
        _point(
            number,
            table,
            _within(table, size),
            rng,
            origin="budget" if number in (3, 5) else "front",
            budget={3: 1, 5: 2}.get(number),
            on_front=True,
            release=f"{name}-search@{number // 2}" if number in (3, 5) else None,
        )
        for number, size in enumerate(sizes, start=1)
    ]
    number = len(points)
    for width in (3, 4, 5, 6, 8):
        number += 1
        uniform = dict.fromkeys(table["layers"], width)
        points.append(
            _point(
                number, table, uniform, rng, origin=f"uniform-{width}", dropped="beaten by point 5, smaller and better"
            )
        )
    for origin, width in (
        ("mpqdm-kurtosis", 4),
        ("mpqdm-global", 4),
        ("tfmq-exceptions", 4),
        ("qdiffusion-exceptions", 4),
    ):
        number += 1
        bits = {
            each: WIDTHS[min(5, max(0, WIDTHS.index(width) + int(rng.integers(-1, 2))))] for each in table["layers"]
        }
        points.append(_point(number, table, bits, rng, origin=origin, dropped="beaten by point 4, smaller and better"))
    for size in np.linspace(least * 1.1, most * 0.8, 10):
        number += 1
        bits = _within(table, size)
        for each in rng.choice(list(bits), 12):
            bits[str(each)] = int(rng.choice(WIDTHS))
        points.append(
            _point(number, table, bits, rng, origin="refine", stage="screening", dropped="screened: beaten by point 6")
        )
    front = []
    for size in np.linspace(least, most, 14):
        bits = _within(table, size)
        damage = sum(table["layers"][each]["weights"][str(width)]["damage"] for each, width in bits.items())
        front.append((float(size), damage, _psnr(damage) - 0.9))
    return ModelReport(
        name=name,
        digest="e" * 64,
        state="succeeded",
        stage="done",
        layers=tuple(layer_names()),
        points=tuple(points),
        sensitivities=read_sensitivities(table, [layer for layer, _ in layer_names()]),
        front=tuple(front),
        surrogate=Surrogate(28, 0.31),
        costs=(
            StageCost("sensitivity", 61, 0, 130.0, 0.0),
            StageCost("screening", 90, 71, 65.0, 880.0),
            StageCost("final", 204, 130, 410.0, 1600.0),
        ),
    )


def failed_model() -> ModelReport:
    """Return a model whose search failed before anything was measured."""
    return ModelReport(
        name="broken",
        digest="a" * 64,
        state="failed",
        stage="sensitivity",
        layers=(),
        points=(),
        error="sensitivity: weights of conv_in <b>hold NaN</b>",
    )


def search_report(*models: ModelReport) -> SearchReportData:
    """Return a search of these models."""
    return SearchReportData(
        search="0123abcd4567",
        name="emoji",
        description="Smallest files of good quality",
        owner="ada",
        state="succeeded",
        started="2026-12-01T09:00:00Z",
        finished="2026-12-01T09:10:00Z",
        wall_seconds=601.0,
        recipe="fast-w4a8",
        objective="psnr_db",
        budgets=("at most 1.4 MB", "at most 2.0 MB"),
        byte_budgets=(1_400_000, 2_000_000),
        protocol="Final points: DDIMScheduler, 20 steps, eta 0, seeds 0 to 255.",
        screening="Candidates: seeds 2000000 to 2000015.",
        spec_yaml="name: emoji\nmodels: [emoji32]\ndescription: <script>alert(1)</script>\n",
        models=models,
    )
