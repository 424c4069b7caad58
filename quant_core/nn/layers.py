"""The quantized layer: one module for Conv1d, Conv2d, Conv3d and Linear, whoever chose its codes.

The weight is kept as packed codes of the matrix (C_out, K), K in the order (taps, C_in): channels last, as integer
kernels read it. The same module simulates during reconstruction, is packed, and is loaded; its forward on the reference
backend dequantizes the codes and calls the float operator, which is what every other backend has to equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.affine import dequantize_affine
from kernels.fp8 import FP8
from kernels.packing import pack_codes, packed_size, unpack_codes
from quant_core.nn.activation import ActivationQuantizer, Channels, ChannelScale
from quant_core.nn.differences import LayerMemory
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode, Granularity
from quant_spec.errors import QuantizationError
from quant_spec.formats import LayerSpec
from quant_spec.layer_bits import activation_bits_text, weight_bits_text

# Low bits of a float32's fraction that are zero in what groups multiply.
_SPARE_BITS = 4
CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Quantizable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def weight_matrix(weight: Tensor) -> Tensor:
    """View a weight (C_out, C_in, *kernel) or (C_out, C_in) as (C_out, taps * C_in), channels last within a tap."""
    return weight.flatten(2).transpose(1, 2).flatten(1) if weight.dim() > 2 else weight


def weight_from_matrix(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `weight_matrix` for a weight of `shape`."""
    if len(shape) == 2:
        return matrix
    taps = math.prod(shape[2:])
    return matrix.reshape(shape[0], taps, shape[1]).transpose(1, 2).reshape(shape)


def weight_groups(shape: tuple[int, ...], spec: LayerSpec) -> Tensor:
    """Return the group of scales that each column of the weight matrix uses, shape (K,), dtype int64.

    Parameters
    ----------
    shape : tuple of int
        Of the weight, (C_out, C_in, *kernel).
    """
    channels, taps = shape[1], math.prod(shape[2:])
    if spec.weight.granularity is Granularity.PER_TENSOR:
        return torch.zeros(taps * channels, dtype=torch.long)
    parts = spec.split or (channels,)
    if sum(parts) != channels:
        raise QuantizationError(f"split: got parts {parts}, wanted a sum of {channels} input channels")
    part = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
    if spec.weight.group_size is None:
        return part.repeat(taps)
    within = torch.cat([torch.arange(size) for size in parts]) // spec.weight.group_size
    blocks = torch.unique(part * channels + within, return_inverse=True)[1]
    return (torch.arange(taps)[:, None] * (int(blocks.max()) + 1) + blocks).flatten()


