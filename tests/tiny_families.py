"""Pipelines of many families with random weights of a few thousand numbers, saved as their users would have them.

What is in here is sizes alone: how a family is called, what its denoiser is told, and how it decodes is diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

EMOJI_SD = Path(__file__).parents[1] / "examples" / "models" / "emoji-sd"
WORDS = 1600  # more than the tokenizer has, with what is added to it
PROMPTS = ("red heart", "red apple", "owl", "blue car")


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of pipeline, and what calling a tiny one takes.

    Attributes
    ----------
    make : callable
        Returns the pipeline.
    arguments : mapping
        Of its call, for the recipe's `sampler.arguments`.
    images : tuple of str
        Keywords of its call that are images.
    arrays : mapping of str to tuple of int
        Keywords of its call that are arrays, and the shape of one row.
    steps : int
        `num_inference_steps`.
    has_prompts : bool
        Whether its call takes `prompt`.
    """

    make: Callable[[], Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    steps: int = 2
    has_prompts: bool = True

    def save(self, folder: Path) -> Path:
        """Save it with seeded weights."""
        torch.manual_seed(0)
        self.make().save_pretrained(folder)
        return folder

    def write_inputs(self, folder: Path) -> Path:
        """Write a prompts file of four lines to a folder, with the files that it names; return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        columns = [*(["prompt"] if self.has_prompts else []), *self.images, *self.arrays]
        rows = ["\t".join(columns)]
        for place, prompt in enumerate(PROMPTS):
            generator = np.random.default_rng(place)
            cells = {"prompt": prompt}
            for name in self.images:
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if "mask" in name else pixels
                cells[name] = f"{name}-{place}.png"
                Image.fromarray(pixels).save(folder / cells[name])
            for name, shape in self.arrays.items():
                cells[name] = f"{name}-{place}.npy"
                np.save(folder / cells[name], generator.standard_normal(shape).astype(np.float32))
            rows.append("\t".join(cells[name] for name in columns))
        path = folder / "prompts.tsv"
        path.write_text("\n".join(rows) + "\n")
        return path

    def inputs(self, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a user calls the pipeline with for the first line of the prompts file in a folder."""
        told: dict[str, Any] = {**self.arguments, "num_inference_steps": self.steps}
        if self.has_prompts:
            told["prompt"] = PROMPTS[0]
        told |= {name: Image.open(folder / f"{name}-0.png") for name in self.images}
        return told | {
            name: torch.from_numpy(np.load(folder / f"{name}-0.npy"))[None].to(dtype) for name in self.arrays
        }


def _clip(*, projected: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
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
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=1
    )
    return transformers.T5EncoderModel(config).eval()


def _gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=WORDS,
        head_dim=4,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_key_value_heads=2,
    )
    return transformers.Gemma2Model(config).eval()


def _bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def _tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(EMOJI_SD / "tokenizer")


def _vae(channels: int = 4, blocks: int = 2, **more: Any) -> Any:
    """Return a decoder; a call's default size may be fixed, and is then as many latents as its blocks leave."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **more,
    )


def _flow_vae(channels: int) -> Any:
    return _vae(channels, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)


def _unet(**changes: Any) -> Any:
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**(config | changes))


def _ddim() -> Any:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1)


def _text() -> dict[str, Any]:
    """Return one CLIP, and that nothing looks for what should not be seen."""
    return {
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def lcm() -> Any:
    """Latent consistency: guidance is an embedding, `timestep_cond`."""
    scheduler = diffusers.LCMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    return diffusers.LatentConsistencyModelPipeline(
        vae=_vae(), **_text(), unet=_unet(time_cond_proj_dim=16), scheduler=scheduler
    )


def heun() -> Any:
    """Stable Diffusion with a scheduler of second order: most timesteps are called at twice."""
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    return diffusers.StableDiffusionPipeline(vae=_vae(), **_text(), unet=_unet(), scheduler=scheduler)


def inpaint() -> Any:
    """Stable Diffusion for inpainting: latent, mask and masked image side by side."""
    return diffusers.StableDiffusionInpaintPipeline(vae=_vae(), **_text(), unet=_unet(in_channels=9), scheduler=_ddim())


def _control() -> Any:
    """Return a ControlNet whose residuals are not zero, as they are before training."""
    control = diffusers.ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 8),
    )
    for convolution in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.1)
    return control


def controlnet() -> Any:
    """Stable Diffusion whose U-Net is told a ControlNet's residuals."""
    return diffusers.StableDiffusionControlNetPipeline(
        vae=_vae(), **_text(), unet=_unet(), controlnet=_control(), scheduler=_ddim()
    )


def controlnet_image() -> Any:
    """The same from an image, of which its first steps are left out, beside the one that controls."""
    return diffusers.StableDiffusionControlNetImg2ImgPipeline(
        vae=_vae(), **_text(), unet=_unet(), controlnet=_control(), scheduler=_ddim()
    )


def controlnet_sd3() -> Any:
    """Stable Diffusion 3 whose transformer is told a ControlNet's residuals of its blocks."""
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    }
    control = diffusers.SD3ControlNetModel(num_layers=1, **sizes)
    for layer in (*control.controlnet_blocks, control.pos_embed_input.proj):
        nn.init.normal_(layer.weight, std=0.1)
    return diffusers.StableDiffusion3ControlNetPipeline(
        transformer=diffusers.SD3Transformer2DModel(num_layers=2, **sizes),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.0),
        text_encoder=_clip(projected=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_tokenizer(),
        controlnet=control,
    )


def _sdxl_unet(width: int, ids: int) -> Any:
    return _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * ids + 16,
        cross_attention_dim=width,
        use_linear_projection=True,
    )


