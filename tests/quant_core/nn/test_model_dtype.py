"""The dtype that a model computes in, whatever its weights are held in while they don't run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quant_core.errors import UnknownTimestepError
from quant_core.nn.model_dtype import model_dtype
from quant_core.nn.steps import StepClock, attach_clock

Make = Callable[[str], nn.Module]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_the_first_floating_parameter(tiny_model: Make, dtype: torch.dtype) -> None:
    assert model_dtype(tiny_model("unet").to(dtype)) is dtype
    assert model_dtype(nn.Identity()) is torch.float32


@pytest.mark.parametrize("held", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_computes_in_another_than_weights_are_held_in(tiny_model: Make, held: torch.dtype) -> None:
    model = tiny_model("unet")
    attach_clock(model, StepClock((900, 500)))
    model.enable_layerwise_casting(storage_dtype=held, compute_dtype=torch.float32)  # type: ignore[operator]
    assert held in {parameter.dtype for parameter in model.parameters()}
    assert model_dtype(model) is torch.float32
    x, label = torch.randn(1, 3, 8, 8), torch.tensor([0])
    with torch.no_grad():
        model(x, torch.tensor(900.0), label)
        # a step is not found farther away because weights are held in few bits
        with pytest.raises(UnknownTimestepError, match="got 902"):
            model(x, torch.tensor(902.0), label)
