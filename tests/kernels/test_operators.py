"""The registered operators: schemas, fake kernels and torch.compile, on the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cpu_weight
from kernels.activations import ActivationTable, quantize_by_table, quantize_dynamic
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cpu import cpu_conv2d, cpu_linear
from kernels.cpu_activation import cpu_grid, quantize_cpu
from kernels.cpu_weight import CpuWeight, pack_cpu_weight
from kernels.epilogue import Epilogue, LowRank
from kernels.fp8 import linear_fp8, quantize_fp8
from kernels.gates import Gate, gate_quantize
from kernels.gemm import linear_float, linear_int
from kernels.norms import GroupNorm, LayerNorm, group_norm_quantize, layer_norm_quantize
from tests.kernels.example_layers import random_layer

TABLE = ActivationTable(torch.tensor([0.02, 0.05]), torch.tensor([60.0, 128.0]), 8)
LINEAR = random_layer(12, 40, bits=4).packed
CONV = random_layer(12, 40, bits=4, taps=9).packed
SAME = ConvGeometry((3, 3), padding=(1, 1))
BIAS, UP = torch.linspace(-1, 1, 12), torch.ones(12, 3)


def full(x: Tensor) -> Epilogue:
    hidden = x[..., :3]
    return Epilogue(torch.bfloat16, BIAS, x[..., :12], LowRank(hidden, UP))


def step(x: Tensor) -> Tensor:
    return (x.flatten()[0] > 0).long()


CALLS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "table": ((2, 5, 40), lambda x: quantize_by_table(x, TABLE, step(x)).codes + 1),
    "dynamic": ((2, 5, 40), lambda x: quantize_dynamic(x, 8, symmetric=False, per_token=True).scale * 2),
    "linear_int": (
        (2, 5, 40),
        lambda x: linear_int(quantize_by_table(x, TABLE, step(x)), [LINEAR], full(x)),
    ),
    "linear_float": ((2, 5, 40), lambda x: linear_float(x, [LINEAR], full(x))),
    "conv2d_int": (
        (2, 4, 5, 40),
        lambda x: conv2d_int(quantize_by_table(x, TABLE, step(x)), [CONV], SAME, full(x)),
    ),
    "group_norm": (
        (2, 4, 5, 40),
        lambda x: group_norm_quantize(x, GroupNorm(8, 1e-5), TABLE, step(x)).codes + 1,
    ),
    "layer_norm": ((2, 5, 40), lambda x: layer_norm_quantize(x, LayerNorm(1e-5), 8).codes + 1),
    "gate": ((2, 5, 80), lambda x: gate_quantize(x, Gate.GEGLU, TABLE, step(x)).codes + 1),
    "fp8": ((2, 5, 40), lambda x: linear_fp8(quantize_fp8(x), quantize_fp8(x[0]), Epilogue())),
    "cpu_linear": (
        (2, 5, 40),
        lambda x: cpu_linear(quantize_cpu(x, cpu_grid(TABLE, step(x)), TABLE.bits), CPU_LINEAR, full(x)),
    ),
    "cpu_linear, large": (
        (2, 5, 40),
        lambda x: cpu_linear(quantize_cpu(x, cpu_grid(TABLE, step(x)), TABLE.bits), CPU_LARGE, full(x)),
    ),
    "cpu_conv2d": (
        (2, 4, 5, 40),
        lambda x: cpu_conv2d(quantize_cpu(x, cpu_grid(TABLE, step(x)), TABLE.bits), CPU_CONV, Epilogue(bias=BIAS)),
    ),
}
CPU_LINEAR: CpuWeight = pack_cpu_weight([LINEAR])
CPU_CONV: CpuWeight = replace(pack_cpu_weight([CONV], SAME), small=None)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cpu_weight, "SMALL_MATRIX", 0)
    CPU_LARGE: CpuWeight = pack_cpu_weight([LINEAR])


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_in_one_graph_gives_the_same(name: str) -> None:
    shape, call = CALLS[name]
    x = noise(shape)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        want, got = call(x), compiled(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_a_small_product_in_a_graph_is_that_of_one_native_call_but_for_rounding() -> None:
    """A graph has several operators in place of the call; they add the float32 terms in another order."""
    weight = pack_cpu_weight([CONV], SAME)
    x = quantize_cpu(noise((2, 4, 5, 40)), cpu_grid(TABLE, torch.tensor([0])), TABLE.bits)

    def call(codes: Tensor) -> Tensor:
        return cpu_conv2d(replace(x, codes=codes), weight, Epilogue(bias=BIAS))

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x.codes), call(x.codes), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["table", "dynamic", "linear_int", "linear_float", "conv2d_int", "group_norm", "layer_norm", "gate", "fp8"]
)
def test_schemas_and_fake_kernels_agree_with_what_runs(name: str) -> None:
    shape, call = CALLS[name]
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "quantmill":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        call(noise(shape))
    assert seen
    for operator, arguments in seen:
        # The schema check compares inputs before and after by allclose, which float8 does not have on the CPU.
        checks = ("test_faketensor",) if name == "fp8" else ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)
