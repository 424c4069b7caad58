"""Every choice that has a name."""

from __future__ import annotations

from enum import StrEnum


class Device(StrEnum):
    """Where tasks run that gain by a GPU."""

    AUTO = "auto"  # on a GPU if the cluster has one that fits, else on CPUs
    CPU = "cpu"
    CUDA = "cuda"


class Granularity(StrEnum):
    """Which values of a tensor share one scale and zero point."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


class ExportFormat(StrEnum):
    """What a release is written as, for tools that do not know packed bits."""

    DEQUANTIZED = "dequantized"  # plain float16
    GGUF = "gguf"  # blocks of 32 weights, in diffusers' names
    COMFY_GGUF = "comfy-gguf"  # the same in the names of the authors' checkpoints
    COMFY_INT8 = "comfy-int8"  # 8-bit codes in ComfyUI's layout, in these names
    MODELOPT_FP8 = "modelopt-fp8"  # E4M3 numbers and scales, in ModelOpt's layout


class GroupScale(StrEnum):
    """What the scale of a group of input channels is."""

    FLOAT = "float"  # a bfloat16 of its own
    INTEGER = "integer"  # a whole number, times the scale of its output channel


class NumberType(StrEnum):
    """What a stored number is."""

    INT = "int"  # a code on an affine grid of some bits
    E4M3 = "e4m3"  # a float of 8 bits, torch.float8_e4m3fn, times a scale


class ActivationMode(StrEnum):
    """When the range of an activation is fixed."""

    STATIC = "static"  # once, for all trajectory steps
    PER_STEP = "per_step"  # once for each trajectory step (TFMQ-DM's finite set)
    DYNAMIC_SAMPLE = "dynamic_sample"  # at run time, min-max of each sample
    # at run time, min-max of each token (last dimension); convolutions take each sample
    DYNAMIC_TOKEN = "dynamic_token"


class RangeMethod(StrEnum):
    """How a range is found."""

    MINMAX = "minmax"
    MSE = "mse"  # BRECQ's search: 80 shrunken ranges, |x - Q(x)|^2.4
    PERCENTILE = "percentile"


class UnknownTimestep(StrEnum):
    """What a per-step model does at a timestep that it was not calibrated for."""

    ERROR = "error"
    NEAREST = "nearest"


class RoundingMethod(StrEnum):
    """How a weight becomes a code."""

    NEAREST = "nearest"
    CLOSED_FORM = "closed_form"


class Scaling(StrEnum):
    """How what input channels are divided by is found."""

    LEARNED = "learned"
    SMOOTH = "smooth"  # SmoothQuant's closed form
    NONE = "none"


class Weighting(StrEnum):
    """How the errors of trajectory steps add up."""

    ADAPTIVE = "adaptive"  # DMQ's: steps of small error count more
    EARLY = "early"  # the noisiest steps, whose errors go through all that follows, count more
    UNIFORM = "uniform"


class Shift(StrEnum):
    """Which layers get power-of-two steps."""

    NONE = "none"
    SKIP = "skip"  # that read a concatenation whose parts are quantized apart
    VARIANCE = "variance"  # whose channels' ranges differ much


class TemporalRounding(StrEnum):
    """How the block's weights become codes."""

    NEAREST = "nearest"
    CLOSED_FORM = "closed_form"
    RECONSTRUCT = "reconstruct"


class AllocationMethod(StrEnum):
    """How the bits of output channels are chosen."""

    UNIFORM = "uniform"  # all channels the same
    KURTOSIS = "kurtosis"  # the paper's: in each layer as many up as down
    GLOBAL = "global"  # over all layers, the same number of bits in all


class WeightCodes(StrEnum):
    """What distillation does with the codes of weights."""

    LEARNED = "learned"  # MPQ-DM's and EfficientDM's low-rank tuning, merged before weights are quantized
    FROZEN = "frozen"  # they stay: scales, biases and norms are learned around them, as PEQA learns scales


class StepBitsMethod(StrEnum):
    """How bits are given to steps."""

    JOINT = "joint"  # least error power of the final samples; errors of different steps may add up or cancel
    EFFECT = "effect"  # the same, steps taken as independent
    SNR = "snr"  # the paper's: the least bits whose prediction is cleaner than the schedule's sample, times a threshold
    EARLY_LOW = "early_low"  # least bits at the noisiest steps, greatest at the others
    LATE_LOW = "late_low"  # the reverse


class KernelBackend(StrEnum):
    """Choice of implementation; `AUTO` resolves to one of the others."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    CPU = "cpu"


class WeightMemory(StrEnum):
    """How packed weights lie in memory."""

    AUTO = "auto"  # unpacked where this device multiplies int8 faster than it unpacks; on a CPU as FAST
    # As the release has them: least memory, and least to read where rows are few. A CPU multiplies int8 where it can,
    # and does not unpack to floats.
    PACKED = "packed"
    # One int8 a weight, for many rows; on a CPU one float32 where it can't multiply integers.
    FAST = "fast"


class UnitInputs(StrEnum):
    """Which model a unit's inputs come from while it is reconstructed."""

    FP = "fp"  # the full-precision one: all units at once
    QUANTIZED = "quantized"  # the one whose earlier units are quantized: in order, the papers' way


class StartCodes(StrEnum):
    """Which codes reconstruction starts from."""

    NEAREST = "nearest"
    ROUND = "round"  # those that the round pass gave


class ShownSeeds(StrEnum):
    """Which samples pictures show."""

    FIRST = "first"
    WORST = "worst"


class Extractor(StrEnum):
    """Features that the Fréchet distance is taken of."""

    EFFICIENTNET_LITE0 = "efficientnet-lite0"
    INCEPTION_V3 = "inception-v3"


class SampleSpace(StrEnum):
    """What a denoiser's samples are."""

    PIXELS = "pixels"  # of images, in [-1, 1]: compared and shown after clamping to that
    LATENTS = "latents"  # whatever their range: compared as they are


class Objective(StrEnum):
    """What a search calls best."""

    PSNR_DB = "psnr_db"  # same-seed PSNR of samples, higher is better
    PREDICTION_ERROR = "prediction_error"  # power of the predictions' error along the trajectory, lower is better
    FD = "fd"  # Fréchet distance of features to those of full precision, lower is better


class SearchUnit(StrEnum):
    """What gets weight bits of its own in a search."""

    LAYER = "layer"
    UNIT = "unit"
    CHANNELS = "channels"
