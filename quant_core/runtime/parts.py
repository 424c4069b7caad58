"""A quantized layer laid out for one backend: parts of its input channels, each an integer product of its own.

The layer is the sum of its parts, whose integers are scaled in float. They are

    split inputs      the tensors that are concatenated to form the input, with grids and weight scales of their own;
    channel shifts    one part for each exponent that occurs: sum_k 2**shift_k q_k w_k = sum_d 2**d sum_{k: shift_k = d}
                      q_k w_k, with 2**d in the part's activation scale. The most frequent exponent's part takes all
                      channels and the weight as it is; the others take the channels that have theirs at some step.
                      What has another exponent at the step that runs is divided by infinity: its code is the zero
                      point, which adds nothing to the sum. (An infinite activation gives NaN there, where the
                      reference saturates.)

The layer's `channel_scale` is part of the vector that channels are divided by. Which channels a part takes never
depends on the step, so nothing is chosen at run time but a row of a table, and a batch may mix steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.activations import ActivationTable
from kernels.conv import ConvGeometry
from kernels.cpu_activation import CpuGrid, cpu_grid
from kernels.cpu_float import FloatWeight, unpack_float_weight
from kernels.cpu_weight import CpuWeight, pack_cpu_weight
from kernels.fp8 import Fp8Matrix
from kernels.packing import pack_codes, unpack_codes
from kernels.weights import PackedWeight, join_widths, pack_weight, unpack_weight
from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.layers import QuantLayer
from quant_spec.enums import Granularity, KernelBackend


@dataclass(frozen=True, slots=True)
class LayerPart:
    """Some input channels of a layer: their weight, and the grids of their activations.

    Attributes
    ----------
    start, stop : int
        The channels, or where they lie if `channels` names them.
    weight : CpuWeight, FloatWeight, Fp8Matrix or tuple of PackedWeight
        One record for each width of weight codes; one matrix of E4M3 numbers, or of floats.
    channels : Tensor, shape (n,), dtype int64, or None
        The layer's input channels, where they are not all from `start` to `stop`.
    channel_scale : Tensor, shape (stop - start,), dtype float32, or None
        What channels are divided by before grids are taken at run time, or where nothing is quantized; `table` holds it
        otherwise, but for E4M3.
    table : ActivationTable or None
        None if grids are taken at run time, or the input is not quantized. Of E4M3 numbers, scales alone matter.
    tops : Tensor, shape (S,), dtype int32, or None
        Greatest code of each trajectory step, where their bits differ.
    grids : tuple of CpuGrid
        Those of `table`, one for each step; on the CPU only.
    restore : Tensor, shape (n,), dtype float32, or None
        What the part's channels are divided by beside the scales of `table`, but for powers of two.
    """

    start: int
    stop: int
    weight: CpuWeight | FloatWeight | Fp8Matrix | tuple[PackedWeight, ...]
    channels: Tensor | None
    channel_scale: Tensor | None
    table: ActivationTable | None
    tops: Tensor | None
    grids: tuple[CpuGrid, ...] = ()
    restore: Tensor | None = None

    def take(self, rows: Tensor) -> Tensor:
        """Return the part's channels of rows (..., C)."""
        if self.channels is not None:
            return rows.index_select(-1, self.channels)
        return rows if self.stop - self.start == rows.shape[-1] else rows[..., self.start : self.stop]


def lay_out_parts(
    layer: QuantLayer,
    backend: KernelBackend,
    geometry: ConvGeometry | None,
    *,
    unpacked: bool = False,
    floats: bool = False,
) -> list[LayerPart]:
    """Lay out a layer for the Triton or the CPU backend.

    Parameters
    ----------
    layer : QuantLayer
        A Linear or an ungrouped Conv2d, with hard codes.
    backend : KernelBackend
    geometry : ConvGeometry or None
        None for a Linear.
    unpacked : bool
        Keep one int8 a weight where that is exact and the input is quantized; of the Triton backend.
    floats : bool
        Keep one float32 a weight; of the CPU backend.

    Raises
    ------
    KernelError, BackendUnavailableError
        If the backend can't multiply these weights exactly.
    """
    parts = []
    for number in range(len(layer.spec.split or (0,))):
        quantizer = layer.act_quantizers[number] if layer.spec.activation is not None else None
        assert quantizer is None or isinstance(quantizer, ActivationQuantizer)
        parts += [
            _part(layer, number, backend, geometry, quantizer, shift, unpacked=unpacked, floats=floats)
            for shift in (_shifts(quantizer) if quantizer is not None and layer.spec.channel_shift else (None,))
        ]
    return parts