def group_parts(groups: int, spec: LayerSpec) -> Tensor:
    """Return the part of the input that each of `groups` groups is of, shape (G,), dtype int64; see `weight_groups`."""
    if spec.split is None or spec.weight.group_size is None:
        return torch.zeros(groups, dtype=torch.long)
    counts = torch.tensor([math.ceil(size / spec.weight.group_size) for size in spec.split])
    return torch.arange(len(counts)).repeat_interleave(counts).repeat(groups // int(counts.sum()))


def scale_dtype(spec: LayerSpec) -> torch.dtype:
    """Return the dtype that scales are stored in: bfloat16 if each group has one (there are many), else float32."""
    weight = spec.weight
    has_many = weight.granularity is Granularity.PER_GROUP and not weight.is_multiplied
    return torch.bfloat16 if has_many else torch.float32


def exact_scale(scale: Tensor) -> Tensor:
    """Return float32 scales with 20 significant bits: times a multiplier, they are exact in float32."""
    return (scale.float().contiguous().view(torch.int32) >> _SPARE_BITS << _SPARE_BITS).view(torch.float32)


def greatest_code(bits: int | Tensor) -> int | Tensor:
    """Return 2**bits - 1, as a column of float32 for bits of each output channel, shape (C_out,)."""
    return 2**bits - 1 if isinstance(bits, int) else (2.0 ** bits.float() - 1)[:, None]


def check_channel_bits(bits: Tensor, spec: LayerSpec) -> None:
    """Raise QuantizationError unless bits of channels, shape (C_out,), are those that the mixture counts."""
    widths, counts = torch.unique(bits, return_counts=True)
    found = tuple(zip(widths.tolist(), counts.tolist(), strict=True))
    if found != spec.weight.mixture:
        raise QuantizationError(f"channel bits: got (bits, channels) {found}, wanted {spec.weight.mixture}")


def _packed_shape(channels: int, columns: int, spec: LayerSpec) -> tuple[int, ...]:
    """Return the shape of a layer's packed codes."""
    mixture = spec.weight.mixture
    if not mixture:
        return channels, packed_size(columns, spec.weight.bits)
    if sum(count for _, count in mixture) != channels:
        raise QuantizationError(f"mixture: got {mixture}, wanted a sum of {channels} output channels")
    return (sum(count * packed_size(columns, bits) for bits, count in mixture),)


class QuantLayer(nn.Module):
    """A Conv or Linear layer with packed weight codes and, optionally, an activation quantizer per input part.

    Attributes
    ----------
    qweight : Tensor, shape (C_out, ceil(K * bits / 8)), dtype uint8
        Packed codes; of type E4M3 the numbers themselves, shape (C_out, K), dtype float8_e4m3fn. Where channels have
        bits of their own, shape (bytes,): the rows of all channels with the least bits, in order, then of those with
        the next, each row padded to whole bytes.
    channel_bits : Tensor, shape (C_out,), dtype uint8
        Bits of each output channel, where they have bits of their own; else absent.
    scale : Tensor, shape (C_out, G) or (1, 1), dtype float32 (bfloat16 if per group, of which there are many)
        Step size, in weight units per integer step. Where groups have multipliers, shape (C_out, P), float32: one for
        each part of the input.
    zero_point : Tensor, shape (C_out, G) or (1, 1), dtype uint8
        Absent where numbers are E4M3.
    multiplier : Tensor, shape (C_out, G), dtype uint8
        One less than what multiplies the scale of a group, where the format says so; else absent.
    low_rank_down, low_rank_up : Tensor, shapes (R, K) and (C_out, R), dtype bfloat16
        Where the format has a branch: up @ (down @ x) is added for the input x before it is scaled and quantized. K in
        the weight matrix's order.
    bias : Tensor, shape (C_out,), dtype float32, or None
    soft_weight : Tensor, shape of the weight, or None
        While a rounding is learned, the weight that stands in for the codes.
    differences : frozenset of int
        Trajectory steps at which differences are quantized (`quant_core.nn.differences`).
    """

    qweight: Tensor
    channel_bits: Tensor
    scale: Tensor
    zero_point: Tensor
    multiplier: Tensor
    low_rank_down: Tensor
    low_rank_up: Tensor
    bias: Tensor | None

    def __init__(self, layer: Quantizable, spec: LayerSpec, clock: StepClock) -> None:
        super().__init__()
        weight = layer.weight
        self.spec = spec
        self.kind: type[nn.Module] = next(kind for kind in QUANTIZABLE if isinstance(layer, kind))
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype
        self._copy_geometry(layer)
        groups = weight_groups(self.shape, spec)
        self.group_index = groups  # derived from the spec, so not in the state dict
        self.columns = len(groups)
        channels = 1 if spec.weight.granularity is Granularity.PER_TENSOR else self.shape[0]
        grid = (channels, int(groups.max()) + 1)
        if spec.weight.is_float:
            numbers = torch.zeros(self.shape[0], self.columns, dtype=FP8, device=weight.device)
            self.register_buffer("qweight", numbers)
        else:
            packed = _packed_shape(self.shape[0], self.columns, spec)
            self.register_buffer("qweight", torch.zeros(packed, dtype=torch.uint8, device=weight.device))
        if spec.weight.mixture:
            bits = [width for width, count in spec.weight.mixture for _ in range(count)]
            self.register_buffer("channel_bits", torch.tensor(bits, dtype=torch.uint8, device=weight.device))
        scales = (channels, len(spec.split or (0,))) if spec.weight.is_multiplied else grid
        self.register_buffer("scale", torch.ones(scales, dtype=scale_dtype(spec), device=weight.device))
        if not spec.weight.is_float:
            self.register_buffer("zero_point", torch.zeros(grid, dtype=torch.uint8, device=weight.device))
        if spec.weight.is_multiplied:
            self.register_buffer("multiplier", torch.zeros(grid, dtype=torch.uint8, device=weight.device))
        self._make_branch(weight.device)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.act_quantizers = nn.ModuleList(self._make_quantizers(clock, weight.device))
        self.soft_weight: Tensor | None = None
        self.clock = clock
        self.name = "of this model"  # until `quantize_layers` says
        self.differences = frozenset() if spec.activation is None else frozenset(spec.activation.differences)
        self.memory = LayerMemory()
        clock.follows = clock.follows or bool(self.differences)

    def _make_branch(self, device: torch.device) -> None:
        """Make the low-rank branch, if the format has one."""
        rank = self.spec.low_rank
        if not rank:
            return
        if self.kind is not nn.Linear and self.groups > 1:
            raise QuantizationError(f"low_rank: got a convolution of {self.groups} groups, wanted 1")
        for name, shape in (("low_rank_down", (rank, self.columns)), ("low_rank_up", (self.shape[0], rank))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.bfloat16, device=device))

    def _make_quantizers(self, clock: StepClock, device: torch.device) -> list[ActivationQuantizer | ChannelScale]:
        """Make what stands before each part of the input: its quantizer, or only what divides its channels."""
        spec, activation = self.spec, self.spec.activation
        is_linear = self.kind is nn.Linear
        if not is_linear and self.groups > 1 and (spec.channel_scale or spec.channel_shift):
            raise QuantizationError(f"channel_scale: got a convolution of {self.groups} groups, wanted 1")
        parts = [
            Channels(count, -1 if is_linear else 1, spec.channel_scale, spec.channel_shift)
            for count in spec.split or (self.shape[1],)
        ]
        if activation is None:
            return [ChannelScale(part, device) for part in parts] if spec.channel_scale else []
        if not is_linear and activation.mode is ActivationMode.DYNAMIC_TOKEN:
            activation = replace(activation, mode=ActivationMode.DYNAMIC_SAMPLE)  # a kernel's taps share one grid
        return [ActivationQuantizer(activation, clock, device, part) for part in parts]

    def _copy_geometry(self, layer: Quantizable) -> None:
        if isinstance(layer, nn.Linear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
            return
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.padding, self.padding_mode, self.groups = layer.padding, layer.padding_mode, layer.groups
        self.padded = layer._reversed_padding_repeated_twice

    def set_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor, multiplier: Tensor | None = None) -> None:
        """Pack `codes` (C_out, K) uint8 with their grid, all of shape (C_out, G) (or (1, 1)).

        Where the format has multipliers, `scale` is a multiplier times what the channel's groups of a part share.
        """
        self.replace_codes(codes)
        self.zero_point.copy_(zero_point)
        if not self.spec.weight.is_multiplied:
            self.scale.copy_(scale)
            return
        assert multiplier is not None, "the format has multipliers"
        parts = group_parts(multiplier.shape[1], self.spec).tolist()
        first = [parts.index(part) for part in range(self.scale.shape[1])]
        self.scale.copy_((scale / multiplier)[:, first])
        self.multiplier.copy_(multiplier - 1)

    def replace_codes(self, codes: Tensor) -> None:
        """Pack `codes` (C_out, K) uint8, on the grid that the layer has."""
        if self.spec.weight.mixture:
            rows = [pack_codes(codes[channels], bits).flatten() for bits, channels, _ in self.bit_groups()]
            self.qweight.copy_(torch.cat(rows))
        else:
            self.qweight.copy_(pack_codes(codes, self.spec.weight.bits))

    @property
    def steps(self) -> Tensor:
        """Step size of each group, shape (C_out, G) or (1, 1), dtype float32."""
        if not self.spec.weight.is_multiplied:
            return self.scale.float()
        scale, multiplier = self.scale, self.multiplier.float() + 1
        if scale.shape[1] > 1:
            scale = scale[:, group_parts(multiplier.shape[1], self.spec).to(scale.device)]
        return scale * multiplier

    def check_multipliers(self) -> None:
        """Raise QuantizationError if (code - zero_point) times a multiplier is no int8 for some code."""
        if not self.spec.weight.is_multiplied:
            return
        top, zero, multiplier = 2**self.spec.weight.bits - 1, self.zero_point.int(), self.multiplier.int() + 1
        if bool(((zero * multiplier > 128) | ((top - zero) * multiplier > 127)).any()):
            raise QuantizationError(
                f"multiplier: got up to {int(multiplier.max())}, wanted (code - zero_point) * multiplier in an int8"
            )

    def set_numbers(self, numbers: Tensor, scale: Tensor) -> None:
        """Take E4M3 numbers (C_out, K) and their scales, shape (C_out, G) or (1, 1)."""
        self.qweight.copy_(numbers)
        self.scale.copy_(scale)

    def set_branch(self, down: Tensor, up: Tensor) -> None:
        """Take the low-rank branch, shapes (R, K) and (C_out, R); codes must be those of `scaled` weights after it."""
        self.low_rank_down.copy_(down)
        self.low_rank_up.copy_(up)

    def branch(self) -> Tensor | None:
        """Return the weight that the low-rank branch stands for, shape of the weight, float32; None without one."""
        if not self.spec.low_rank:
            return None
        return weight_from_matrix(self.low_rank_up.float() @ self.low_rank_down.float(), self.shape)

    def set_channel_bits(self, bits: Tensor) -> None:
        """Say which output channels have which bits, shape (C_out,), before codes are set; must fit the mixture."""
        check_channel_bits(bits, self.spec)
        self.channel_bits.copy_(bits)

    def bit_groups(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (bits, output channels, their packed rows (n, bytes)) for each width in the mixture, rising."""
        start = 0
        counts = [count for _, count in self.spec.weight.mixture]
        by_width = self.channel_bits.argsort(stable=True).split(counts)  # nonzero() would make the host wait
        for (bits, count), channels in zip(self.spec.weight.mixture, by_width, strict=True):
            size = packed_size(self.columns, bits)
            rows = self.qweight[start : start + count * size].view(count, size)
            yield bits, channels, rows
            start += count * size

    @property
    def bits(self) -> int | Tensor:
        """Bits of the weight, or of each output channel, shape (C_out,)."""
        return self.channel_bits if self.spec.weight.mixture else self.spec.weight.bits

    @property
    def top(self) -> int | Tensor:
        """Greatest code of the weight, or of each output channel, shape (C_out, 1)."""
        return greatest_code(self.bits)

    def set_channel_scale(self, channel_scale: Tensor) -> None:
        """Divide the input's channels by `channel_scale`, shape (C_in,); codes must be those of `scaled` weights."""
        sizes = self.spec.split or (len(channel_scale),)
        for quantizer, part in zip(self.act_quantizers, channel_scale.split(sizes), strict=True):
            quantizer.get_buffer("channel_scale").copy_(part)

    def set_channel_shift(self, shift: Tensor) -> None:
        """Give the input's channels the steps scale * 2**shift, `shift` of shape (S, C_in), dtype uint8."""
        sizes = self.spec.split or (shift.shape[1],)
        for quantizer, part in zip(self.act_quantizers, shift.split(sizes, dim=1), strict=True):
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.channel_shift.copy_(part)

    def scaled(self, weight: Tensor) -> Tensor:
        """Return the weight that codes stand for: `weight` (C_out, C_in, *kernel), less the low-rank branch, scaled."""
        channel_scale, branch = self._channel_scale(), self.branch()
        if branch is not None:
            weight = weight - branch.to(weight.device)
        return weight if channel_scale is None else weight * channel_scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """Undo `scaled`: return the whole weight, for an input whose channels are not divided."""
        channel_scale, branch = self._channel_scale(), self.branch()
        if branch is None:
            return weight if channel_scale is None else (weight / channel_scale).to(weight.dtype)
        return ((weight if channel_scale is None else weight / channel_scale) + branch).to(weight.dtype)

    def with_branch(self, weight: Tensor) -> Tensor:
        """Return what `scaled` gives with the low-rank branch left in."""
        channel_scale, branch = self._channel_scale(), self.branch()
        if branch is None:
            return weight
        return weight + (branch if channel_scale is None else branch * channel_scale)

    def _channel_scale(self) -> Tensor | None:
        """Return the channels' scales, shaped to broadcast against the weight."""
        if not self.spec.channel_scale:
            return None
        channel_scale = torch.cat([part.get_buffer("channel_scale") for part in self.act_quantizers])
        return channel_scale.reshape(1, -1, *(1,) * (len(self.shape) - 2))

    def codes(self) -> Tensor:
        """Return the unpacked codes, shape (C_out, K), dtype uint8."""
        if not self.spec.weight.mixture:
            return unpack_codes(self.qweight, self.spec.weight.bits, self.columns)
        codes = self.qweight.new_empty(self.shape[0], self.columns)
        for bits, channels, rows in self.bit_groups():
            codes[channels] = unpack_codes(rows, bits, self.columns)
        return codes

    @property
    def weight(self) -> Tensor:
        """The weight that the layer multiplies with (scaled), shape of the original, float32 or the model's dtype."""
        if self.soft_weight is not None:
            return self.soft_weight
        if self.spec.weight.is_float:
            scale = self.scale if self.scale.shape[1] == 1 else self.scale[:, self.group_index.to(self.scale.device)]
            return weight_from_matrix(self.qweight.float() * scale, self.shape).to(self.dtype)
        scale, zero_point = self.steps, self.zero_point
        if scale.shape[1] > 1:
            index = self.group_index.to(scale.device)
            scale, zero_point = scale[:, index], zero_point[:, index]
        return weight_from_matrix(dequantize_affine(self.codes(), scale, zero_point), self.shape).to(self.dtype)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Quantize the layer's input, each part of a split one with its own range."""
        if not self.act_quantizers:
            return x
        if self.spec.split is None:
            return self.act_quantizers[0](x)
        dim = -1 if self.kind is nn.Linear else 1
        parts = x.split(self.spec.split, dim=dim)
        return torch.cat([quantizer(part) for quantizer, part in zip(self.act_quantizers, parts, strict=True)], dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the quantized input, in the dtype of `x`.

        Raises
        ------
        TrajectoryError
            If it is in differences between steps, and this step does not follow the last.
        """
        if not self.differences:
            return self.of_quantized(self.quantize_input(x), x)
        output = self._follow(x)
        return output + self.low_rank_output(x) if self.spec.low_rank else output

    def of_quantized(self, quantized: Tensor, x: Tensor) -> Tensor:
        """Return the output for an input x of which `quantize_input` gave `quantized`."""
        output = self._multiply(quantized, self.weight, self.bias)
        return output + self.low_rank_output(x) if self.spec.low_rank else output

    def _follow(self, x: Tensor) -> Tensor:
        """Return the output at a step of a trajectory: what changed is quantized, multiplied and added."""
        step, exact = self.clock.moment[1], x.float()
        if step in self.differences:
            held, output = self.memory.recall(self.clock, exact, self.name)
            change = self.quantize_input(exact - held)
            held = held + self.restored(change)
            output = output + self._multiply(change, self.weight, None)
        else:
            change = self.quantize_input(exact)
            held = self.restored(change)
            output = self._multiply(change, self.weight, self.bias)
        self.memory.keep(self.clock, held, output, for_next=step + 1 in self.differences)
        return output.to(x.dtype, copy=True)  # a model may write to what its layers give

    def restored(self, quantized: Tensor) -> Tensor:
        """Return what `quantize_input` gave in the units of the input: times its channels' scales."""
        channel_scale = self._channel_scale()
        if channel_scale is None:
            return quantized
        return quantized * (channel_scale.flatten() if self.kind is nn.Linear else channel_scale)

    def low_rank_hidden(self, x: Tensor) -> Tensor:
        """Return down @ x of the unquantized input, (..., R) of a Linear, (B, R, *space) of a convolution."""
        return self._multiply(x, weight_from_matrix(self.low_rank_down, (self.spec.low_rank, *self.shape[1:])), None)

    def low_rank_output(self, x: Tensor) -> Tensor:
        """Return up @ (down @ x), what the low-rank branch adds to the output."""
        hidden, up = self.low_rank_hidden(x), self.low_rank_up.to(x.dtype)
        if self.kind is nn.Linear:
            return F.linear(hidden, up)
        return F.linear(hidden.movedim(1, -1), up).movedim(-1, 1)

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Call the float operator with the layer's geometry, in the dtype of `x`."""
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if self.kind is nn.Linear:
            return F.linear(x, weight, bias)
        padding: str | tuple[int, ...] | int = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.padded, mode=self.padding_mode), 0
        return CONVOLUTIONS[self.kind](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        weight, activation = self.spec.weight, self.spec.activation
        act = "float" if activation is None else f"A{activation_bits_text(activation)} {activation.mode}"
        rank = f", rank {self.spec.low_rank} in 16 bits" if self.spec.low_rank else ""
        act = f"{act}, differences at {len(self.differences)} steps" if self.differences else act
        return f"{self.kind.__name__}{self.shape}, W{weight_bits_text(weight)} {weight.granularity}, {act}{rank}"


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name`."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, nn.ModuleList | nn.Sequential):
        owner[int(leaf)] = module
    else:
        setattr(owner, leaf, module)


def quantize_layers(model: nn.Module, specs: Mapping[str, LayerSpec], clock: StepClock) -> dict[str, QuantLayer]:
    """Replace the named layers of `model` in place; their codes are still zero.

    Raises
    ------
    QuantizationError
        If a name is not a Conv or Linear layer of the model.
    """
    made = {}
    for name, spec in specs.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QUANTIZABLE):
            raise QuantizationError(
                f"layer {name}: got {type(layer).__name__}, wanted Conv1d, Conv2d, Conv3d or Linear"
            )
        made[name] = QuantLayer(layer, spec, clock)
        made[name].name = name
        replace_module(model, name, made[name])
    return made
