"""One step of packed models on the CPU's integer backend against float32 and bfloat16, and their images.

    taskset -c 0 python -m benchmarks.runtime --model FOLDER --release W8A8=FOLDER --release W4A8=FOLDER --out FILE
    taskset -c 0 python -m benchmarks.runtime --stable-diffusion 32 --out FILE

All models run one step in turn, `--repeats` times, and each keeps its least time and its median: load of other
processes falls on all alike. Seconds are the thread's CPU seconds, which do not count waiting for a processor, and
wall seconds beside them. float32 and bfloat16 are measured in both memory layouts; ratios are to the better one.
`--auto` loads as backend "auto" does, which times small products; `--float32` leaves bfloat16 out.
`--compile` measures each also compiled by Inductor (minutes each). `--stable-diffusion N` measures a UNet of Stable
Diffusion 1.5's shapes with random 8-bit codes on N x N latents, with float32 and with bfloat16 between its layers.

    python -m benchmarks.runtime --images --release W8A8=FOLDER --seeds 64 --out FILE

draws samples of the same seeds with the reference and the integer backend, and compares them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cli import give, named, parser
from benchmarks.sdxl import meta_unet
from benchmarks.timing import cpu_time, take_turns
from quant_core.artifact.folder import SCHEDULER_FILE
from quant_core.diffusion.denoiser import load_denoiser, sample_shape
from quant_core.diffusion.sampler import make_scheduler, sample, trajectory_conditioning
from quant_core.nn.layers import QUANTIZABLE
from quant_core.nn.model import build_quantized
from quant_core.runtime.build import build_runtime
from quant_core.runtime.loader import load_folder
from quant_spec.enums import ActivationMode, KernelBackend
from quant_spec.formats import ActivationSpec, LayerSpec, ModelFormat, WeightSpec
from quant_spec.sampler import Sampler

Step = Callable[[], Tensor]
_FLOATS = {
    "float32, contiguous": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last),
    "bfloat16, contiguous": (torch.bfloat16, torch.contiguous_format),
    "bfloat16, channels last": (torch.bfloat16, torch.channels_last),
}


def runtime(folder: Path, *, timed: bool = False) -> nn.Module:
    """Load a release for the integer CPU backend, or if `timed` as "auto" does, which times small products first."""
    model = load_folder(folder)
    build_runtime(model, KernelBackend.CPU, KernelBackend.AUTO if timed else KernelBackend.CPU)
    return model


def class_step(
    model: Callable[..., Any], batch: int, timestep: float, dtype: torch.dtype, layout: torch.memory_format
) -> Step:
    """Return one step of a class-conditional UNet that is in `dtype` and `layout`."""
    plain: Any = getattr(model, "_orig_mod", model)
    x = torch.randn(batch, *sample_shape(plain), generator=torch.Generator().manual_seed(0))
    x, labels = x.to(dtype, memory_format=layout), torch.arange(batch) % plain.config.num_class_embeds
    return lambda: model(x, torch.tensor(timestep), class_labels=labels).sample


def measured(steps: Mapping[str, Step], repeats: int) -> dict[str, dict[str, float]]:
    """Time every step in turn, in milliseconds."""
    return {
        name: {
            "cpu_ms": min(each.cpu_ms for each in times),
            "cpu_ms_median": statistics.median(each.cpu_ms for each in times),
            "wall_ms": min(each.wall_ms for each in times),
        }
        for name, times in take_turns(steps, repeats, cpu_time, progress=True).items()
    }


def ratios(times: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return each packed model's least and median CPU time over the better float32's and bfloat16's."""
    floats = {name for name in times if name.removesuffix(", compiled") in _FLOATS}
    result: dict[str, dict[str, float]] = {}
    for name in [name for name in times if name not in floats]:
        result[name] = {}
        for dtype in sorted({name.split(",")[0] for name in floats}, reverse=True):
            for compiled in (False, True):
                base = [times[other] for other in floats if dtype in other and other.endswith("compiled") is compiled]
                for key in ("cpu_ms", "cpu_ms_median") if base else ():
                    of = f"{key} of {dtype}{', compiled' if compiled else ''}"
                    result[name][of] = times[name][key] / min(each[key] for each in base)
    return result


def image_psnr(folder: Path, seeds: int) -> dict[str, Any]:
    """Return the PSNR, dB, of each seed's image against the reference's; peak 2 (-1 to 1)."""
    spec = Sampler(num_inference_steps=20)
    scheduler = make_scheduler(spec, json.loads((folder / SCHEDULER_FILE).read_text()))

    def draw(model: nn.Module) -> Tensor:
        told = trajectory_conditioning(model, spec, range(seeds), None)
        return sample(model, scheduler, spec, range(seeds), told, batch_size=min(seeds, 16)).clamp(-1, 1)

    want = draw(load_folder(folder))
    error = (want - draw(runtime(folder))).square().flatten(1).mean(1)
    found = [round(10 * float(torch.log10(4 / each)), 2) for each in error]
    above = sum(each >= 45 for each in found)
    return {"mean": statistics.mean(found), "least": min(found), "above 45 dB": above, "seeds": seeds, "all": found}