def _shifts(quantizer: ActivationQuantizer) -> tuple[int, ...]:
    """Return the exponents that occur in a table, the most frequent one first."""
    values, counts = torch.unique(quantizer.channel_shift, return_counts=True)
    return tuple(values[counts.argsort(descending=True, stable=True)].tolist())


def _part(
    layer: QuantLayer,
    number: int,
    backend: KernelBackend,
    geometry: ConvGeometry | None,
    quantizer: ActivationQuantizer | None,
    shift: int | None,
    *,
    unpacked: bool,
    floats: bool,
) -> LayerPart:
    """Lay out part `number` of the input, or its channels of exponent `shift`."""
    sizes = layer.spec.split or (layer.shape[1],)
    start, stop = sum(sizes[:number]), sum(sizes[: number + 1])
    own = None
    if quantizer is not None and shift is not None and shift != _shifts(quantizer)[0]:
        own = _whole_groups((quantizer.channel_shift == shift).any(0), layer.spec.weight.group_size)
    if layer.spec.weight.is_float:
        assert quantizer is not None, "a layer without E4M3 inputs runs the reference"
        return _fp8_part(layer, number, quantizer, start, stop)
    weights = _pack(layer, number, own)
    if unpacked and quantizer is not None and backend is KernelBackend.TRITON:
        weights = unpack_weight(weights)
    weight: CpuWeight | FloatWeight | tuple[PackedWeight, ...] = weights
    if backend is KernelBackend.CPU:
        weight = unpack_float_weight(weights, geometry) if floats else pack_cpu_weight(weights, geometry)
    channels = None if own is None else own + start
    if quantizer is None or quantizer.spec.is_dynamic:
        channel_scale = None
        if layer.spec.channel_scale:
            channel_scale = layer.act_quantizers[number].get_buffer("channel_scale").clone()
        return LayerPart(start, stop, weight, channels, channel_scale, None, None)
    table = _table(quantizer, own, shift)
    tops = quantizer.tops.to(layer.qweight.device, torch.int32) if quantizer.spec.step_bits else None
    grids: tuple[CpuGrid, ...] = ()
    if backend is KernelBackend.CPU:
        grids = tuple(cpu_grid(table, torch.tensor(step)) for step in range(table.scale.numel()))
    restore = None
    if layer.spec.channel_scale:
        restore = (quantizer.channel_scale if own is None else quantizer.channel_scale[own]).clone()
    return LayerPart(start, stop, weight, channels, None, table, tops, grids, restore)


def _fp8_part(layer: QuantLayer, number: int, quantizer: ActivationQuantizer, start: int, stop: int) -> LayerPart:
    """Lay out part `number` of the input of a Linear or a convolution of 1 x 1, of E4M3 numbers."""
    scale = layer.scale[:, 0 if layer.scale.shape[1] == 1 else number].expand(layer.shape[0])
    weight = Fp8Matrix(layer.qweight[:, start:stop].clone(), scale.clone())
    channel_scale = quantizer.channel_scale.clone() if layer.spec.channel_scale else None
    table = None
    if not quantizer.spec.is_dynamic:
        table = ActivationTable(quantizer.scale.clone(), quantizer.zero_point.clone(), quantizer.spec.bits, True)
    return LayerPart(start, stop, weight, None, channel_scale, table, None)


