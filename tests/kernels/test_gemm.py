from __future__ import annotations

import importlib
import mmap

import pytest
import torch
from torch import Tensor

from kernels.activations import QuantizedActivation
from kernels.epilogue import Epilogue, LowRank
from kernels.errors import KernelError
from kernels.fp8 import linear_fp8, quantize_fp8
from kernels.gemm import EPILOGUE_TOLERANCE, linear_float, linear_int
from kernels.weights import join_widths
from tests.kernels.example_layers import mixed_layer, random_layer, weight_values
from tests.kernels.test_norms import noise

BACKENDS = ("reference", "triton")


def activation(m: int, k: int, runs: int, *, unit_scale: bool = False, symmetric: bool = False) -> QuantizedActivation:
    g = torch.Generator().manual_seed(m + k)
    codes = torch.randint(-128, 128, (m, k), generator=g, dtype=torch.int8)
    codes[0], codes[-1] = -128, 127
    scale = torch.ones(runs) if unit_scale else torch.rand(runs, generator=g) + 0.1
    zero = torch.randint(-128, 128, (runs,), generator=g, dtype=torch.int32)
    return QuantizedActivation(codes, scale, torch.zeros_like(zero) if symmetric else zero, symmetric)


def to(x: QuantizedActivation, device: str) -> QuantizedActivation:
    return QuantizedActivation(x.codes.to(device), x.scale.to(device), x.zero_point.to(device), x.symmetric)


def whole(x: QuantizedActivation) -> Tensor:
    """code - zero_point of each row, int64."""
    runs = x.zero_point.repeat_interleave(x.codes.shape[0] // len(x.zero_point))
    return x.codes.long() - runs.long()[:, None]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [None, 32, pytest.param(64, marks=pytest.mark.slow), 96])
def test_sums_are_the_definitions_integers(bits: int, group_size: int | None, device: str) -> None:
    layer = random_layer(37, 200, bits=bits, group_size=group_size, unit_scale=True)
    x = activation(42, 200, 42, unit_scale=True)
    want = whole(x) @ layer.integers(200, group_size).t()
    assert int(want.abs().max()) < 2**24  # float32 holds it
    for backend in BACKENDS:
        got = linear_int(to(x, device), [layer.packed.to(device)], Epilogue(), backend)
        assert torch.equal(got.cpu().long(), want), backend


@pytest.mark.parametrize(("bits", "k"), [(4, 200), (2, 640), (4, 256), (6, 200)])
def test_multiplied_groups_are_one_sum(bits: int, k: int, device: str) -> None:
    """Bit for bit: there is one scale for each output channel."""
    layer, x = random_layer(37, k, bits=bits, group_size=32, multiplied=True), activation(42, k, 6)
    want = (whole(x) @ layer.integers(k, 32).t()).float() * layer.scale[:, 0] * x.scale.repeat_interleave(7)[:, None]
    assert (layer.packed.factor is None) == (bits == 6)
    for backend in BACKENDS:
        got = linear_int(to(x, device), [layer.packed.to(device)], Epilogue(), backend)
        assert torch.equal(got.cpu(), want), backend


@pytest.mark.parametrize("bits", [4, 6])
def test_float_activations_of_multiplied_groups(bits: int, device: str) -> None:
    layer = random_layer(33, 520, bits=bits, group_size=64, multiplied=True)
    x = torch.randn(35, 520, generator=torch.Generator().manual_seed(2))
    weight = layer.integers(520, 64).double() * layer.scale.double()
    want, terms = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    for backend in BACKENDS:
        got = linear_float(x.to(device), [layer.packed.to(device)], Epilogue(), backend)
        assert bool(((got.cpu() - want).abs() <= EPILOGUE_TOLERANCE * terms).all()), backend


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 70, 63), (33, 5, 129), (64, 32, 128)])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(8, None, True), (8, None, False), (4, None, False), (4, 64, True)]
)
def test_triton_equals_its_twin(
    m: int, n: int, k: int, bits: int, group_size: int | None, symmetric: bool, device: str
) -> None:
    layer = random_layer(n, k, bits=bits, group_size=group_size, symmetric=symmetric)
    x = activation(m, k, 1, symmetric=symmetric)
    x = to(QuantizedActivation(x.codes.view(m, 1, k), x.scale, x.zero_point, symmetric), device)
    bias = torch.linspace(-1, 1, n, device=device)
    reference, triton = (linear_int(x, [layer.packed.to(device)], Epilogue(bias=bias), backend) for backend in BACKENDS)
    assert triton.shape == (m, 1, n)
    # One scale for all columns: no sum of floats, so the same operations in the same order.
    limit = 0.0 if layer.packed.layout.groups == 1 else EPILOGUE_TOLERANCE * reference.abs().max().item()
    assert (reference - triton).abs().max().item() <= limit


