"""Blocks of ResNets and transformers whose norms, activations and sums are part of the layers behind and before them.

A ResNet block normalizes, applies SiLU, convolves, twice, and adds its input: apart, that writes and reads the image
nine times. A `RuntimeLayer` computes the norm and SiLU in front of it where it quantizes its input, and adds a residual
where it scales its sums (`kernels.native`, `kernels.norms`, `kernels.epilogue`).

Blocks stay diffusers' where something comes between norm and convolution: another scale (`up`, `down`), a modulation by
the time embedding (`scale_shift`). A norm stays in front of a layer that is not one product with tables, such as one
whose input is split.

On Triton, the activation of a feed-forward (GELU, GEGLU) is computed where the Linear behind it quantizes its input,
and so are LayerNorms and their modulation (`quant_core.runtime.normalized`); gates and sums of transformer blocks are
part of the product in front of them (`quant_core.runtime.deferred`).
"""

from __future__ import annotations

from typing import Any, TypeGuard

from diffusers.models import activations, normalization
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.fp8 import Fp8Matrix
from kernels.gates import MAX_GATED, Gate
from quant_core.nn.layers import replace_module
from quant_core.runtime.layer import RuntimeLayer
from quant_core.runtime.normalized import LayerNormBehind
from quant_spec.enums import ActivationMode, KernelBackend

#: Layers that read what a norm gives, by the norm's name in a block. None of these blocks writes to a tensor in place.
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_JOINT = {
    "norm1": (*_QKV, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "norm1_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "norm2": ("ff.net.0.proj",),
    "norm2_context": ("ff_context.net.0.proj",),
}
_READERS: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    BasicTransformerBlock: {
        "norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "norm2": ("attn2.to_q", "ff.net.0.proj"),
        "norm3": ("ff.net.0.proj",),
    },
    JointTransformerBlock: _JOINT,
    FluxTransformerBlock: _JOINT,
    FluxSingleTransformerBlock: {"norm": ("proj_mlp", *_QKV)},
}
#: Layers whose outputs a block multiplies by a gate, or not, and adds to its input.
_ADDED: dict[type[nn.Module], tuple[str, ...]] = {
    BasicTransformerBlock: ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
    JointTransformerBlock: ("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"),
    FluxTransformerBlock: ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"),
    FluxSingleTransformerBlock: ("proj_out",),
}
# Norms around a LayerNorm, whose output they multiply and add to at once.
_ADAPTIVE = (
    normalization.AdaLayerNormZero,
    normalization.AdaLayerNormZeroSingle,
    normalization.SD35AdaLayerNormZeroX,
    normalization.AdaLayerNormContinuous,
)


