"""One forward of a denoiser, watched: the order in which layers run, their multiplications, and which inputs are
concatenations.

Module hooks see layers and attentions; a `TorchFunctionMode` sees concatenations and matmuls between two activations.
No model class is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from quant_core.diffusion.conditioning import Conditioning
from quant_core.diffusion.denoiser import call_denoiser
from quant_core.nn.layers import QUANTIZABLE

_CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})
_SAME_VALUES = frozenset({Tensor.contiguous, Tensor.to, Tensor.float, Tensor.clone, F.dropout})
_MATMULS = frozenset({torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__})


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What one quantizable layer did in a forward at batch 1."""

    macs: int
    input_bytes: int  # float32, of one call
    split: tuple[int, ...] | None  # channels of the tensors whose concatenation it was fed


@dataclass(frozen=True, slots=True)
class Event:
    """Multiplications done at one moment of a forward: by a layer, or by an attention's matmuls."""

    name: str
    macs: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A forward at batch 1.

    `layers` and `attentions` (multiplications of their matmuls) are in the order of their first call; attentions that
    do not call `scaled_dot_product_attention` (linear ones) are not among them: nothing could quantize theirs. `events`
    has every call; `spans` gives float32 bytes in and out of every module that ran, for its first call.
    """

    layers: Mapping[str, LayerTrace]
    attentions: Mapping[str, int]
    events: tuple[Event, ...]
    spans: Mapping[str, tuple[int, int]]
    output_shape: tuple[int, ...]

    @property
    def macs(self) -> int:
        """Multiplications of the whole forward."""
        return sum(event.macs for event in self.events)


@dataclass(slots=True)
class _Recorder:
    """What the hooks of a running forward write to."""

    stack: list[tuple[str, nn.Module]] = field(default_factory=list)  # modules whose forward is running
    events: list[Event] = field(default_factory=list)
    input_bytes: dict[str, int] = field(default_factory=dict)
    splits: dict[str, list[tuple[int, ...] | None]] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    attended: set[str] = field(default_factory=set)  # attentions that called scaled_dot_product_attention
    concatenated: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)  # tensor -> (dim, sizes)


def is_attention(module: nn.Module) -> bool:
    """Whether a module hands its attention to an exchangeable processor (diffusers' convention)."""
    return hasattr(module, "processor") and callable(getattr(module, "set_processor", None))


def trace_denoiser(model: nn.Module, x: Tensor, t: Tensor | float, conditioning: Conditioning) -> Trace:
    """Run one forward and return what happened.

    Parameters
    ----------
    x : Tensor, shape (1, ...), dtype float32
    t, conditioning
        As for `call_denoiser`, with one row.

    Notes
    -----
    A split is recorded only if every call of the layer got the same one, and only for a concatenation that mixes
    activations: one inside a module without parameters (the sine and cosine halves of a timestep embedding) is not.
    """
    recorder = _Recorder()
    with ExitStack() as cleanup, torch.no_grad():
        for name, module in model.named_modules():
            for handle in _watch(name, module, recorder):
                cleanup.callback(handle.remove)
        cleanup.enter_context(_Watch(recorder))
        output = call_denoiser(model, x, t, conditioning)
    return _summary(recorder, model, tuple(output.shape))


def _summary(recorder: _Recorder, model: nn.Module, output_shape: tuple[int, ...]) -> Trace:
    macs: dict[str, int] = {}
    for event in recorder.events:
        macs[event.name] = macs.get(event.name, 0) + event.macs
    layers = {
        name: LayerTrace(macs[name], size, _agreed(recorder.splits[name]))
        for name, size in recorder.input_bytes.items()
    }
    attentions = {name: count for name, count in macs.items() if name in recorder.attended}
    return Trace(layers, attentions, tuple(recorder.events), recorder.spans, output_shape)


def _agreed(splits: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    return splits[0] if len(set(splits)) == 1 else None


def _watch(name: str, module: nn.Module, recorder: _Recorder) -> Iterable[torch.utils.hooks.RemovableHandle]:
    """Hook one module; quantizable layers are also counted."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        recorder.stack.append((name, module))

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        recorder.stack.pop()
        recorder.spans.setdefault(name, (_bytes((args, kwargs)), _bytes(output)))
        if isinstance(module, QUANTIZABLE):
            _record_layer(name, module, args[0] if args else next(iter(kwargs.values())), output, recorder)

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave, with_kwargs=True)


def _record_layer(name: str, layer: nn.Module, x: Tensor, output: Tensor, recorder: _Recorder) -> None:
    weight = layer.get_parameter("weight")
    macs = output.numel() * math.prod(weight.shape[1:])
    recorder.events.append(Event(name, macs))
    recorder.input_bytes.setdefault(name, 4 * x.numel())
    dim, sizes = recorder.concatenated.get(x, (None, None))
    channels = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
    recorder.splits.setdefault(name, []).append(sizes if dim == channels else None)


def _bytes(value: Any) -> int:
    """Return the bytes that all tensors in a nest would take in float32."""
    if isinstance(value, Tensor):
        return 4 * value.numel()
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0


class _Watch(TorchFunctionMode):
    """Tags concatenated tensors and counts the matmuls of attentions."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONCATENATIONS:
            self._tag(result, args, kwargs)
        elif func in _SAME_VALUES and args and args[0] in self.recorder.concatenated:
            self.recorder.concatenated[result] = self.recorder.concatenated[args[0]]
        elif func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
            self._count(
                query.numel() * key.shape[-2] + query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1],
                attends=True,
            )
        elif func in _MATMULS:
            left = args[1] if func is torch.baddbmm else args[0]
            self._count(result.numel() * left.shape[-1])
        return result

    def _tag(self, result: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = args[0] if args else kwargs["tensors"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if len(tensors) > 1 and self._among_activations():
            dim %= result.dim()
            self.recorder.concatenated[result] = (dim, tuple(tensor.shape[dim] for tensor in tensors))

    def _among_activations(self) -> bool:
        stack = self.recorder.stack
        return bool(stack) and next(stack[-1][1].parameters(), None) is not None

    def _count(self, macs: int, *, attends: bool = False) -> None:
        """Attribute a product of two activations to the innermost attention that is running."""
        name = next((name for name, module in reversed(self.recorder.stack) if is_attention(module)), None)
        if name is not None:
            self.recorder.events.append(Event(name, macs))
            if attends:
                self.recorder.attended.add(name)