@pytest.mark.parametrize("gated", ["ints", "floats", "fp8"])
@pytest.mark.parametrize("residual", [None, noise(4, 9, 40)])
def test_gates_multiply_runs_of_rows(gated: str, residual: Tensor | None, device: str) -> None:
    layer, gate, bias = random_layer(40, 96, bits=4, group_size=32), noise(2, 48)[:, :40], noise(40)
    there = None if residual is None else residual.to(device)
    epilogue, packed = Epilogue(torch.float16, bias.to(device), there, gate=gate.to(device)), layer.packed.to(device)
    codes = activation(36, 96, 4)
    x8, w8 = quantize_fp8(noise(4, 9, 96).to(device)), quantize_fp8(noise(40, 96).to(device))

    def product(of: Epilogue, backend: str) -> Tensor:
        if gated == "fp8":
            return linear_fp8(x8, w8, of, backend)
        if gated == "floats":
            return linear_float(noise(4, 9, 96).to(device), [packed], of, backend)
        shaped = QuantizedActivation(codes.codes.view(4, 9, 96), codes.scale, codes.zero_point, codes.symmetric)
        return linear_int(to(shaped, device), [packed], of, backend)

    plain = product(Epilogue(bias=bias.to(device)), "reference").cpu()
    want = plain * gate.repeat_interleave(2, 0)[:, None] + (0 if residual is None else residual)
    for backend in BACKENDS:
        got = product(epilogue, backend)
        assert got.dtype is torch.float16
        assert torch.allclose(got.cpu().float(), want, rtol=2e-3, atol=2e-3 * float(plain.abs().max())), backend


