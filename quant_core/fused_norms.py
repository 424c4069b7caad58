"""GroupNorm and SiLU in front of a convolution, computed where its input is quantized.

A ResNet block normalizes, applies SiLU and convolves: apart, they write and read the image three times. `fuse_norms`
gives the norm to the `RuntimeLayer`, which does all of it in one pass (`kernels.native`, `kernels.norms`), and leaves
an `Identity` in its place, so diffusers' own forward goes on as it was. A block has one SiLU for three places; the
others take one of their own.

A block keeps its norms where something comes between them and the convolution: another scale (`up`, `down`), a
modulation by the time embedding (`scale_shift`); and a norm stays in front of a layer that is not one product with
tables, such as one whose input is split.
"""

from __future__ import annotations

from typing import TypeGuard

from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from quant_core.feature_table import FeatureTable, Unserved
from quant_core.layers import replace_module
from quant_core.runtime_layer import RuntimeLayer


def fuse_norms(model: nn.Module) -> None:
    """Let convolutions of a runtime model compute the norms in front of them, in place.

    Parameters
    ----------
    model : Module
        In evaluation mode, its quantized layers replaced by runtime layers where they run so.
    """
    for block in [module for module in model.modules() if isinstance(module, ResnetBlock2D)]:
        if _is_plain(block) and (_takes_norm(block.conv1) or _takes_norm(block.conv2)):
            _fuse_block(block)
    norm, act, conv = (getattr(model, name, None) for name in ("conv_norm_out", "conv_act", "conv_out"))
    if isinstance(norm, nn.GroupNorm) and isinstance(act, nn.SiLU) and _takes_norm(conv):
        conv.take_norm(norm)
        replace_module(model, "conv_norm_out", nn.Identity())
        replace_module(model, "conv_act", nn.Identity())


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


def _fuse_block(block: ResnetBlock2D) -> None:
    for norm, conv in (("norm1", block.conv1), ("norm2", block.conv2)):
        before = block.get_submodule(norm)
        if isinstance(before, nn.GroupNorm) and _takes_norm(conv):
            conv.take_norm(before)
            replace_module(block, norm, nn.Identity())
        else:
            replace_module(block, norm, nn.Sequential(before, nn.SiLU()))
    project = block.time_emb_proj
    if project is not None and not block.skip_time_act and not isinstance(project, FeatureTable | Unserved):
        replace_module(block, "time_emb_proj", nn.Sequential(nn.SiLU(), project))
    replace_module(block, "nonlinearity", nn.Identity())


def _takes_norm(layer: object) -> TypeGuard[RuntimeLayer]:
    """Whether a layer is a convolution of one product, whose grids are in a table."""
    if not isinstance(layer, RuntimeLayer) or layer.geometry is None or len(layer.parts) != 1:
        return False
    return layer.parts[0].table is not None and layer.parts[0].channels is None
