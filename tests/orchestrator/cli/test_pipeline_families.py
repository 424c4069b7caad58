"""Pipelines of many families, tiny ones, from the command line to the images that their releases draw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file

from quant_core.errors import UnknownTimestepError
from tests.family_run import RefusedError, draw, load, run_family, settings
from tests.tiny_families import FAMILIES, flux_transformer

Cli = Callable[..., Any]
#: One for each kind of thing that pipelines do: two calls a step, files as inputs, residuals, tensors for all rows.
QUICK = ("lumina2", "inpaint")
#: Pictures that are whole: two sizes, and one that can be seen through.
PICTURES = (((16, 16), (9, 9, 9, 255)), ((24, 16), (9, 9, 9, 255)), ((16, 16), (9, 9, 9, 200)))


@pytest.fixture
def run(cli: Cli, without_ray: None) -> Callable[..., None]:
    """Call the command line, and raise what it says where it refuses."""

    def call(*words: str | Path) -> None:
        answer = cli(*words)
        if answer.code:
            raise RefusedError(answer.err.strip().splitlines()[-1])

    return call


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_is_quantized_loaded_and_called(name: str, run: Callable[..., None], tmp_path: Path) -> None:
    outcome = run_family(name, tmp_path, run, "minmax-w8a8")
    assert outcome.refused is None
    assert outcome.layers > 5
    assert outcome.psnr_db > 15
    exact, narrow = outcome.images.values()
    assert exact.shape == narrow.shape
    assert exact.shape[-1] == 3
    assert np.isfinite(narrow).all()
    # bfloat16 keeps the picture: a release that found other steps, or none, would draw another
    assert np.square(exact - narrow).mean() < 0.05
    steps = FAMILIES[name].steps
    more = {"num_inference_steps": 2 * steps + 1}
    with pytest.raises(UnknownTimestepError, match=rf"num_inference_steps={steps}\b"):
        draw(
            load(tmp_path / f"{name}-release", torch.float32), name, tmp_path / f"{name}-inputs", torch.float32, **more
        )


def test_pictures_are_told_upright_and_in_eight_bits(run: Callable[..., None], tmp_path: Path) -> None:
    FAMILIES["controlnet"].save(tmp_path / "model")
    depth = np.random.default_rng(0).integers(0, 2**16, (16, 24), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the file's first row is the picture's right side
    Image.fromarray(np.ascontiguousarray(depth.T[::-1])).save(tmp_path / "depth.png", exif=exif.tobytes())
    (tmp_path / "prompts.tsv").write_text("prompt\timage\n" + "owl\tdepth.png\n" * 2)
    words = ["--prompts", tmp_path / "prompts.tsv", *settings("controlnet"), "--out", tmp_path / "out"]
    run("run", "minmax-w8a8", "--model", tmp_path / "model", *words)
    told = {"prompt": "owl", "image": Image.fromarray((depth / 257).round().astype(np.uint8)).convert("RGB")}
    images = []
    for folder in (tmp_path / "model", tmp_path / "out"):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        how = {"num_inference_steps": 2, "output_type": "np", "num_images_per_prompt": 2, "generator": generators}
        images.append(load(folder, torch.float32)(**told, **how).images)
    assert images[0].shape == (2, 16, 24, 3)
    errors = np.square(images[0] - images[1]).mean((1, 2, 3))
    psnr = json.loads((tmp_path / "out" / "metrics.json").read_text())["psnr_db"]
    assert psnr == pytest.approx(float(np.mean(-10 * np.log10(errors))), abs=0.05)


def test_a_bare_denoiser_in_a_pipeline_that_sets_sigmas_of_its_own(run: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = flux_transformer(16)
    transformer.save_pretrained(tmp_path / "bare" / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "bare" / "scheduler")
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    told = {"encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 16)}
    told |= {"guidance": torch.full((2,), 3.5), "img_ids": places, "txt_ids": torch.zeros(7, 3)}
    save_file(told, tmp_path / "bare" / "conditioning.safetensors")
    sampler = {"scheduler": "FlowMatchEulerDiscreteScheduler", "timestep_scale": 0.001, "num_inference_steps": 4}
    words = [word for name, value in sampler.items() for word in ("--set", f"sampler.{name}={value}")]
    words += ["--set", "calibration.seeds=2", "--set", "evaluation.seeds=2", "--set", "evaluation.sqnr_seeds=1"]
    run("run", "minmax-w8a8", "--model", tmp_path / "bare", *words, "--out", tmp_path / "out")
    absent = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel.from_pretrained(tmp_path / "out"),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler"),
        **absent,
    )
    pipeline.set_progress_bar_config(disable=True)

    def call(sigmas: Any = None) -> torch.Tensor:
        latents: torch.Tensor = pipeline(
            prompt_embeds=told["encoder_hidden_states"][:1],
            pooled_prompt_embeds=told["pooled_projections"][:1],
            sigmas=sigmas,
            num_inference_steps=4,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        return latents

    with pytest.raises(UnknownTimestepError, match=r"num_inference_steps=4, and that scheduler's own sigmas"):
        call()
    assert bool(call(np.linspace(1, 0.001, 4)).isfinite().all())


def test_a_call_that_needs_files_is_refused_without_them(cli: Cli, tmp_path: Path) -> None:
    FAMILIES["inpaint"].save(tmp_path / "inpaint")
    inputs = FAMILIES["inpaint"].write_inputs(tmp_path / "inputs")
    added = cli("models", "add", tmp_path / "inpaint")
    assert added.code == 0
    assert "its call needs files: a prompts file (--prompts) with columns image, mask_image" in added.err
    (tmp_path / "words.txt").write_text("red heart\nowl\n")
    (tmp_path / "half.tsv").write_text("prompt\timage\nowl\tinputs/image-0.png\nowl\tinputs/image-1.png\n")
    (tmp_path / "gone.tsv").write_text("prompt\timage\tmask_image\nowl\tnot.png\tinputs/mask_image-0.png\n")
    (tmp_path / "odd.tsv").write_text("prompt\tportrait\nowl\tinputs/image-0.png\n")
    whole = (tmp_path / "inputs" / "image-0.png").read_bytes()
    for name, data in {"text": b"not a picture", "part": whole[: len(whole) // 2], "none": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        row = f"owl\t{name}.png\tinputs/mask_image-0.png\n"
        (tmp_path / f"{name}.tsv").write_text(f"prompt\timage\tmask_image\n{row}{row}")
    small, large, clear = (Image.new("RGBA", size, color) for size, color in PICTURES)
    for name, image in {"small": small, "large": large, "clear": clear}.items():
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "clear.tsv").write_text("prompt\timage\tmask_image\n" + "owl\tclear.png\tsmall.png\n" * 2)
    rows = "".join(f"owl\t{name}.png\tsmall.png\n" for name in ("small", "large"))
    (tmp_path / "sizes.tsv").write_text("prompt\timage\tmask_image\n" + rows)
    (tmp_path / "kind.tsv").write_text("prompt\timage\tmask_image\nowl\tphoto.gif\tsmall.png\n")
    (tmp_path / "number.tsv").write_text("prompt\timage\tmask_image\tstrength\nowl\tsmall.png\tsmall.png\t0.5\n")
    outside = tmp_path / "inner" / "outside.tsv"
    outside.parent.mkdir()
    outside.write_text("prompt\timage\nowl\t../inputs/image-0.png\n")
    for words, message in {
        (): "wanted a prompts file (--prompts) with columns image, mask_image",
        ("--prompts", tmp_path / "words.txt"): "prompts: got no column image, mask_image in",
        ("--prompts", tmp_path / "half.tsv"): "prompts: got no column mask_image in",
        ("--prompts", tmp_path / "gone.tsv"): "not.png",
        ("--prompts", tmp_path / "text.tsv"): "got image text.png (cannot identify image file), wanted a picture that",
        ("--prompts", tmp_path / "part.tsv"): "got image part.png (",
        ("--prompts", tmp_path / "none.tsv"): "got image none.png (",
        ("--prompts", tmp_path / "clear.tsv"): "got image clear.png (transparent pixels, which",
        ("--prompts", tmp_path / "sizes.tsv"): "large.png of 16 x 24 pixels beside one of 16 x 16, wanted one size, or",
        ("--prompts", tmp_path / "kind.tsv"): "got image 'photo.gif', wanted the name of a file (.png, .jpg",
        ("--prompts", tmp_path / "number.tsv"): "got strength 0.5, wanted text or the name of a file; what is the same",
        ("--prompts", tmp_path / "odd.tsv"): "prompts: got columns portrait in",
        ("--prompts", outside): "wanted a file in the folder of the prompts file",
    }.items():
        answer = cli("submit", "fast-w4a8", "--model", "inpaint", *words)
        assert (answer.code, answer.out) == (2, ""), words
        assert message in answer.err
        assert len(answer.err.strip().splitlines()) == 1
    sized = ("--prompts", tmp_path / "sizes.tsv", "--size", "16", "--dry-run")
    assert cli("submit", "fast-w4a8", "--model", "inpaint", *sized).code == 0
    once, again = (
        cli("submit", "fast-w4a8", "--model", "inpaint", "--prompts", inputs, "--dry-run", "--json").json
        for _ in range(2)
    )
    assert once["recipe"] == again["recipe"]