def stable_diffusion(size: int, repeats: int) -> dict[str, Any]:
    """Measure Stable Diffusion 1.5's shapes at batch 1."""
    shapes: dict[str, Any] = {"sample_size": size, "cross_attention_dim": 768}
    plain = meta_unet(shapes).to_empty(device="cpu")
    for tensor in plain.state_dict().values():
        tensor.normal_(std=0.02)
    text, x, t = torch.randn(1, 77, 768), torch.randn(1, 4, size, size), torch.tensor(500)

    def step(model: nn.Module, dtype: torch.dtype) -> Step:
        image = x.to(dtype, memory_format=torch.channels_last)
        return lambda: model(image, t, encoder_hidden_states=text.to(dtype)).sample

    plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = {
        "float32, channels last": step(plain, torch.float32),
        "bfloat16, channels last": step(_half_of(plain, shapes), torch.bfloat16),
        "W8A8": step(_random_codes(shapes), torch.float32),
        "W8A8, bfloat16 between layers": step(_random_codes(shapes).to(torch.bfloat16), torch.bfloat16),
    }
    times = measured(steps, repeats)
    return {"latents": size, "batch": 1, "times": times, "ratios": ratios(times)}


def _random_codes(shapes: dict[str, Any]) -> nn.Module:
    """Return a packed UNet for the integer backend: symmetric 8-bit weights, one range for each layer."""
    packed = meta_unet(shapes)
    spec = LayerSpec(WeightSpec(8, symmetric=True), ActivationSpec(8, mode=ActivationMode.STATIC))
    names = [name for name, module in packed.named_modules() if isinstance(module, QUANTIZABLE)]
    build_quantized(packed, ModelFormat(dict.fromkeys(names, spec), {}))
    packed = packed.to_empty(device="cpu")
    for name, tensor in packed.state_dict().items():
        if name.endswith("zero_point"):
            tensor.fill_(128)
        elif tensor.is_floating_point():
            tensor.fill_(0.01)
        else:
            tensor.random_(0, 256)
    build_runtime(packed, KernelBackend.CPU)
    return packed


def _half_of(model: nn.Module, shapes: dict[str, Any]) -> nn.Module:
    """Return a bfloat16 copy without a second float32 one."""
    half = meta_unet(shapes)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    half.load_state_dict(state, assign=True)
    return half


def emoji(
    model: Path,
    releases: dict[str, Path],
    batches: Sequence[int],
    repeats: int,
    compiled: bool,
    *,
    timed: bool,
    half: bool,
) -> dict[str, Any]:
    """Measure a class-conditional UNet's releases; bfloat16 too if `half`."""
    result: dict[str, Any] = {"batches": {}}
    for batch in batches:
        steps = {}
        timestep: Any = 0.0
        for name, folder in releases.items():
            packed = runtime(folder, timed=timed)
            config: Any = packed.config
            timestep = config.quantization_config.timesteps[7]
            steps[name] = class_step(packed, batch, timestep, torch.float32, torch.channels_last)
            if compiled:
                steps[name]()  # orders the weights for these images
                both = (batch, timestep, torch.float32, torch.channels_last)
                steps[f"{name}, compiled"] = class_step(torch.compile(packed), *both)
        for name, (dtype, layout) in _FLOATS.items():
            if dtype is torch.bfloat16 and not half:
                continue
            plain = load_denoiser(model).model.to(dtype, memory_format=layout)  # type: ignore[call-overload]
            steps[name] = class_step(plain, batch, timestep, dtype, layout)
            if compiled:
                steps[f"{name}, compiled"] = class_step(torch.compile(plain), batch, timestep, dtype, layout)
        times = measured(steps, repeats)
        result["batches"][str(batch)] = {"times": times, "ratios": ratios(times)}
    return result


def main() -> None:
    """Measure, print JSON and write it."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path)
    options.add_argument("--release", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--compile", action="store_true")
    options.add_argument("--auto", action="store_true", help="time small products at load, as backend auto does")
    options.add_argument(
        "--float32", action="store_true", help="leave bfloat16 out, which takes minutes without AVX512"
    )
    options.add_argument("--images", action="store_true")
    options.add_argument("--seeds", type=int, default=64)
    options.add_argument("--stable-diffusion", type=int, metavar="SIZE")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        releases = {name: Path(folder) for name, folder in named(args.release).items()}
        if args.stable_diffusion:
            found = stable_diffusion(args.stable_diffusion, args.repeats)
        elif args.images:
            found = {name: image_psnr(folder, args.seeds) for name, folder in releases.items()}
        else:
            how = {"timed": args.auto, "half": not args.float32}
            found = emoji(args.model, releases, args.batches, args.repeats, args.compile, **how)
    said: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "threads": 1}
    give(said | ({} if args.images else {"repeats": args.repeats}) | found, args.out)


if __name__ == "__main__":
    main()
