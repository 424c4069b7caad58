"""Names of transformers' tensors in their authors' checkpoints, which ComfyUI and its kind load, by those of diffusers.

Besides names, checkpoints differ from diffusers in two ways, both by output channels (rows), so that codes and scales
of channels stay what they are: layers that read the same input are one, its rows those of query, key, value (and the
first of the feed-forward) in that order; and the modulation of a last norm has shift before scale, not behind.

References
----------
SD3: Stability-AI/sd3-ref, mmditx.py. Flux: black-forest-labs/flux, model.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.errors import ArtifactError

_ENDS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class OriginalTensor:
    """A tensor of a checkpoint: its name, diffusers' tensors whose rows it has, and whether its halves are swapped."""

    name: str
    sources: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """How a class of models is named in checkpoints.

    Attributes
    ----------
    architecture : str
        As ComfyUI-GGUF calls it.
    layers : mapping of str
        Of layers outside of blocks, diffusers' name to the checkpoint's.
    blocks : mapping
        Prefix of blocks to the checkpoint's, and the layers in them: several of diffusers', joined by "+", are one. The
        weight of a norm may have a name of its own, which ends in .scale.
    tensors : mapping
        Whole tensors that no layer has.
    """

    architecture: str
    layers: dict[str, str]
    blocks: dict[str, tuple[str, dict[str, str]]]
    tensors: dict[str, str]


_SD3_BLOCK = {
    "attn.to_q+attn.to_k+attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj": "context_block.attn.qkv",
    "attn2.to_q+attn2.to_k+attn2.to_v": "x_block.attn2.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FLUX_DOUBLE = {
    "attn.to_q+attn.to_k+attn.to_v": "img_attn.qkv",
    "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm.scale",
    "attn.norm_k": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k": "txt_attn.norm.key_norm.scale",
}
_FLUX_SINGLE = {
    "attn.to_q+attn.to_k+attn.to_v+proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm.scale",
    "attn.norm_k": "norm.key_norm.scale",
}
_MODULATION = {"norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear"}

NAMINGS = {
    "SD3Transformer2DModel": Naming(
        "sd3",
        {
            **_MODULATION,
            "pos_embed.proj": "x_embedder.proj",
            "context_embedder": "context_embedder",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        },
        {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)},
        {"pos_embed.pos_embed": "pos_embed"},
    ),
    "FluxTransformer2DModel": Naming(
        "flux",
        {
            **_MODULATION,
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        },
        {
            "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
        {},
    ),
}


def naming_of(class_name: str) -> Naming:
    """Return how models of a class of diffusers are named in checkpoints; ArtifactError if that is not known."""
    if class_name not in NAMINGS:
        raise ArtifactError(
            f"model: got {class_name}, whose names in checkpoints are not known; wanted {' or '.join(NAMINGS)}, or a "
            "format with diffusers' names"
        )
    return NAMINGS[class_name]


def original_tensors(naming: Naming, names: Iterable[str]) -> list[OriginalTensor]:
    """Return the tensors of a checkpoint that has all of a model's.

    Raises
    ------
    ArtifactError
        If the checkpoint has no place for some tensor, or only a part of one is there.
    """
    left = set(names)
    made = [OriginalTensor(name, (source,)) for source, name in naming.tensors.items()]
    for source, name in naming.layers.items():
        made += _of_layer((source,), name, left, swapped=source == "norm_out.linear")
    for prefix, (original, layers) in naming.blocks.items():
        indices = sorted({int(name.split(".")[1]) for name in left if name.startswith(f"{prefix}.")})
        for index in indices:
            for joined, name in layers.items():
                sources = tuple(f"{prefix}.{index}.{source}" for source in joined.split("+"))
                # SD3's last block does not pass the text on; its norm is one that ends a model
                is_last = naming.architecture == "sd3" and index == indices[-1] and joined == "norm1_context.linear"
                made += _of_layer(sources, f"{original}.{index}.{name}", left, swapped=is_last)
    left -= {source for tensor in made for source in tensor.sources}
    if left:
        raise ArtifactError(
            f"tensor {min(left)}: got no name for it in {naming.architecture}'s checkpoints, wanted one"
        )
    return made


def swap_halves(rows: Tensor) -> Tensor:
    """Return the second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])


def _of_layer(sources: tuple[str, ...], name: str, names: set[str], *, swapped: bool) -> list[OriginalTensor]:
    """Return the weight and bias of a layer, those that are there; of joined ones, all or none."""
    made = []
    for end in _ENDS:
        whole = tuple(f"{source}.{end}" for source in sources)
        there = names.intersection(whole)
        if there and len(there) < len(whole):
            raise ArtifactError(f"tensor {name}.{end}: got {', '.join(sorted(there))} of it, wanted {', '.join(whole)}")
        if there:
            made.append(OriginalTensor(name if name.endswith(".scale") else f"{name}.{end}", whole, swapped))
    return made
