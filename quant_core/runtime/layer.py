"""A quantized layer that runs on integers: quantize, multiply, scale.

It computes what its `QuantLayer` simulates: the same codes, the same integer sums, scaled in float32. See
docs/adr/0006-runtime.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import native
from kernels.activations import ActivationTable, QuantizedActivation, quantize_by_table, quantize_dynamic
from kernels.backend import is_traced
from kernels.conv import ConvGeometry, conv2d_int
from kernels.cpu import cpu_conv2d, cpu_linear
from kernels.cpu_activation import CpuGrid, cpu_grid, quantize_cpu, quantize_cpu_dynamic
from kernels.cpu_call import SmallCalls
from kernels.cpu_float import FloatWeight, float_product, quantized_values
from kernels.cpu_measure import Timings, measured, why_unpack
from kernels.cpu_weight import CpuWeight
from kernels.epilogue import Epilogue, LowRank
from kernels.fp8 import Fp8Matrix, fp8_scale, linear_fp8, quantize_fp8, to_fp8
from kernels.fp8_measure import Fp8Timings, measured_fp8
from kernels.gates import Gate, gate_quantize, gate_quantize_fp8
from kernels.gemm import linear_float, linear_int
from kernels.norms import GroupNorm, group_norm_quantize, layer_norm_quantize, layer_norm_quantize_fp8
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.differences import LayerMemory
from quant_core.nn.layers import QuantLayer, weight_from_matrix
from quant_core.nn.steps import StepClock
from quant_core.runtime.deferred import Deferred
from quant_core.runtime.following import follow
from quant_core.runtime.lazy import LazyTensor
from quant_core.runtime.normalized import Normalized
from quant_core.runtime.parts import LayerPart, lay_out_parts
from quant_spec.enums import ActivationMode, KernelBackend
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, LayerSpec
from quant_spec.layer_bits import weight_bits_text

if TYPE_CHECKING:
    from kernels.weights import PackedWeight
    from quant_core.runtime.joint_product import JointProduct
    from quant_core.runtime.shared_input import SharedInput

Codes = TypeVar("Codes")


@dataclass(frozen=True, slots=True)
class LayerRun:
    """How one quantized layer runs: its name in the model, the backend, and in a few words how or why."""

    layer: str
    backend: KernelBackend
    reason: str


class RuntimeLayer(nn.Module):
    """A quantized Conv2d or Linear that runs with integer arithmetic; made by `build_runtime`.

    It holds no parameters and no buffers: its tensors are laid out for one backend on one device.

    Attributes
    ----------
    run : LayerRun
    parts : list of LayerPart
        Several if the input is split (`LayerSpec.split`) or its channels' steps differ (`LayerSpec.channel_shift`).
    branch : tuple of Tensor, or None
        `low_rank_down` in the weight's shape, and `low_rank_up` (`QuantLayer`), where the format has a low-rank branch.
    norm : GroupNorm or None
        To normalize the input with before it is quantized, and before SiLU if `silu`; see `take_norm`.
    gate : Gate or None
        The activation of a feed-forward to apply to the input before it is quantized; see `take_gate`.
    normalizes : bool
        Whether it computes the LayerNorm and modulation in front of it; see `take_layer_norms`.
    defers : bool
        Whether its output is multiplied where it is read; see `defer`.
    shared : SharedInput or None
        What keeps the codes of an input that other layers read too; see `share`.
    joint : JointProduct or None
        What multiplies an input for this and other layers at once; `number` is this one's place among them.
    differences : frozenset of int
        Trajectory steps at which differences are quantized; what is kept for them is in `memory`.
    """

    def __init__(
        self, layer: QuantLayer, name: str, backend: KernelBackend, *, unpacked: bool = False, why_floats: str = ""
    ) -> None:
        super().__init__()
        self.spec = layer.spec
        self.kind = layer.kind
        self.shape = layer.shape
        self.device = layer.qweight.device
        self.bias = None if layer.bias is None else layer.bias.clone()  # not a part of the mapped file
        for size in ("in_features", "out_features", "in_channels", "out_channels"):  # what models ask their layers for
            if hasattr(layer, size):
                setattr(self, size, getattr(layer, size))
        self.geometry = _geometry(layer)
        quantizers = layer_quantizers(layer)
        self.clock: StepClock | None = quantizers[0].clock if quantizers else None
        self.activation: ActivationSpec | None = quantizers[0].spec if quantizers else None
        self.parts = lay_out_parts(layer, backend, self.geometry, unpacked=unpacked, floats=bool(why_floats))
        self.branch = _branch(layer)
        how = _how(self.parts, self.activation, layer.spec)
        self.run = LayerRun(name, backend, f"{how}: {why_floats}" if why_floats else how)
        self.norm: GroupNorm | None = None
        self.silu = True
        self.gate: Gate | None = None
        self.normalizes = False
        self.defers = False
        self.shared: SharedInput | None = None
        self.is_last_reader = False
        self.joint: JointProduct | None = None
        self.number = 0
        self.differences = layer.differences
        self.memory = LayerMemory()
        self.calls = self._small_calls()

    def measure(self, timings: Timings) -> str:
        """Let the faster one of a small layer's exact products run, as this CPU was timed; the listing says so.

        Returns why the weight is better unpacked to floats; "" if it is not.
        """
        part = self.parts[0]
        if len(self.parts) > 1 or self.calls is None or not isinstance(part.weight, CpuWeight):
            return ""
        weight, found = measured(part.weight, timings)
        if not found:
            return ""
        self.parts = [replace(part, weight=weight)]
        self.run = replace(self.run, reason=f"{self.run.reason}, {found}")
        self.calls = self._small_calls()
        return why_unpack(weight, timings)

    def measure_fp8(self, timings: Fp8Timings, dtype: torch.dtype) -> None:
        """Let the faster one of a layer's FP8 products run for outputs in `dtype`, as this GPU was timed."""
        part = self.parts[0]
        if len(self.parts) > 1 or self.branch is not None or not isinstance(part.weight, Fp8Matrix):
            return
        weight, found = measured_fp8(part.weight, dtype, timings)
        if found:
            self.parts = [replace(part, weight=weight)]
            self.run = replace(self.run, reason=f"{self.run.reason}, {found}")

    def share(self, shared: SharedInput, *, is_last: bool) -> None:
        """Quantize through what others share from now on; the last of them to be called says so."""
        self.shared, self.is_last_reader = shared, is_last
        if self.calls is None:  # small ones are one call each
            self.run = replace(self.run, reason=f"{self.run.reason}, an input that several read quantized once")

    def join(self, joint: JointProduct, number: int, weight: Fp8Matrix | tuple[PackedWeight, ...]) -> None:
        """Multiply with other layers from now on, where they read one input; `weight` is its view of all weights."""
        self.joint, self.number = joint, number
        self.parts = [replace(self.parts[0], weight=weight)]
        self.run = replace(self.run, reason=f"{self.run.reason}, one product of several layers")

    def take_norm(self, norm: nn.GroupNorm, *, silu: bool = True) -> None:
        """Quantize SiLU(norm(x)) instead of x from now on; for a convolution of one part that has tables.

        On Triton also norm(x), without SiLU, and for a Linear.
        """
        weight, bias = (None if t is None else t.detach().float().clone() for t in (norm.weight, norm.bias))
        self.norm = GroupNorm(norm.num_groups, norm.eps, weight, bias)
        self.silu = silu
        what = "GroupNorm and SiLU" if silu else "GroupNorm"
        self.run = replace(self.run, reason=f"{self.run.reason}, {what} with the quantization")
        self.calls = self._small_calls()

    def take_gate(self, gate: Gate) -> None:
        """Quantize gate(x) instead of x from now on, where x may have twice the channels; for a Linear with tables, or
        of FP8 with ranges per token."""  # fmt: skip
        self.gate = gate
        self.run = replace(self.run, reason=f"{self.run.reason}, {gate} with the quantization")

    def take_layer_norms(self) -> None:
        """Make codes of `Normalized` inputs without computing them; for a Linear with tables or ranges per token."""
        self.normalizes = True
        self.run = replace(self.run, reason=f"{self.run.reason}, LayerNorm and modulation with the quantization")

    def defer(self) -> None:
        """Give `Deferred` outputs, which take up a gate and a sum; for a Linear of one product."""
        self.defers = True
        self.run = replace(self.run, reason=f"{self.run.reason}, gate and sum with the product")

    def _small_calls(self) -> SmallCalls | None:
        """Return what computes the whole layer in one call where it is small; None if it is more than one product."""
        part = self.parts[0]
        if len(self.parts) > 1 or not isinstance(part.weight, CpuWeight) or part.weight.small is None:
            return None
        is_plain = part.table is not None and part.tops is None and not self.differences and self.branch is None
        return SmallCalls(part.weight, self.bias, part.table.bits, self.norm) if is_plain and part.table else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the layer's output plus `residual`.

        Parameters
        ----------
        x : Tensor, shape (B, C, H, W) for a Conv2d, (..., C) for a Linear, floating dtype
        residual : Tensor, shape of the output, floating dtype, optional

        Returns
        -------
        Tensor, shape (B, N, OH, OW) in channels-last order, or (..., N), dtype of `x`

        Raises
        ------
        KernelError
            If shapes disagree.
        TrajectoryError
            If the layer is in differences between steps, and this step does not follow the last.
        """
        if torch.compiler.is_compiling():
            return self._forward(x, residual)
        # Attentions run their layers inside a function mode, which would see each of some thirty calls in vain.
        with torch._C.DisableTorchFunction():
            if self.defers and residual is None and _may_wait(x):
                return Deferred(self, x)
            return self._forward(x, residual)

    def multiply_now(self, x: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        """Return what `Deferred` stands for: the layer's output, times `gate`, shape (B, 1, N), plus `residual`."""
        with torch._C.DisableTorchFunction():
            return self._forward(x, residual, None if gate is None else gate[:, 0])

    def _forward(self, x: Tensor, residual: Tensor | None, gate: Tensor | None = None) -> Tensor:
        if isinstance(x, Deferred) or (isinstance(x, Normalized) and not (self.normalizes and x.is_whole)):
            x = x.value()
        residual = residual.value() if isinstance(residual, LazyTensor) else residual
        rows, out = (t if self.geometry is None or t is None else t.permute(0, 2, 3, 1) for t in (x, residual))
        assert rows is not None
        if self.calls is not None and native.is_usable():
            step = 0 if len(self.parts[0].grids) == 1 or self.clock is None else self.clock.step
            given = None if step is None else self.calls(rows, self.parts[0].grids[step], out)
            if given is not None:
                return given if self.geometry is None else given.permute(0, 3, 1, 2)
        if self.joint is not None and residual is None and not is_traced(x):
            joint = self.joint.output(self.number, self, x)
            if joint is not None:
                return joint
        low_rank = self._low_rank(x)
        if self.differences:
            given = follow(self, rows, out, low_rank, x.dtype)
            return given if self.geometry is None else given.permute(0, 3, 1, 2)
        if low_rank is not None and self.run.backend is KernelBackend.CPU:
            # oneDNN's epilogue has no branch; a residual it has.
            beside = F.linear(low_rank.hidden, low_rank.up)
            low_rank, out = None, beside if out is None else out + beside
        for i, part in enumerate(self.parts):
            is_last, is_first = i == len(self.parts) - 1, i == 0
            dtype = x.dtype if is_last else torch.float32
            epilogue = Epilogue(dtype, self.bias if is_first else None, out, low_rank if is_first else None, gate)
            out = self._multiply(rows if self.gate is not None else part.take(rows), part, epilogue)
        assert out is not None
        return out if self.geometry is None else out.permute(0, 3, 1, 2)

    def _low_rank(self, x: Tensor) -> LowRank | None:
        """Multiply the unquantized input with the first matrix of the branch, in the dtype of `x`."""
        if self.branch is None:
            return None
        down, up = (matrix.to(x.dtype) for matrix in self.branch)
        if self.geometry is None:
            return LowRank(F.linear(x, down), up)
        at = self.geometry
        return LowRank(F.conv2d(x, down, None, at.stride, at.padding, at.dilation).permute(0, 2, 3, 1), up)

    def _multiply(self, x: Tensor, part: LayerPart, epilogue: Epilogue) -> Tensor:
        """Quantize channels-last rows and multiply them with a part's weight."""
        weight = part.weight
        if isinstance(weight, CpuWeight):
            return self.product(self.codes(x, part, self.norm), part, epilogue)
        if isinstance(weight, FloatWeight):
            return float_product(self._values(x, part), weight, epilogue)
        if isinstance(weight, Fp8Matrix):
            numbers = self._once(x, lambda: self._numbers(x, part))
            return linear_fp8(numbers, weight, epilogue, self.run.backend)
        if self.activation is None:
            x = x if part.channel_scale is None else (x / part.channel_scale).to(x.dtype)
            return linear_float(x, weight, epilogue, self.run.backend)
        return self.product(self.codes(x, part, self.norm), part, epilogue)

    def multiply_with(self, x: Tensor, weight: Fp8Matrix | tuple[PackedWeight, ...], bias: Tensor | None) -> Tensor:
        """Quantize rows as this layer does, and multiply them with a weight of several layers."""
        part, epilogue = replace(self.parts[0], weight=weight), Epilogue(x.dtype, bias)
        if isinstance(weight, Fp8Matrix):
            return linear_fp8(self._numbers(x, part), weight, epilogue, self.run.backend)
        assert self.activation is not None
        return linear_int(self._codes(x, part, self.activation, None), weight, epilogue, self.run.backend)

    def codes(self, x: Tensor, part: LayerPart, norm: GroupNorm | None = None) -> QuantizedActivation:
        """Quantize channels-last rows for a part, normalized first if so asked, as the backend takes integers."""
        return self._once(x, lambda: self._own_codes(x, part, norm))

    def _once(self, x: Tensor, make: Callable[[], Codes]) -> Codes:
        """Make what is multiplied of an input, or take what another layer made of it."""
        if self.shared is None or torch.compiler.is_compiling():
            return make()
        step = None if self.clock is None else self.clock.index
        return self.shared.codes(x, step, make, is_last=self.is_last_reader)

    def _own_codes(self, x: Tensor, part: LayerPart, norm: GroupNorm | None) -> QuantizedActivation:
        if isinstance(part.weight, CpuWeight):
            return self._cpu_codes(x, part, norm)
        assert self.activation is not None
        return self._codes(x, part, self.activation, norm)

    def product(self, codes: QuantizedActivation, part: LayerPart, epilogue: Epilogue) -> Tensor:
        """Multiply integer codes with a part's weight."""
        weight = part.weight
        assert not isinstance(weight, Fp8Matrix | FloatWeight), "codes are integers"
        if isinstance(weight, CpuWeight):
            return cpu_linear(codes, weight, epilogue) if self.geometry is None else cpu_conv2d(codes, weight, epilogue)
        if self.geometry is None:
            return linear_int(codes, weight, epilogue, self.run.backend)
        return conv2d_int(codes, weight, self.geometry, epilogue, self.run.backend)

    def _values(self, x: Tensor, part: LayerPart) -> Tensor:
        """Return what the codes of channels-last rows stand for; the rows themselves, if they are not quantized."""
        spec = self.activation
        if spec is None:
            return x.float() if part.channel_scale is None else x.float() / part.channel_scale
        if part.table is None and spec.mode is ActivationMode.DYNAMIC_TOKEN and x.dim() in (2, 3):
            codes = self._codes(x, part, spec, None)
            rows = codes.codes.reshape(len(codes.scale), -1).float()
            return rows.sub_(codes.zero_point[:, None]).mul_(codes.scale[:, None]).view(x.shape)
        if part.table is None or part.tops is not None:
            given = self._cpu_codes(x, part, self.norm)
            runs = given.codes.reshape(given.scale.numel(), -1).float()
            return runs.sub_(given.zero_point[:, None]).mul_(given.scale[:, None]).view(x.shape)
        grid, _ = self._grid(x, part, part.table)
        return quantized_values(x, grid, part.table.bits, norm=self.norm, silu=self.norm is not None)

    def _numbers(self, x: Tensor, part: LayerPart) -> Fp8Matrix:
        """Convert channels-last rows to E4M3, with a scale for each."""
        spec = self.activation
        assert spec is not None
        per_token = spec.mode is ActivationMode.DYNAMIC_TOKEN and x.dim() in (2, 3)
        if isinstance(x, Normalized):
            scale, index = (None, None) if part.table is None else (part.table.scale, self._steps(x, part.table))
            return layer_norm_quantize_fp8(x.source, x.layer_norm(), scale, index, backend=self.run.backend)
        if self.gate is not None:
            return gate_quantize_fp8(x, self.gate, backend=self.run.backend)
        if part.table is None and per_token and part.channel_scale is None:
            return quantize_fp8(x, self.run.backend)
        count = x.numel() // x.shape[-1]
        if part.table is None:
            seen = x.float() if part.channel_scale is None else x / part.channel_scale
            rows = seen.reshape(count if per_token else x.shape[0], -1)
            scale = fp8_scale(rows.abs().amax(1))
        else:
            index = self._steps(x, part.table)
            scale = part.table.scale if index is None else part.table.scale.index_select(0, index.reshape(-1))
        scale = scale.view(-1, 1).expand(-1, count // len(scale)).reshape(*x.shape[:-1], 1)
        divisor = scale if part.channel_scale is None else scale * part.channel_scale
        return Fp8Matrix(to_fp8(x, divisor), scale.reshape(-1))

    def _cpu_codes(self, x: Tensor, part: LayerPart, norm: GroupNorm | None) -> QuantizedActivation:
        if part.table is None:
            assert self.activation is not None
            spec = self.activation
            return quantize_cpu_dynamic(x, spec.bits, symmetric=spec.symmetric, channel_scale=part.channel_scale)
        grid, index = self._grid(x, part, part.table)
        is_int = isinstance(part.weight, CpuWeight)
        needs_sums = isinstance(part.weight, CpuWeight) and part.weight.correction is not None and part.tops is None
        unpadded = self.geometry is None or part.tops is not None or not is_int
        padding = (0, 0) if unpadded or self.geometry is None else self.geometry.padding
        bits = part.table.bits
        codes = quantize_cpu(x, grid, bits, with_sums=needs_sums, padding=padding, norm=norm, silu=norm is not None)
        return _limit_codes(codes, part, index, 0)

    def _grid(self, x: Tensor, part: LayerPart, table: ActivationTable) -> tuple[CpuGrid, Tensor | None]:
        """Return the grids of the step that runs, or of those of each sample, and where in the table they are."""
        step = 0 if len(part.grids) == 1 or self.clock is None else self.clock.step
        is_known = step is not None and not torch.compiler.is_compiling()
        index = None if is_known and part.tops is None else self._steps(x, table)
        return (part.grids[step] if is_known and step is not None else cpu_grid(table, index)), index

    def _codes(self, x: Tensor, part: LayerPart, spec: ActivationSpec, norm: GroupNorm | None) -> QuantizedActivation:
        if isinstance(x, Normalized):
            grid, index = (spec.bits, None) if part.table is None else (part.table, self._steps(x, part.table))
            codes = layer_norm_quantize(
                x.source, x.layer_norm(), grid, index, symmetric=spec.symmetric, backend=self.run.backend
            )
            return _limit_codes(codes, part, index, 2 ** (spec.bits - 1))
        if part.table is None:
            per_token = spec.mode is ActivationMode.DYNAMIC_TOKEN and x.dim() in (2, 3)
            is_cpu = self.run.backend is KernelBackend.CPU
            return quantize_dynamic(
                x,
                spec.bits,
                symmetric=spec.symmetric,
                per_token=per_token,
                channel_scale=part.channel_scale,
                backend=KernelBackend.REFERENCE if is_cpu else self.run.backend,
            )
        index = self._steps(x, part.table)
        if self.gate is not None:
            codes = gate_quantize(x, self.gate, part.table, index, backend=self.run.backend)
        elif norm is None:
            codes = quantize_by_table(x, part.table, index, self.run.backend)
        else:
            codes = group_norm_quantize(x, norm, part.table, index, silu=self.silu, backend=self.run.backend)
        return _limit_codes(codes, part, index, 2 ** (spec.bits - 1))

    def _steps(self, x: Tensor, table: ActivationTable) -> Tensor | None:
        """Return the step of each row of `x`, shape () or (rows,), on its device; None if the table has one entry."""
        if table.scale.numel() == 1 or self.clock is None:
            return None
        index = self.clock.index.to(x.device)
        if index.dim() == 0 or index.shape[0] == x.shape[0]:
            return index
        return index[:, None].expand(-1, x.shape[0] // index.shape[0]).reshape(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RuntimeLayer:
        """Refuse another device; casts leave scales and codes as they are."""
        moved = fn(torch.empty(0, device=self.device)).device
        if moved != self.device:
            raise QuantizationError(
                f"layer {self.run.layer}: got a move to {moved}, but its weights are laid out for the "
                f"{self.run.backend} backend on {self.device}; wanted load_quantized(..., device='{moved}')"
            )
        return self

    def _save_to_state_dict(self, *args: object, **kwargs: object) -> None:
        raise QuantizationError(
            f"layer {self.run.layer}: got a request for its tensors, which are laid out for this machine; wanted a "
            "model loaded with backend='reference'"
        )

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return f"{self.shape}, W{weight_bits_text(self.spec.weight)} {self.spec.weight.granularity}, {self.run.reason}"


def _may_wait(x: Tensor) -> bool:
    """Whether a product of `x` may be computed later: of plain values that nobody traces or differentiates."""
    if type(x) is not Tensor or x.dim() != 3 or x.numel() == 0 or is_traced(x):
        return False
    return not torch.is_autocast_enabled(x.device.type) and not (torch.is_grad_enabled() and x.requires_grad)


def layer_quantizers(layer: QuantLayer) -> list[ActivationQuantizer]:
    """Return the quantizers of a layer's input parts."""
    return [module for module in layer.act_quantizers if isinstance(module, ActivationQuantizer)]


def _geometry(layer: QuantLayer) -> ConvGeometry | None:
    """Return the geometry of a Conv2d, None of a Linear."""
    if layer.kind is nn.Linear:
        return None
    assert not isinstance(layer.padding, str)
    height, width = layer.padding
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    return ConvGeometry((kh, kw), (sh, sw), (height, width), (dh, dw))


def _branch(layer: QuantLayer) -> tuple[Tensor, Tensor] | None:
    """Return copies of a layer's low-rank branch, the first matrix in the shape that its operator takes."""
    rank = layer.spec.low_rank
    if not rank:
        return None
    return weight_from_matrix(layer.low_rank_down.clone(), (rank, *layer.shape[1:])), layer.low_rank_up.clone()


def _limit_codes(codes: QuantizedActivation, part: LayerPart, index: Tensor | None, offset: int) -> QuantizedActivation:
    """Clamp codes to the greatest of their step, where bits differ; `offset` is what stored codes are less by."""
    if part.tops is None:
        return codes
    top = part.tops if index is None else part.tops.index_select(0, index.reshape(-1))
    runs = codes.codes.reshape(len(top), -1)
    limited = torch.minimum(runs, (top - offset).to(runs.dtype)[:, None]).view(codes.codes.shape)
    return replace(codes, codes=limited)


def _how(parts: list[LayerPart], activation: ActivationSpec | None, layer: LayerSpec) -> str:
    """Say in a few words how a layer is computed, and how many bytes its weights take."""
    weight, spec = parts[0].weight, layer.weight
    fewer = " unpacked from fewer bits" if max((bits for bits, _ in spec.mixture), default=spec.bits) < 8 else ""
    if isinstance(weight, Fp8Matrix):
        stored = sum(part.weight.values.numel() for part in parts if isinstance(part.weight, Fp8Matrix))
        how = f"FP8 weights in {stored} bytes, FP8 products"
    elif isinstance(weight, CpuWeight):
        stored = sum(part.weight.nbytes for part in parts if isinstance(part.weight, CpuWeight))
        digits = "" if weight.digits == 1 else f"{weight.digits} digits of "
        how = f"{digits}8-bit weights{fewer} in {stored} bytes, int8 products"
    elif isinstance(weight, FloatWeight):
        stored = sum(part.weight.nbytes for part in parts if isinstance(part.weight, FloatWeight))
        how = f"weights unpacked to float32 in {stored} bytes, float products"
    else:
        widths = " and ".join(str(each.layout.bits) for each in weight)
        stored = sum(each.nbytes for part in parts if isinstance(part.weight, tuple) for each in part.weight)
        unpacked = fewer if weight[0].layout.symmetric else ""
        how = f"{widths}-bit weights{unpacked} in {stored} bytes, {'float' if activation is None else 'int8'} products"
    how = how if len(parts) == 1 else f"{how}, {len(parts)} parts"
    how = f"{how}, of differences" if activation is not None and activation.differences else how
    return f"{how}, a branch of rank {layer.low_rank} in 16 bits" if layer.low_rank else how