def sdxl() -> Any:
    """Two text encoders, pooled text and sizes as added conditions, Euler."""
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        unet=_sdxl_unet(32, 6),
        scheduler=_euler(),
    )


def refiner() -> Any:
    """SDXL's refiner: an image, one text encoder, an aesthetic score among the added conditions."""
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        unet=_sdxl_unet(16, 5),
        scheduler=_euler(),
        requires_aesthetics_score=True,
    )


def flux_transformer(channels: int, out: int | None = None) -> Any:
    """Return Flux's transformer, of one block of each kind."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=out,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


def _flux_parts() -> dict[str, Any]:
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "text_encoder": _clip(),
        "tokenizer": _tokenizer(),
        "text_encoder_2": _t5(),
        "tokenizer_2": _tokenizer(),
    }


def flux() -> Any:
    """Packed latents with positions, sigmas of its own, embedded guidance."""
    return diffusers.FluxPipeline(vae=_flow_vae(4), transformer=flux_transformer(16), **_flux_parts())


def flux_fill() -> Any:
    """Flux for inpainting: packed latents beside those of the masked image and a packed mask."""
    return diffusers.FluxFillPipeline(vae=_flow_vae(4), transformer=flux_transformer(48, 16), **_flux_parts())


def pixart() -> Any:
    """A transformer that learns the variance; T5."""
    return diffusers.PixArtAlphaPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=_vae(blocks=4),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=32,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def sana() -> Any:
    """Linear attention, a decoder-only text encoder, a deep-compression autoencoder."""
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(4,) * 6,
        decoder_block_out_channels=(4,) * 6,
        encoder_qkv_multiscales=((),) * 5 + ((5,),),
        decoder_qkv_multiscales=((),) * 5 + ((5,),),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.SanaPipeline(_tokenizer(), _gemma(), vae, transformer, scheduler)


def hunyuan_dit() -> Any:
    """Two text encoders with masks, rotary positions as a pair of tensors, style and size as conditions."""
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=16,
        activation_fn="gelu-approximate",
    )
    return diffusers.HunyuanDiTPipeline(
        vae=_vae(blocks=4),
        **(_text() | {"text_encoder": _bert()}),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(),
    )


def lumina2() -> Any:
    """Two calls a step, a time that grows, a decoder-only text encoder with a mask."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        scaling_factor=1.0,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.Lumina2Pipeline(transformer, scheduler, _flow_vae(4), _gemma(), _tokenizer())


def wan() -> Any:
    """Text to video: latents of several frames, two calls a step."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_t5(),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _kandinsky_parts() -> dict[str, Any]:
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(32, 32),  # these blocks have groups of 32 whatever one says
            layers_per_block=1,
            encoder_hid_dim=16,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        "movq": diffusers.VQModel(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            in_channels=3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            norm_type="spatial",
            num_vq_embeddings=12,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * 4,
            vq_embed_dim=4,
        ),
    }


def kandinsky() -> Any:
    """A decoder of image embeddings, which are all that it is told."""
    return diffusers.KandinskyV22Pipeline(**_kandinsky_parts())


def kandinsky_combined() -> Any:
    """Prompts become image embeddings by a prior of its own, which has another scheduler."""
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1, num_embeddings=24
    )
    prior.clip_std = nn.Parameter(torch.ones(prior.clip_std.shape))
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        image_size=28,
        projection_dim=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        patch_size=14,
    )
    return diffusers.KandinskyV22CombinedPipeline(
        **_kandinsky_parts(),
        prior_prior=prior.eval(),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=_clip(projected=True),
        prior_tokenizer=_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=transformers.CLIPImageProcessor(size=28, crop_size=28),
    )


_SMALL, _MEDIUM, _LARGE = ({"height": side, "width": side} for side in (16, 32, 64))
_TOKENS = {"max_sequence_length": 24}
_EXACT = {"use_resolution_binning": False}
FAMILIES: dict[str, Family] = {
    "lcm": Family(lcm, _SMALL),
    "heun": Family(heun, _SMALL, steps=3),
    "inpaint": Family(inpaint, _SMALL, images=("image", "mask_image")),
    "controlnet": Family(controlnet, images=("image",)),
    "controlnet-image": Family(controlnet_image, images=("image", "control_image"), steps=4),
    "controlnet-sd3": Family(controlnet_sd3, _SMALL | _TOKENS, images=("control_image",)),
    "sdxl": Family(sdxl, _SMALL),
    "refiner": Family(refiner, images=("image",), steps=10),
    "flux": Family(flux, _SMALL | _TOKENS),
    "flux-fill": Family(flux_fill, _SMALL | _TOKENS, images=("image", "mask_image")),
    "pixart": Family(pixart, _MEDIUM | _TOKENS | _EXACT),
    "sana": Family(sana, _LARGE | {"complex_human_instruction": None} | _TOKENS | _EXACT),
    "hunyuan-dit": Family(hunyuan_dit, _MEDIUM | _EXACT),
    "lumina2": Family(lumina2, _LARGE | _TOKENS),
    "wan": Family(wan, _SMALL | _TOKENS | {"num_frames": 5}),
    "kandinsky": Family(
        kandinsky, _LARGE, arrays=dict.fromkeys(("image_embeds", "negative_image_embeds"), (16,)), has_prompts=False
    ),
    "kandinsky-combined": Family(kandinsky_combined, _LARGE),
}


def save_clip(folder: Path) -> Path:
    """Save a CLIP model of images and text, as a CLIP score takes it, to a folder."""
    torch.manual_seed(0)
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": WORDS, "max_position_embeddings": 24, "eos_token_id": 1, **parts},
        vision_config={"image_size": 28, "patch_size": 14, **parts},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.CLIPProcessor(images, _tokenizer()).save_pretrained(folder)
    return folder
