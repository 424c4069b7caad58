"""What reads one vector of a sample stays packed where the rest is unpacked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from quant_core.runtime import build
from quant_core.runtime.build import build_runtime, layer_runs
from quant_core.runtime.vector_layers import vector_layers
from quant_spec.enums import KernelBackend
from quant_spec.formats import ModelFormat

Make = Callable[[str], nn.Module]
Quantize = Callable[..., ModelFormat]


@pytest.mark.parametrize(("kind", "vectors"), [("unet", ("time_emb", "linear_")), ("dit", ("norm1", "linear_"))])
def test_auto_leaves_them_packed(
    kind: str, vectors: tuple[str, ...], tiny_model: Make, quantize_model: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "prefers_int8_weights", lambda device: True)
    unpacked = {}
    for memory in ("packed", "auto", "fast"):
        model = tiny_model(kind)
        quantize_model(model, bits=4)
        reading = vector_layers(model)
        build_runtime(model, KernelBackend.TRITON, memory=memory)
        runs = [run for run in layer_runs(model) if run.backend is KernelBackend.TRITON]
        unpacked[memory] = {run.layer for run in runs if "unpacked" in run.reason}
        few = {run.layer for run in runs} & reading
    assert few
    assert all(any(part in name for part in vectors) for name in few)
    assert unpacked["packed"] == set()
    assert unpacked["fast"] - unpacked["auto"] == few
    assert unpacked["auto"]