def test_a_gate_that_fits_no_rows_is_refused() -> None:
    x, layer = activation(8, 32, 1), random_layer(4, 32, bits=8)
    for gate in (torch.ones(3, 4), torch.ones(2, 5), torch.ones(4)):
        with pytest.raises(KernelError, match="gate: got shape"):
            linear_int(x, [layer.packed], Epilogue(gate=gate))
    with pytest.raises(KernelError, match="wanted none in this operator"):
        Epilogue(gate=torch.ones(1, 4)).check((8, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_whole_epilogue(dtype: torch.dtype, device: str) -> None:
    m, n, k, rank = 35, 40, 96, 19
    layer, x = random_layer(n, k, bits=4, group_size=32), activation(m, k, 5)
    g = torch.Generator().manual_seed(1)
    hidden, up = torch.randn(m, rank, generator=g), torch.randn(n, rank, generator=g)
    bias, residual = torch.randn(n, generator=g), torch.randn(m, n, generator=g)
    plain = linear_int(x, [layer.packed], Epilogue(), "reference")
    want = plain + bias + hidden @ up.t() + residual
    terms = plain.abs().max() + bias.abs().max() + hidden.abs().max() * up.abs().max() * rank + residual.abs().max()
    # Triton's interpreter truncates to bfloat16 where a GPU rounds, so one unit in the last place.
    limit = EPILOGUE_TOLERANCE * terms + torch.finfo(dtype).eps * want.abs() * (dtype != torch.float32)
    low_rank = LowRank(hidden.to(device), up.to(device))
    epilogue = Epilogue(dtype, bias.to(device), residual.to(device), low_rank)
    for backend in BACKENDS:
        got = linear_int(to(x, device), [layer.packed.to(device)], epilogue, backend)
        assert got.dtype == dtype
        assert bool(((got.float().cpu() - want).abs() <= limit).all()), backend


def test_channels_of_different_bits(device: str) -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    parts = [
        random_layer(rows.numel(), 130, bits=bits, unit_scale=True, channel=rows)
        for rows, bits in zip(order.split((7, 20, 10, 13)), (8, 4, 2, 1), strict=True)
    ]
    x = activation(9, 130, 3, unit_scale=True)
    want = torch.zeros(9, 50, dtype=torch.long)
    for part in parts:
        assert part.packed.channel is not None
        want[:, part.packed.channel.long()] = whole(x) @ part.integers(130, None).t()
    bias = torch.arange(50.0)
    for backend in BACKENDS:
        weights = [part.packed.to(device) for part in parts]
        got = linear_int(to(x, device), weights, Epilogue(bias=bias.to(device)), backend)
        assert torch.equal(got.cpu(), want + bias), backend


@pytest.mark.parametrize(
    ("widths", "group_size", "multiplied"),
    [((1, 2, 3, 4, 5, 8), None, False), ((2, 4, 6), 32, True), ((3, 5), None, False), ((2, 4), 96, False)],
)
@pytest.mark.parametrize("k", [130, 256])
def test_all_widths_of_a_layer_are_one_launch(
    widths: tuple[int, ...], group_size: int | None, multiplied: bool, k: int, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit what the definition gives, but where groups have float scales; no record has a launch of its own."""
    gemm = importlib.import_module("kernels._triton.gemm")
    monkeypatch.setattr(gemm, "linear_int_kernel", None)
    weights = [
        each.to(device) for each in join_widths(mixed_layer(k, widths, group_size=group_size, multiplied=multiplied))
    ]
    assert 1 < len(weights) <= 3
    x, bias = to(activation(35, k, 5), device), torch.linspace(-1, 1, 10 * len(widths), device=device)
    want, got = (linear_int(x, weights, Epilogue(bias=bias), backend) for backend in BACKENDS)
    exact = group_size is None or multiplied
    assert (got - want).abs().max().item() <= (0.0 if exact else EPILOGUE_TOLERANCE * want.abs().max().item())


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("group_size", [None, 32, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("m", "dtype"), [(1, torch.float32), (35, torch.float16)])
def test_float_activations(bits: int, group_size: int | None, m: int, dtype: torch.dtype, device: str) -> None:
    layer = random_layer(33, 520, bits=bits, group_size=group_size)
    x = torch.randn(m, 520, generator=torch.Generator().manual_seed(2)).to(dtype)
    group = torch.arange(520) // (group_size or 520)
    weight = layer.integers(520, group_size).double() * layer.scale.double()[:, group]
    want, terms = x.double() @ weight.t(), x.double().abs() @ weight.t().abs()
    for backend in BACKENDS:
        got = linear_float(x.to(device), [layer.packed.to(device)], Epilogue(), backend)
        assert bool(((got.cpu() - want).abs() <= EPILOGUE_TOLERANCE * terms).all()), backend


@pytest.mark.parametrize("k", [96, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_activations_of_mixed_bits_with_the_whole_epilogue(k: int, dtype: torch.dtype, device: str) -> None:
    """In one piece, and with K split, whose pieces another kernel finishes."""
    m, rank, draw = 18, 19, torch.Generator().manual_seed(1)
    order = torch.randperm(40, generator=draw)
    parts = [
        random_layer(rows.numel(), k, bits=bits, channel=rows)
        for rows, bits in zip(order.split((13, 27)), (8, 4), strict=True)
    ]
    x = torch.randn(m, k, generator=draw).to(dtype)
    hidden, up = torch.randn(m, rank, generator=draw), torch.randn(40, rank, generator=draw)
    bias, residual = torch.randn(40, generator=draw), torch.randn(m, 40, generator=draw)
    weight = torch.zeros(40, k, dtype=torch.float64)
    for part in parts:
        assert part.packed.channel is not None
        weight[part.packed.channel.long()] = part.integers(k, None).double() * part.scale.double()
    want = x.double() @ weight.t() + bias + hidden.double() @ up.double().t() + residual
    terms = x.double().abs() @ weight.t().abs() + bias.abs() + hidden.abs() @ up.abs().t() + residual.abs()
    low_rank = LowRank(hidden.to(device), up.to(device))
    epilogue = Epilogue(torch.float32, bias.to(device), residual.to(device), low_rank)
    for backend in BACKENDS:
        got = linear_float(x.to(device), [part.packed.to(device) for part in parts], epilogue, backend)
        assert bool(((got.cpu() - want).abs() <= EPILOGUE_TOLERANCE * terms).all()), backend


def test_inputs_may_be_strided(device: str) -> None:
    layer = random_layer(8, 40, bits=4, unit_scale=True)
    base = activation(80, 80, 1, unit_scale=True)
    weights = [layer.packed.to(device)]
    for codes in (base.codes[:5, 3:43], base.codes[::7, :40], base.codes.t()[:6, ::2], base.codes[:40, :5].t()):
        x = QuantizedActivation(codes, base.scale, base.zero_point, False)
        got = linear_int(to(x, device), weights, Epilogue(), "triton")
        assert torch.equal(got.cpu().long(), whole(x) @ layer.integers(40, None).t())


def test_rows_may_lie_beyond_32_bit_offsets() -> None:
    if torch.cuda.is_available():
        pytest.skip("the sparse mapping is host memory")
    base = activation(4, 16, 1, unit_scale=True)
    far = torch.frombuffer(mmap.mmap(-1, 3 * 2**30 + 64), dtype=torch.int8).as_strided((4, 16), (2**30, 1))
    far.copy_(base.codes)
    layer = random_layer(3, 16, bits=8, unit_scale=True)
    x = QuantizedActivation(far, base.scale, base.zero_point, False)
    got = linear_int(x, [layer.packed], Epilogue(), "triton")
    assert torch.equal(got.long(), whole(base) @ layer.integers(16, None).t())


def test_no_rows_give_no_rows(device: str) -> None:
    layer = random_layer(8, 40, bits=4)
    for backend in BACKENDS:
        got = linear_float(torch.zeros(0, 40, device=device), [layer.packed.to(device)], Epilogue(), backend)
        assert got.shape == (0, 8)


def test_what_does_not_fit_is_refused() -> None:
    layer, x = random_layer(8, 40, bits=4), activation(5, 40, 1)
    with pytest.raises(KernelError, match="got 1 taps of 40 channels, wanted 1 of 39"):
        linear_float(torch.zeros(2, 39), [layer.packed], Epilogue())
    with pytest.raises(KernelError, match="linear: got 2 scales for 5 rows, wanted equal runs"):
        linear_int(QuantizedActivation(x.codes, torch.ones(2), torch.zeros(2), False), [layer.packed], Epilogue())
    with pytest.raises(KernelError, match="got 2 parts, wanted one, or several that name"):
        linear_int(x, [layer.packed, layer.packed], Epilogue())
    with pytest.raises(KernelError, match=r"bias: got shape \(7,\), wanted \(8,\)"):
        linear_int(x, [layer.packed], Epilogue(bias=torch.zeros(7)))
    with pytest.raises(KernelError, match="residual: got shape"):
        linear_int(x, [layer.packed], Epilogue(residual=torch.zeros(8, 5)))
    with pytest.raises(KernelError, match="low-rank branch: got"):
        linear_int(x, [layer.packed], Epilogue(low_rank=LowRank(torch.zeros(5, 3), torch.zeros(8, 2))))
    with pytest.raises(KernelError, match=r"output dtype: got torch.int8"):
        linear_int(x, [layer.packed], Epilogue(torch.int8))
    with pytest.raises(KernelError, match=r"x: got dtype torch.int32"):
        linear_float(torch.zeros(2, 40, dtype=torch.int32), [layer.packed], Epilogue())


@pytest.mark.gpu
@pytest.mark.parametrize("m", [3, 4096])
@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (4, 64), (8, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_activations_of_real_sizes_on_a_gpu(
    m: int, bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    layer = random_layer(2560, 640, bits=bits, group_size=group_size).packed.to("cuda")
    x = torch.randn(m, 640, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    reference, triton = (linear_float(x, [layer], Epilogue(), backend) for backend in BACKENDS)
    weight = weight_values(layer)[:, 0].abs()
    assert bool(((reference - triton).abs() <= EPILOGUE_TOLERANCE * (x.float().abs() @ weight.t())).all())


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 64])
def test_real_sizes_on_a_gpu(bits: int, group_size: int | None) -> None:
    layer, x = random_layer(2560, 640, bits=bits, group_size=group_size), activation(4096, 640, 8)
    reference, triton = (linear_int(to(x, "cuda"), [layer.packed.to("cuda")], Epilogue(), b) for b in BACKENDS)
    assert (reference - triton).abs().max() <= EPILOGUE_TOLERANCE * reference.abs().max()
    graph, x_gpu, weights = torch.cuda.CUDAGraph(), to(x, "cuda"), [layer.packed.to("cuda")]
    linear_int(x_gpu, weights, Epilogue(), "triton")
    with torch.cuda.graph(graph):
        captured = linear_int(x_gpu, weights, Epilogue(), "triton")
    graph.replay()
    assert torch.equal(captured, triton)
