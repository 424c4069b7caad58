"""How numbers are stored: formats of a weight, an activation, a layer, an attention, a unit and a whole model.

All are frozen, validated records that become JSON. `ModelFormat` is the `quantization_config` of a packed model. None
says how the range of a number was found (that is `quant_spec.ranges.RangeSpec`), nor leaves anything to be chosen (that
is `quant_spec.planned`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from quant_spec.enums import ActivationMode, Granularity, GroupScale, NumberType, UnknownTimestep
from quant_spec.errors import QuantizationError

SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
#: Greatest exponent of power-of-two channel steps (DMQ's D); kernels shift weight codes by that much at most.
SHIFT_DEPTH = 3
#: Bits of single output channels where they differ within a layer.
CHANNEL_BITS = (1, *SUPPORTED_BITS)
#: Bits of an E4M3 number.
E4M3_BITS = 8
#: Bits of the whole number that multiplies a group's codes; it stands for 1 more than is stored.
MULTIPLIER_BITS = 4
GREATEST_MULTIPLIER = 2**MULTIPLIER_BITS
#: Greatest width of codes that leaves room for a multiplier in an int8.
MULTIPLIED_BITS = 6
#: Bits of probabilities that are not quantized.
EXACT_SOFTMAX_BITS = 16
#: Bits of a number of a low-rank branch, a bfloat16: exact in whatever dtype a model computes in.
LOW_RANK_BITS = 16


def check_bits(bits: int, what: str) -> None:
    """Raise QuantizationError unless `bits` is a width that packing supports."""
    if bits not in SUPPORTED_BITS:
        raise QuantizationError(f"{what}: got {bits} bits, wanted one of {', '.join(map(str, SUPPORTED_BITS))}")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Format of a layer's weight codes.

    The weight is the matrix (C_out, K), K = kernel taps x C_in. One scale and zero point is shared per_tensor by all of
    it, per_channel by one output channel (within one part of a split input), per_group by `group_size` consecutive
    input channels of one tap. With `group_scale` integer, a group's scale is a whole number times its output channel's
    scale, such that (code - zero_point) times that number fits in an int8 (docs/adr/0017-integer-group-scales.md).

    `mixture` has (bits, number of output channels) in rising order, where channels have bits of their own; `bits` is
    then the greatest. Which channel has which is stored with the layer's codes.

    Numbers of type E4M3 have 8 bits and scales per channel or tensor, no zero points; `symmetric` means nothing there.
    """

    bits: int
    symmetric: bool = False
    granularity: Granularity = Granularity.PER_CHANNEL
    group_size: int | None = None
    mixture: tuple[tuple[int, int], ...] = ()
    type: NumberType = NumberType.INT
    group_scale: GroupScale = GroupScale.FLOAT

    def __post_init__(self) -> None:
        check_bits(self.bits, "weight")
        object.__setattr__(self, "type", NumberType(self.type))
        object.__setattr__(self, "granularity", Granularity(self.granularity))
        object.__setattr__(self, "group_scale", GroupScale(self.group_scale))
        object.__setattr__(self, "mixture", tuple((int(bits), int(count)) for bits, count in self.mixture))
        self._check_mixture()
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            raise QuantizationError(
                f"group_size: got {self.group_size} with granularity {self.granularity}, "
                "wanted a size exactly for per_group"
            )
        if self.is_multiplied and (self.group_size is None or self.bits > MULTIPLIED_BITS):
            raise QuantizationError(
                f"group_scale: got integer with {self.bits} bits {self.granularity}, wanted per_group with "
                f"{MULTIPLIED_BITS} bits at most"
            )
        if self.is_float and (self.bits != E4M3_BITS or self.group_size is not None or self.mixture):
            raise QuantizationError(
                f"weight type: got e4m3 with {self.bits} bits {self.granularity}, wanted 8 bits per_channel or "
                "per_tensor"
            )

    @property
    def is_float(self) -> bool:
        """Whether numbers are E4M3."""
        return self.type is NumberType.E4M3

    @property
    def is_multiplied(self) -> bool:
        """Whether scales of groups are whole numbers times the output channel's."""
        return self.group_scale is GroupScale.INTEGER

    def with_bits(self, bits: int) -> Self:
        """Return the format at another width; scales are per channel where that leaves no room for multipliers."""
        if self.is_multiplied and bits > MULTIPLIED_BITS:
            return replace(
                self, bits=bits, granularity=Granularity.PER_CHANNEL, group_size=None, group_scale=GroupScale.FLOAT
            )
        return replace(self, bits=bits)

    def _check_mixture(self) -> None:
        """Refuse bits of channels that do not fit the rest."""
        widths = [bits for bits, _ in self.mixture]
        if not widths:
            return
        if widths != sorted(set(widths) & set(CHANNEL_BITS)) or min(count for _, count in self.mixture) < 1:
            raise QuantizationError(
                f"mixture: got {self.mixture}, wanted (bits, channels) with bits rising, each one of "
                f"{', '.join(map(str, CHANNEL_BITS))}, for at least 1 channel"
            )
        if widths[-1] != self.bits or self.granularity is not Granularity.PER_CHANNEL:
            raise QuantizationError(
                f"mixture: got a greatest of {widths[-1]} bits with {self.bits} bits {self.granularity}, wanted that "
                "as bits, and per_channel"
            )

    @property
    def bits_mean(self) -> float:
        """Bits, averaged over the weights: all output channels have as many."""
        if not self.mixture:
            return float(self.bits)
        return sum(bits * count for bits, count in self.mixture) / sum(count for _, count in self.mixture)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; it says nothing of a mixture where there is none."""
        return {
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity.value,
            "group_size": self.group_size,
            **({"mixture": [list(entry) for entry in self.mixture]} if self.mixture else {}),
            **({"type": self.type.value} if self.is_float else {}),
            **({"group_scale": self.group_scale.value} if self.is_multiplied else {}),
        }


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """Format of a layer's input codes; one scale and zero point per tensor (per part, step, sample or token).

    `step_bits` has the bits of each trajectory step, where they differ; `bits` is then the greatest. Numbers of type
    E4M3 have 8 bits and zero points of 0; `symmetric` means nothing there.

    `differences` has the trajectory steps, rising, at which codes are those of the difference to what the step before
    stood for; it never has step 0.
    """

    bits: int
    symmetric: bool = False
    mode: ActivationMode = ActivationMode.PER_STEP
    step_bits: tuple[int, ...] = ()
    type: NumberType = NumberType.INT
    differences: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_bits(self.bits, "activation")
        object.__setattr__(self, "mode", ActivationMode(self.mode))
        object.__setattr__(self, "step_bits", tuple(self.step_bits))
        object.__setattr__(self, "differences", tuple(self.differences))
        object.__setattr__(self, "type", NumberType(self.type))
        if self.is_float and (self.bits != E4M3_BITS or self.step_bits):
            raise QuantizationError(f"activation type: got e4m3 with {self.bits} bits, wanted 8 at every step")
        for bits in self.step_bits:
            check_bits(bits, "activation step")
        if self.step_bits and (self.mode is not ActivationMode.PER_STEP or self.bits != max(self.step_bits)):
            raise QuantizationError(
                f"step_bits: got a greatest of {max(self.step_bits)} with {self.bits} bits {self.mode}, "
                "wanted that as bits, and per_step"
            )
        self._check_differences()

    def _check_differences(self) -> None:
        """Refuse differences at steps that can have none."""
        steps = list(self.differences)
        if not steps:
            return
        if self.is_float or self.mode is not ActivationMode.PER_STEP:
            raise QuantizationError(f"differences: got {self.type} codes {self.mode}, wanted int codes per_step")
        last = len(self.step_bits) or steps[-1] + 1
        if steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] >= last:
            raise QuantizationError(f"differences: got steps {steps}, wanted rising ones within 1 to {last - 1}")

    @property
    def bits_mean(self) -> float:
        """Bits, averaged over the trajectory."""
        return sum(self.step_bits) / len(self.step_bits) if self.step_bits else float(self.bits)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; bits that do not differ between steps are not repeated."""
        return {
            "bits": self.bits,
            "symmetric": self.symmetric,
            "mode": self.mode.value,
            **({"step_bits": list(self.step_bits)} if self.step_bits else {}),
            **({"type": self.type.value} if self.is_float else {}),
            **({"differences": list(self.differences)} if self.differences else {}),
        }

    @property
    def is_float(self) -> bool:
        """Whether numbers are E4M3."""
        return self.type is NumberType.E4M3

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are taken at run time."""
        return self.mode in (ActivationMode.DYNAMIC_SAMPLE, ActivationMode.DYNAMIC_TOKEN)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One quantized Conv or Linear layer.

    `split` gives the channel counts of the tensors that are concatenated to form its input (Q-Diffusion's shortcut
    split, Sec. 4.3): each part has its own activation range and its own weight scales.

    `channel_scale`: whether each input channel k is divided by a number of its own, channel_scale_k, within the
    activation quantizer's own division; the codes are then those of channel_scale_k * weight (equivalent scaling). An
    input that is not quantized is divided all the same.
    `channel_shift`: whether, at each trajectory step, channel k has the quantization step scale * 2**shift_k
    (power-of-two scaling).

    `low_rank`: rank of a branch beside the codes, two matrices of bfloat16 that multiply the unquantized input
    (SVDQuant); 0 where there is none. The codes are then those of what is left of the weight.
    """

    weight: WeightSpec
    activation: ActivationSpec | None = None
    split: tuple[int, ...] | None = None
    channel_scale: bool = False
    channel_shift: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        if self.low_rank < 0:
            raise QuantizationError(f"low_rank: got {self.low_rank}, wanted a rank of 0 or more")
        if self.activation is None and self.channel_shift:
            raise QuantizationError("channel_shift: got a layer whose input is not quantized, wanted one that is")
        if self.channel_shift and self.activation is not None and self.activation.is_dynamic:
            raise QuantizationError(f"channel_shift: got mode {self.activation.mode}, wanted static or per_step")
        if self.channel_shift and self.activation is not None and self.activation.is_float:
            raise QuantizationError("channel_shift: got e4m3 inputs, whose steps follow each number, wanted int")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        activation, split = data.get("activation"), data.get("split")
        return cls(
            weight=WeightSpec(**data["weight"]),
            activation=None if activation is None else ActivationSpec(**activation),
            split=None if split is None else tuple(split),
            channel_scale=data.get("channel_scale", False),
            channel_shift=data.get("channel_shift", False),
            low_rank=data.get("low_rank", 0),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; it says nothing of scaled channels where there are none."""
        channels = {"channel_scale": self.channel_scale, "channel_shift": self.channel_shift}
        return {
            "weight": self.weight.to_json(),
            "activation": None if self.activation is None else self.activation.to_json(),
            "split": None if self.split is None else list(self.split),
            **{name: True for name, has in channels.items() if has},
            **({"low_rank": self.low_rank} if self.low_rank else {}),
        }


def softmax_bits(base: int, operands: int) -> int:
    """Return the bits of probabilities where query, key and value have others than the base's: theirs, or none."""
    return EXACT_SOFTMAX_BITS if base == EXACT_SOFTMAX_BITS else operands


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Operands of one attention's two matmuls.

    Query, key and value have the format `activation`; probabilities have its type and `softmax_bits`, from zero up, or
    are not quantized (16).
    """

    activation: ActivationSpec
    softmax_bits: int = 8

    def __post_init__(self) -> None:
        if self.quantizes_probabilities:
            check_bits(self.softmax_bits, "softmax")
        if self.activation.is_float and self.softmax_bits not in (E4M3_BITS, EXACT_SOFTMAX_BITS):
            raise QuantizationError(f"softmax: got {self.softmax_bits} bits with e4m3 operands, wanted 8 or 16")
        if self.activation.differences:
            raise QuantizationError("attention: got operands in differences between steps, wanted them plain")

    @property
    def quantizes_probabilities(self) -> bool:
        """Whether probabilities are quantized too."""
        return self.softmax_bits != EXACT_SOFTMAX_BITS

    def with_bits(self, activation: ActivationSpec, bits: int) -> Self:
        """Return the format with operands of other bits: of probabilities too, if they are quantized."""
        return replace(self, activation=activation, softmax_bits=softmax_bits(self.softmax_bits, bits))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(ActivationSpec(**data["activation"]), data["softmax_bits"])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return {"activation": self.activation.to_json(), "softmax_bits": self.softmax_bits}


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """A layer's outputs kept as a table, one row for each trajectory step and label, instead of the layer.

    `bits` is 8 (codes, with a scale and an offset per channel) or 16 (bfloat16); `labels` counts the class labels that
    the outputs depend on, 1 if on none. Row step * labels + label belongs to a sample.
    """

    bits: int
    labels: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (8, 16) or self.labels < 1:
            raise QuantizationError(
                f"feature table: got {self.bits} bits for {self.labels} labels, wanted 8 or 16 bits, at least 1 label"
            )


@dataclass(frozen=True, slots=True)
class UnitFormat:
    """Format of one unit: its quantized layers and attentions, by module name.

    `features` are layers that a table of their outputs replaces. `unserved` are layers that are dropped, because only
    layers that tables replace read their outputs.
    """

    unit: str
    layers: Mapping[str, LayerSpec]
    attentions: Mapping[str, AttentionSpec]
    features: Mapping[str, FeatureSpec] = field(default_factory=dict)
    unserved: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(data["unit"], **_read_parts(data))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; it says nothing of features where there are none."""
        return {"unit": self.unit, **_write_parts(self)}


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """Format of a quantized model: its layers and attentions, and the trajectory that per-step tables are indexed by.

    `timesteps` are the sampler's, in the order of sampling (noisiest first); empty if nothing is per step.
    `num_inference_steps` is what gives them, where it is another number than theirs: samplers of second order, and
    pipelines that call twice a step, or begin with an image. `features` and `unserved` as in `UnitFormat`.
    """

    layers: Mapping[str, LayerSpec]
    attentions: Mapping[str, AttentionSpec]
    timesteps: tuple[float, ...] = ()
    unknown_timestep: UnknownTimestep = UnknownTimestep.ERROR
    features: Mapping[str, FeatureSpec] = field(default_factory=dict)
    unserved: tuple[str, ...] = ()
    num_inference_steps: int | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote (also a whole `quantization_config`)."""
        steps = data.get("num_inference_steps")
        return cls(
            timesteps=tuple(data["timesteps"]),
            num_inference_steps=None if steps is None else int(steps),
            unknown_timestep=UnknownTimestep(data["unknown_timestep"]),
            **_read_parts(data),
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able mapping; it says nothing of features where there are none."""
        steps = self.num_inference_steps
        return {
            **_write_parts(self),
            **({} if steps is None else {"num_inference_steps": steps}),
            "timesteps": list(self.timesteps),
            "unknown_timestep": str(self.unknown_timestep),
        }


def _read_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that a unit's and a model's format share."""
    return {
        "layers": {name: LayerSpec.from_json(spec) for name, spec in data["layers"].items()},
        "attentions": {name: AttentionSpec.from_json(spec) for name, spec in data["attentions"].items()},
        "features": {name: FeatureSpec(**spec) for name, spec in data.get("features", {}).items()},
        "unserved": tuple(data.get("unserved", ())),
    }


def _write_parts(parts: UnitFormat | ModelFormat) -> dict[str, Any]:
    """Return the fields that a unit's and a model's format share as JSON."""
    cached: dict[str, Any] = {}
    if parts.features:
        cached = {
            "features": {name: asdict(spec) for name, spec in parts.features.items()},
            "unserved": list(parts.unserved),
        }
    return cached | {
        "layers": {name: spec.to_json() for name, spec in parts.layers.items()},
        "attentions": {name: spec.to_json() for name, spec in parts.attentions.items()},
    }
