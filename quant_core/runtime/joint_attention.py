"""Attentions over tokens of two kinds, text and image, on Triton: what diffusers' processors do, in fewer passes.

SD3's puts queries, keys and values of both kinds one behind the other after it has split them into heads, where nothing
lies side by side any more; here before, which moves the same values four times as fast. Flux's normalizes and rotates
queries and keys in float32, in six kernels; here one (`kernels.rotary`). Processors that are not exactly diffusers' own
stay, and so does all that these don't know.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.rotary import HeadedTokens, rms_norm_rotary
from quant_spec.enums import KernelBackend


class JointProcessor(JointAttnProcessor2_0):
    """SD3's, with tokens put together before they are split into heads. The same values, bit for bit."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return what diffusers' processor returns: (B, S, C), and (B, T, C) where there is text."""
        if encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, None, attention_mask, *args, **kwargs)
        norms = ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k), (None, None))
        layers = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
        # All layers of one kind of tokens first: they share what they quantize.
        image = [own(hidden_states) for own, _ in layers]
        text = [added(encoder_hidden_states) for _, added in layers]
        joined = []
        for mine, theirs, (norm, added_norm) in zip(image, text, norms, strict=True):
            parts = [
                (x if each is None else each(x.unflatten(-1, (attn.heads, -1))).flatten(-2))
                for x, each in ((mine, norm), (theirs, added_norm))
            ]
            joined.append(torch.cat(parts, dim=1).unflatten(-1, (attn.heads, -1)).transpose(1, 2))
        query, key, value = joined
        hidden = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=False)
        hidden = hidden.transpose(1, 2).flatten(2).to(query.dtype)
        tokens = hidden_states.shape[1]
        out, behind = hidden[:, :tokens], hidden[:, tokens:]
        if not attn.context_pre_only:
            behind = attn.to_add_out(behind)
        return attn.to_out[1](attn.to_out[0](out)), behind


class RotaryProcessor(FluxAttnProcessor):
    """Flux's, with norms and rotation of queries and keys in one kernel, which also puts the tokens together."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Return what diffusers' processor returns: (B, S, C), and (B, T, C) where text has layers of its own."""
        has_added = encoder_hidden_states is not None and attn.added_kv_proj_dim is not None
        norms = [attn.norm_q, attn.norm_k, *((attn.norm_added_q, attn.norm_added_k) if has_added else ())]
        known = all(type(norm) is nn.RMSNorm and norm.eps is not None for norm in norms)
        if image_rotary_emb is None or attn.fused_projections or not known:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = image_rotary_emb
        image = [layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        text: list[Tensor] = []
        if has_added:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [layer(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
        query, key = (
            rms_norm_rotary(
                [
                    HeadedTokens(x, norm.weight, norm.eps)
                    for x, norm in ([(text[i], added)] if has_added else []) + [(image[i], own)]
                ],
                cos,
                sin,
                backend=KernelBackend.TRITON,
            )
            for i, (own, added) in enumerate(zip(norms[:2], norms[2:] or norms[:2], strict=True))
        )
        value = torch.cat([text[2], image[2]], dim=1) if has_added else image[2]
        hidden = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden = hidden.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return hidden
        tokens = encoder_hidden_states.shape[1]
        behind, out = hidden[:, :tokens], hidden[:, tokens:]
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(behind)


_OURS: dict[type, type] = {JointAttnProcessor2_0: JointProcessor, FluxAttnProcessor: RotaryProcessor}


def fuse_attentions(model: nn.Module) -> None:
    """Let the attentions of a runtime model on Triton run with these processors, in place."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        # A quantized attention's processor holds diffusers' own.
        holder, name = (processor, "inner") if hasattr(processor, "inner") else (module, "processor")
        plain = getattr(holder, name, None)
        if type(plain) in _OURS:
            made = _OURS[type(plain)]()
            made.__dict__.update(plain.__dict__)
            setattr(holder, name, made)
