"""Whole pipelines with random weights, small enough to be quantized in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

EMOJI_SD = Path(__file__).parents[1] / "examples" / "models" / "emoji-sd"


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.0,
        sample_size=16,
    )


def save_sd(folder: Path) -> Path:
    """Save emoji-sd, 64 x 64 pixels, with a random U-Net of two levels in place of its own: float16, 0.6M weights."""
    shutil.copytree(EMOJI_SD, folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    unet.half().save_pretrained(folder / "unet")
    return folder


def save_dit(folder: Path) -> Path:
    """Save a class-conditional pipeline: 1,000 classes, 16 x 16 pixels, a transformer that learns the variance."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline's label for no class is 1000, whatever the model
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    DiTPipeline(transformer, _vae(), DDIMScheduler()).save_pretrained(folder)
    return folder


def save_sd3(folder: Path, head_dim: int = 8) -> Path:
    """Save a flow-matching pipeline: two CLIPs and a T5 of random weights, 16 x 16 pixels; two heads of attention."""
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=1500,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=16,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    t5 = T5Config(vocab_size=1500, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=2 * head_dim,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    tokenizers = [CLIPTokenizer.from_pretrained(EMOJI_SD / "tokenizer") for _ in range(3)]
    encoders = [CLIPTextModelWithProjection(clip) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizers[2],
    )
    pipeline.save_pretrained(folder)
    return folder