def is_pointwise(layer: QuantLayer) -> bool:
    """Whether a convolution is a Linear over pixels: 1 x 1, of stride 1 and one group, nothing padded."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding in (0, (0, 0)) and layer.groups == 1


def _whole_groups(taken: Tensor, group_size: int | None) -> Tensor:
    """Return the channels that are `taken`, shape (C,) bool, with all others of their scale groups, rising."""
    if group_size is not None:
        group = torch.arange(len(taken), device=taken.device) // group_size
        taken = torch.isin(group, group[taken])
    return taken.nonzero()[:, 0]


def _table(quantizer: ActivationQuantizer, own: Tensor | None, shift: int | None) -> ActivationTable:
    """Return the grids of the channels `own` (of all), those of other exponents than `shift` left out."""
    spec = quantizer.spec
    # Copies: a view would keep the file that it came from mapped.
    scale, zero_point = (
        quantizer.scale.clone() if shift is None else quantizer.scale * 2.0**shift,
        quantizer.zero_point.clone(),
    )
    input_scale = None
    if quantizer.channels is not None and (quantizer.channels.scaled or shift is not None):
        input_scale = scale[:, None].expand(-1, quantizer.channels.count)
        if quantizer.channels.scaled:
            input_scale = input_scale * quantizer.channel_scale
        if shift is not None:
            input_scale = torch.where(quantizer.channel_shift == shift, input_scale, torch.inf)
        input_scale = (input_scale if own is None else input_scale[:, own]).contiguous()
    return ActivationTable(scale, zero_point, spec.bits, spec.symmetric, input_scale)


def _pack(layer: QuantLayer, number: int, own: Tensor | None) -> tuple[PackedWeight, ...]:
    """Give the kernels some columns of a layer, (N, taps, channels), a record for each width that codes are stored in.

    They are the channels of part `number` of the input, or of those the channels `own`, which are whole scale groups.
    """
    spec, sizes = layer.spec.weight, layer.spec.split or (layer.shape[1],)
    taps, start = layer.columns // layer.shape[1], sum(sizes[:number])
    size = sizes[number] if own is None else len(own)
    is_whole = len(sizes) == 1 and own is None
    columns = torch.arange(start, start + size) if own is None else own + start
    scale, zero, multiplier = _grid(layer, number, own)
    rows = list(layer.bit_groups()) if spec.mixture else [(spec.bits, None, layer.qweight)]
    made = []
    for bits, outputs, qweight in rows:
        if not is_whole:
            codes = unpack_codes(qweight, bits, layer.columns).view(-1, taps, layer.shape[1])
            qweight = pack_codes(codes[..., columns.to(codes.device)].flatten(1), bits)
        grid = (scale, zero) if outputs is None else (scale[outputs], zero[outputs])
        made.append(
            pack_weight(
                qweight,
                *grid,
                bits=bits,
                channels=size,
                taps=taps,
                group_size=spec.group_size,
                channel=outputs,
                multiplier=multiplier,
            )
        )
    return join_widths(made)


def _grid(layer: QuantLayer, number: int, own: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return scales, zero points and multipliers, (N, G) or (1, 1), of the columns that `_pack` takes."""
    spec, sizes = layer.spec.weight, layer.spec.split or (layer.shape[1],)
    if spec.granularity is Granularity.PER_TENSOR:
        return layer.scale, layer.zero_point, None
    counts = [1 if spec.group_size is None else math.ceil(each / spec.group_size) for each in sizes]
    taps = 1 if spec.group_size is None else layer.columns // layer.shape[1]
    first, last = sum(counts[:number]), sum(counts[: number + 1])
    groups = torch.arange(first, last, device=layer.scale.device)
    if own is not None and spec.group_size is not None:
        groups = groups[torch.unique(own // spec.group_size)]
    tensors = (layer.zero_point, layer.multiplier if spec.is_multiplied else layer.scale)
    zero, each = (t.view(len(t), taps, -1)[..., groups].flatten(1) for t in tensors)
    return (layer.scale[:, number : number + 1], zero, each.int() + 1) if spec.is_multiplied else (each, zero, None)