class FusedResnetBlock(nn.Module):
    """A plain `ResnetBlock2D` in evaluation mode, whose second convolution is a runtime layer.

    Attributes
    ----------
    norm1, norm2 : GroupNorm or None
        Those that the convolutions did not take.
    """

    def __init__(self, block: ResnetBlock2D) -> None:
        super().__init__()
        self.conv1, self.norm1 = block.conv1, _give(block.norm1, block.conv1)
        self.conv2, self.norm2 = block.conv2, _give(block.norm2, block.conv2)
        self.time_emb_proj, self.skip_time_act = block.time_emb_proj, block.skip_time_act
        self.conv_shortcut, self.output_scale_factor = block.conv_shortcut, block.output_scale_factor

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output, as diffusers' forward; what it ignores is ignored here too.

        Parameters
        ----------
        input_tensor : Tensor, shape (B, C_in, H, W), floating dtype
        temb : Tensor, shape (B, T), or None
            Time embedding.

        Returns
        -------
        Tensor, shape (B, C_out, H, W), dtype of `input_tensor`
        """
        hidden = self.conv1(_activated(input_tensor, self.norm1))
        if self.time_emb_proj is not None:
            assert temb is not None
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = _activated(hidden, self.norm2)
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        out: Tensor = self.conv2(hidden, residual=skip)
        return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


class Projection(nn.Module):
    """The Linear of a feed-forward's activation, without the activation, which the layer behind computes."""

    def __init__(self, activation: activations.GELU | activations.GEGLU) -> None:
        super().__init__()
        self.proj = activation.proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of (..., C)."""
        projected: Tensor = self.proj(x)
        return projected


def fuse_blocks(model: nn.Module) -> None:
    """Let convolutions of a runtime model compute what is in front of them and behind, in place.

    Parameters
    ----------
    model : Module
        In evaluation mode, its quantized layers replaced by runtime layers where they run so.
    """
    for name, block in [(name, module) for name, module in model.named_modules() if isinstance(module, ResnetBlock2D)]:
        if name and _is_plain(block) and isinstance(block.conv2, RuntimeLayer):
            replace_module(model, name, FusedResnetBlock(block))
    for module in model.modules():
        if isinstance(module, FeedForward):
            _fuse_feed_forward(module)
    for module in model.modules():
        for name, readers in _READERS.get(type(module), {}).items():
            _fuse_layer_norm(module, name, readers)
        for name in _ADDED.get(type(module), ()):
            layer = dict(module.named_modules()).get(name)
            if _defers(layer):
                layer.defer()
    norm, act, conv = (getattr(model, name, None) for name in ("conv_norm_out", "conv_act", "conv_out"))
    if isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU) and _takes_norm(conv):
        conv.take_norm(norm)
        replace_module(model, "conv_norm_out", nn.Identity())
        replace_module(model, "conv_act", nn.Identity())


def _fuse_feed_forward(module: FeedForward) -> None:
    """Let the second Linear of a feed-forward compute the activation in front of it, if it can."""
    activation, dropout, layer = (module.net[i] for i in range(3))
    gate = _gate_of(activation)
    if gate is not None and isinstance(dropout, nn.Dropout) and not dropout.training and _takes_gate(layer):
        layer.take_gate(gate)
        module.net[0] = Projection(activation)


def _fuse_layer_norm(block: nn.Module, name: str, readers: tuple[str, ...]) -> None:
    """Let the layers of a block that read one of its LayerNorms compute it, if they can."""
    norm = getattr(block, name, None)
    place = name
    if isinstance(norm, _ADAPTIVE):
        norm, place = norm.norm, f"{name}.norm"
    modules = dict(block.named_modules())
    taking = [layer for reader in readers if _takes_layer_norm(layer := modules.get(reader))]
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1 or not taking:
        return
    for layer in taking:
        if not layer.normalizes:
            layer.take_layer_norms()
    replace_module(block, place, LayerNormBehind(norm))


def _takes_layer_norm(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is a Linear of one product of codes on Triton, of grids in a table or of each token."""
    if not isinstance(layer, RuntimeLayer) or layer.run.backend is not KernelBackend.TRITON:
        return False
    if layer.geometry is not None or len(layer.parts) != 1 or layer.branch is not None or layer.differences:
        return False
    part, spec = layer.parts[0], layer.activation
    if spec is None or part.channel_scale is not None or part.channels is not None:
        return False
    if part.table is None:
        return spec.mode is ActivationMode.DYNAMIC_TOKEN
    return part.table.divisor is None


def _defers(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is a Linear of one product on Triton."""
    if not isinstance(layer, RuntimeLayer) or layer.run.backend is not KernelBackend.TRITON:
        return False
    return layer.geometry is None and len(layer.parts) == 1 and not layer.differences


def _gate_of(activation: nn.Module) -> Gate | None:
    """Return what an activation computes after its projection; None if no kernel does."""
    if type(activation) is activations.GEGLU:
        return Gate.GEGLU
    if type(activation) is activations.GELU:
        return {"none": Gate.GELU, "tanh": Gate.GELU_TANH}.get(str(activation.approximate))
    return None


def _takes_gate(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is a Linear of one product on Triton: of integers whose grids are in a table, or of E4M3 numbers
    with a scale for each token."""  # fmt: skip
    if not isinstance(layer, RuntimeLayer) or layer.run.backend is not KernelBackend.TRITON:
        return False
    if layer.geometry is not None or len(layer.parts) != 1 or layer.branch is not None or layer.differences:
        return False
    part, spec = layer.parts[0], layer.activation
    if isinstance(part.weight, Fp8Matrix):
        per_token = spec is not None and spec.mode is ActivationMode.DYNAMIC_TOKEN
        return per_token and part.channel_scale is None and part.weight.values.shape[1] <= MAX_GATED
    return isinstance(part.weight, tuple) and part.table is not None and part.channels is None


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether each of a block's convolutions follows its norm and SiLU at once."""
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and isinstance(block.nonlinearity, nn.SiLU)
        and isinstance(block.norm1, nn.GroupNorm)
        and isinstance(block.norm2, nn.GroupNorm)
    )


def _give(norm: nn.GroupNorm, conv: nn.Module) -> nn.GroupNorm | None:
    """Give a convolution the norm in front of it; return the norm if it can't take it."""
    if not _takes_norm(conv):
        return norm
    conv.take_norm(norm)
    return None


def _activated(x: Tensor, norm: nn.GroupNorm | None) -> Tensor:
    """Normalize and apply SiLU, unless the convolution behind does."""
    return x if norm is None else F.silu(norm(x))


def _takes_norm(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is a convolution of one integer product, whose grids are in a table."""
    if not isinstance(layer, RuntimeLayer) or layer.geometry is None or len(layer.parts) != 1:
        return False
    if layer.branch is not None or isinstance(layer.parts[0].weight, Fp8Matrix):
        return False
    return layer.parts[0].table is not None and layer.parts[0].channels is None
