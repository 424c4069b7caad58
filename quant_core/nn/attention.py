"""Quantized attention matmuls: QK^T and softmax(.)V of any attention that runs through a processor.

diffusers' attention modules hand their work to a `processor`, which calls `scaled_dot_product_attention`. The processor
is wrapped so that this one call is replaced, for the duration of the processor, by one whose operands are quantized; no
model or processor class is named.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.steps import StepClock
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, AttentionSpec

OPERANDS = ("query", "key", "value", "probabilities")


class AttentionQuantizer(nn.Module):
    """Quantizers of the operands of an attention's two matmuls: of probabilities only if they have codes."""

    query: ActivationQuantizer
    key: ActivationQuantizer
    value: ActivationQuantizer
    probabilities: ActivationQuantizer

    def __init__(self, spec: AttentionSpec, clock: StepClock, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.operands = OPERANDS if spec.quantizes_probabilities else OPERANDS[:-1]
        for operand in self.operands:
            chosen = spec.activation
            if operand == "probabilities":
                chosen = ActivationSpec(spec.softmax_bits, mode=spec.activation.mode, type=spec.activation.type)
            self.add_module(operand, ActivationQuantizer(chosen, clock, device))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Return softmax(Q K^T * scale + mask) V with quantized operands; tensors (..., tokens, head width).

        With probabilities as they are, PyTorch's own kernels multiply, which need not hold all of them.
        """
        query, key, value = self.query(query), self.key(key), self.value(value)
        if "probabilities" not in self.operands:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return self.probabilities(softmax_scores(query, key, mask, scale)) @ value


def softmax_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(Q K^T * scale + mask), shape (..., query tokens, key tokens); a boolean mask says what to keep."""
    scores = query @ key.transpose(-1, -2) * scale
    if mask is None:
        return scores.softmax(dim=-1)
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return (scores + mask).softmax(dim=-1)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]


class ReplacedAttention(TorchFunctionMode):
    """While active, `scaled_dot_product_attention` is `function(query, key, value, mask, scale)`.

    Where `function` returns None, the call goes its own way.
    """

    def __init__(self, function: AttentionFunction) -> None:
        super().__init__()
        self.function = function
        self.is_used = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self.is_used = True
        result = self.function(*_bind_attention(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {})) if result is None else result


def _bind_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Bring `scaled_dot_product_attention`'s arguments to those of `AttentionFunction`, without dropout."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        repeat = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeat, -3), value.repeat_interleave(repeat, -3)
    return query, key, value, attn_mask, 1 / math.sqrt(query.shape[-1]) if scale is None else scale


#: Attributes of a wrapped processor that are not those of the processor inside.
_PARTS = ("inner", "function", "is_used")


class _Processor:
    """A processor whose scaled dot product is replaced; its parts are attributes, so that copied models have theirs."""

    def __init__(self, inner: Any, function: AttentionFunction) -> None:
        self.inner, self.function, self.is_used = inner, function, False

    def __getattr__(self, name: str) -> Any:
        """Return what the processor itself says, such as which backend it calls."""
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Tell the processor itself, unless it is one of our own parts."""
        if name in _PARTS:
            object.__setattr__(self, name, value)
        else:
            setattr(self.inner, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _processor, (self.inner, self.function)


def _processor(inner: Any, function: AttentionFunction) -> _Processor:
    """Make a processor of a class of its own, named after `inner`'s."""

    def call(self: _Processor, *args: Any, **kwargs: Any) -> Any:
        replaced = ReplacedAttention(self.function)
        with replaced:
            result = self.inner(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self.is_used = replaced.is_used
        return result

    # diffusers reads the signature of a processor's __call__ to decide which keyword arguments to pass on.
    call.__signature__ = inspect.signature(type(inner).__call__)  # type: ignore[attr-defined]
    made: _Processor = type(f"Quantized{type(inner).__name__}", (_Processor,), {"__call__": call})(inner, function)
    return made


def _keep_quantized(attention: nn.Module, _: tuple[Any, ...]) -> None:
    """Wrap the processor of a quantized attention again if another was set; hooked before its forward."""
    if torch.compiler.is_compiling() or isinstance(attention.processor, _Processor):
        return
    wrap_processor(attention, attention.attention_quantizer)  # type: ignore[arg-type]


def _check_used(attention: nn.Module, *_: Any) -> None:
    """Refuse a processor, or an attention backend, that does not call what is quantized; hooked behind the forward."""
    processor = attention.processor
    if torch.compiler.is_compiling() or not isinstance(processor, _Processor) or processor.is_used:
        return
    backend = getattr(processor.inner, "_attention_backend", None)
    raise QuantizationError(
        f"attention: got processor {type(processor.inner).__name__}{f' with backend {backend}' if backend else ''}, "
        "which does not call scaled_dot_product_attention, so that its matmuls would not be quantized; wanted the "
        "model's own, or AttnProcessor2_0, and diffusers' native attention backend"
    )


def wrap_processor(attention: nn.Module, function: AttentionFunction) -> Callable[[], None]:
    """Run `attention`'s processor with its scaled dot product replaced by `function`; returns what undoes it."""
    inner = getattr(attention, "processor", None)
    if inner is None:
        raise QuantizationError(
            f"attention: got {type(attention).__name__} without a processor, wanted diffusers' attention"
        )

    attention.processor = _processor(inner, function)  # type: ignore[assignment]

    def undo() -> None:
        attention.processor = inner

    return undo


def quantize_attentions(
    model: nn.Module, specs: Mapping[str, AttentionSpec], clock: StepClock
) -> dict[str, AttentionQuantizer]:
    """Quantize the matmuls of the named attention modules in place, with ranges still to be set."""
    device = next(model.parameters(), torch.empty(0)).device
    made = {}
    for name, spec in specs.items():
        attention = model.get_submodule(name)
        made[name] = AttentionQuantizer(spec, clock, device)
        wrap_processor(attention, made[name])
        attention.add_module("attention_quantizer", made[name])
        attention.register_forward_pre_hook(_keep_quantized)
        attention.register_forward_hook(_check_used)
    return made
