from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from quant_core.nn.activation import ActivationQuantizer
from quant_core.nn.attention import OPERANDS, AttentionQuantizer, ReplacedAttention, quantize_attentions, wrap_processor
from quant_core.nn.ranges import QParams
from quant_core.nn.steps import StepClock
from quant_spec.enums import ActivationMode
from quant_spec.errors import QuantizationError
from quant_spec.formats import ActivationSpec, AttentionSpec

Make = Callable[[str], nn.Module]
SHAPE = (2, 3, 6, 8)  # batch, heads, tokens, width
DYNAMIC = AttentionSpec(ActivationSpec(8, mode=ActivationMode.DYNAMIC_SAMPLE))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    return random(*SHAPE), random(*SHAPE, seed=1), random(*SHAPE, seed=2)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.7},
    "float": {"attn_mask": random(2, 1, 6, 6, seed=4)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.21},
}
MASKS["bool"]["attn_mask"] |= torch.eye(6, dtype=torch.bool)


def static(bits: int, softmax_bits: int) -> AttentionQuantizer:
    """Quantizers that clip and round visibly."""
    spec = AttentionSpec(ActivationSpec(bits, mode=ActivationMode.STATIC), softmax_bits)
    made = AttentionQuantizer(spec, StepClock(()))
    top, soft = 2**bits - 1, 2**softmax_bits - 1
    for place, operand in enumerate(made.operands):
        ends = (0.0, 1.0, 0.0) if operand == "probabilities" else (-2.0 - 0.1 * place, 2.5, top)
        scale = (ends[1] - ends[0]) / (soft if operand == "probabilities" else top)
        zero = 0.0 if operand == "probabilities" else round(-ends[0] / scale)
        getattr(made, operand).set_qparams(QParams(torch.tensor([scale]), torch.tensor([float(zero)])))
    return made


def by_hand(x: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    scale, zero, top = quantizer.scale[0], quantizer.zero_point[0], 2**quantizer.spec.bits - 1
    return ((torch.round(x / scale) + zero).clamp(0, top) - zero) * scale


@pytest.mark.parametrize("kind", list(MASKS))
@torch.no_grad()
def test_it_equals_quantized_operands_by_hand(operands: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    made, arguments = static(4, 3), MASKS[kind]
    with ReplacedAttention(made):
        got = F.scaled_dot_product_attention(*operands, **arguments)
    query, key, value = (by_hand(x, getattr(made, name)) for x, name in zip(operands, OPERANDS[:3], strict=True))
    scores = query @ key.transpose(-1, -2) * arguments.get("scale", 1 / math.sqrt(8))
    mask = arguments.get("attn_mask")
    if kind == "float":
        scores = scores + mask
    elif kind in ("bool", "causal"):
        keep = torch.ones(6, 6, dtype=torch.bool).tril() if kind == "causal" else mask
        scores = torch.where(keep, scores, torch.tensor(-torch.inf))
    assert torch.equal(got, by_hand(scores.softmax(-1), made.probabilities) @ value)
    plain = F.scaled_dot_product_attention(*operands, **arguments)
    assert not torch.allclose(got, plain, atol=1e-2)


@pytest.mark.parametrize("kind", list(MASKS))
@torch.no_grad()
def test_probabilities_of_16_bits_are_as_they_are(operands: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    made = static(4, 16)
    with ReplacedAttention(made):
        got = F.scaled_dot_product_attention(*operands, **MASKS[kind])
    rounded = [by_hand(x, getattr(made, name)) for x, name in zip(operands, OPERANDS[:3], strict=True)]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*rounded, **MASKS[kind]))


@pytest.mark.parametrize("kind", list(MASKS))
@torch.no_grad()
def test_eight_bits_are_close_to_float(operands: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    wanted = F.scaled_dot_product_attention(*operands, **MASKS[kind])
    with ReplacedAttention(AttentionQuantizer(DYNAMIC, StepClock(()))):
        got = F.scaled_dot_product_attention(*operands, **MASKS[kind])
    assert 0 < float((got - wanted).norm()) < 0.02 * float(wanted.norm())


@torch.no_grad()
def test_grouped_queries_share_keys(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    query, (key, value) = random(2, 6, 6, 8), operands[1:]
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with ReplacedAttention(AttentionQuantizer(DYNAMIC, StepClock(()))):
        got = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert 0 < float((got - wanted).norm()) < 0.02 * float(wanted.norm())


def test_a_function_may_leave_the_call_alone(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    seen: list[tuple[Tensor | float | None, ...]] = []
    wanted = F.scaled_dot_product_attention(*operands)
    with ReplacedAttention(lambda *arguments: seen.append(arguments)):
        got = F.scaled_dot_product_attention(*operands)
    assert torch.equal(got, wanted)
    assert [a is b for a, b in zip(seen[0], operands, strict=False)] == [True] * 3
    assert seen[0][3:] == (None, 1 / math.sqrt(8))


@torch.no_grad()
def test_switched_off_operands_are_float(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    made = static(2, 2)
    for operand in OPERANDS:
        getattr(made, operand).enabled = False
    with ReplacedAttention(made):
        got = F.scaled_dot_product_attention(*operands)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(*operands))


def test_probabilities_have_their_own_width() -> None:
    made = AttentionQuantizer(AttentionSpec(ActivationSpec(8, symmetric=True), 5), StepClock((9, 5)))
    assert [getattr(made, operand).spec.bits for operand in OPERANDS] == [8, 8, 8, 5]
    assert not made.probabilities.spec.symmetric
    assert set(made.state_dict()) == {f"{operand}.{name}" for operand in OPERANDS for name in ("scale", "zero_point")}
    assert made.query.scale.shape == (2,)


@torch.no_grad()
def test_wrapping_keeps_the_processors_signature_and_can_be_undone() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4).eval()
    inner, x = attention.processor, random(2, 5, 8)
    wanted, calls = attention(x), []

    def count(query: Tensor, *_: object) -> None:
        calls.append(query.shape)

    undo = wrap_processor(attention, count)
    assert inspect.signature(attention.processor.__call__) == inspect.signature(inner.__call__)
    assert torch.equal(attention(x), wanted)
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x))
    assert calls == [(2, 2, 5, 4)]  # not the ones outside of the processor
    undo()
    assert attention.processor is inner
    with pytest.raises(QuantizationError, match="got Linear without a processor"):
        wrap_processor(nn.Linear(2, 2), count)


def test_keyword_arguments_still_reach_the_processor() -> None:
    attention = Attention(query_dim=8, heads=2, dim_head=4, cross_attention_dim=6).eval()
    text, mask = random(2, 3, 6), torch.tensor([[[0.0, 0.0, -1e4]], [[0.0, -1e4, -1e4]]])
    wrap_processor(attention, AttentionQuantizer(DYNAMIC, StepClock(())))
    with torch.no_grad():
        one = attention(random(2, 5, 8), encoder_hidden_states=text, attention_mask=mask)
        two = attention(random(2, 5, 8), encoder_hidden_states=text)
    assert not torch.allclose(one[1], two[1])


def test_every_familys_attention_is_quantized(any_model: nn.Module) -> None:
    names = [name for name, module in any_model.named_modules() if hasattr(module, "to_q")]
    made = quantize_attentions(any_model, dict.fromkeys(names, DYNAMIC), StepClock(()))
    assert made.keys() == set(names)
    assert names
    for name in names:
        assert any_model.get_submodule(f"{name}.attention_quantizer") is made[name]
        assert type(any_model.get_submodule(name).processor).__name__.startswith("Quantized")


@torch.no_grad()
def test_a_way_around_the_scaled_dot_product_is_refused() -> None:
    attention: Any = Attention(query_dim=8, heads=2, dim_head=4).eval()
    holder, x = nn.Sequential(attention), random(2, 5, 8)
    quantize_attentions(holder, {"0": DYNAMIC}, StepClock(()))
    holder(x)
    # an attention backend does as much: the processor stays, and its products go elsewhere
    attention.processor.inner = AttnProcessor()
    with pytest.raises(QuantizationError, match="got processor AttnProcessor, which does not call scaled_dot_product"):
        holder(x)
