"""What the planner needs to know of a whole pipeline: its components, what its call takes, and what it costs.

The pipeline is called once, for two steps, as any prompt would call it; what its denoiser is told then is what it is
looked at with.
"""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quant_core.diffusion.conditioning import UNBATCHED, Conditioning
from quant_core.diffusion.denoiser import Denoiser
from quant_core.diffusion.embeddings import Embeddings, encode, encodes
from quant_core.diffusion.pipeline import call_parameters, decoder_of, is_for_text, load_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.diffusion.trajectories import PipelineTrajectories, Script
from quant_spec.errors import QuantServiceError
from quant_spec.pipeline import component_entries, denoiser_entry
from quant_spec.prompts import PromptLine
from quant_spec.sampler import Sampler
from quant_spec.scheduler_choice import default_scheduler

_STEPS = 2
GIGA = 1e9


def describe_pipeline(denoiser: Denoiser) -> tuple[dict[str, Any], tuple[Tensor, Conditioning] | None]:
    """Describe a whole pipeline for planning.

    Returns
    -------
    (dict, tuple or None)
        JSON: `class_name`; `denoiser`, the component that is quantized; `components`, for each its name, library,
        class, parameters and bytes; `prompts`, "prompt", "class_labels" or null; `takes`, names of its call's keywords;
        `guidance_scale`, its default, null if it has none; `rows`, of the denoiser's input for one seed at that
        guidance; `image_shape`; `encode_gmacs` and `decode_gmacs`, giga-MACs for one sample; `problem`, why it cannot
        be called, or null; `encodes`, whether prompts can be encoded by themselves. And a sample and one row of
        conditioning, as the denoiser gets them; None with a problem.
    """
    assert denoiser.folder is not None
    assert denoiser.pipeline is not None
    index = denoiser.pipeline
    facts: dict[str, Any] = {
        "class_name": index["_class_name"],
        "denoiser": denoiser_entry(index),
        "components": _components(denoiser.folder, index),
        **dict.fromkeys(
            ("prompts", "takes", "guidance_scale", "rows", "image_shape", "encode_gmacs", "decode_gmacs", "encodes")
        ),
        "problem": None,
    }
    try:
        scheduler = make_scheduler(
            Sampler(scheduler=default_scheduler(denoiser.scheduler_config)), denoiser.scheduler_config
        )
        pipeline = load_pipeline(denoiser.folder, denoiser.model, scheduler)
    except QuantServiceError as error:
        return facts | {"problem": str(error)}, None
    takes = call_parameters(pipeline)
    guidance = takes.get("guidance_scale")
    told = next((name for name in ("prompt", "class_labels") if name in takes), None)
    facts |= {
        "prompts": told,
        "takes": sorted(takes),
        "guidance_scale": float(guidance) if isinstance(guidance, int | float) else None,
    }
    if told is None:
        return facts | {"problem": f"its call takes neither prompt nor class_labels, but {', '.join(takes)}"}, None
    if more := _required(takes, told):
        return facts | {"problem": f"its call must be given {', '.join(more)}, besides {told}"}, None
    sampler = Sampler(num_inference_steps=_STEPS, guidance_scale=facts["guidance_scale"])
    line = PromptLine(prompt="a picture") if told == "prompt" else PromptLine(class_label=0)
    try:
        script, gmacs = _rehearse(pipeline, sampler, line)
    except Exception as error:  # a stranger's call may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        return facts | {"problem": f"its call raised {type(error).__name__}: {reason}"}, None
    facts["encodes"] = _encodes_alone(pipeline, sampler) if told == "prompt" else False
    row = {
        key: value if key in UNBATCHED or value.dim() == 0 else value[:1] for key, value in script.conditioning.items()
    }
    call = torch.zeros(1, *script.x), {key: v.expand(1) if v.dim() == 0 else v for key, v in row.items()}
    return facts | gmacs | {"rows": script.rows, "image_shape": list(script.sample)}, call


def _required(takes: Mapping[str, Any], told: str) -> list[str]:
    return [name for name, default in takes.items() if default is inspect.Parameter.empty and name != told]


def _rehearse(pipeline: Any, sampler: Sampler, line: PromptLine) -> tuple[Script, dict[str, float]]:
    """Run two steps of one sample; count what is done beside the denoiser."""
    decoder: Any = decoder_of(pipeline)
    spent = {"decode": 0, "denoise": 0}
    trajectories = PipelineTrajectories(pipeline, sampler, [line])

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
            spent[name] += counter.get_total_flops()
            return result

        return run

    model = trajectories.model
    model.forward = counted("denoise", model.forward)
    if decoder is not None:
        decoder.decode = counted("decode", decoder.decode)
    try:
        with FlopCounterMode(display=False) as counter:
            script = trajectories.script([0], wants_samples=True)
    finally:
        del model.forward
        if decoder is not None:
            del decoder.decode
    rest = counter.get_total_flops() - sum(spent.values())
    return script, {"encode_gmacs": max(rest, 0) / 2 / GIGA, "decode_gmacs": spent["decode"] / 2 / GIGA}


def _encodes_alone(pipeline: Any, sampler: Sampler) -> bool:
    """Whether prompts can be encoded by themselves, so that who samples needs no text encoders; they are taken away."""
    if not encodes(pipeline):
        return False
    lines = [PromptLine(prompt="a"), PromptLine(prompt="several words that take more room than one")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "embeddings.safetensors")
        try:
            encode(pipeline, sampler, lines, (0, 1), path)
            embeddings = Embeddings(path)
            for name in filter(is_for_text, tuple(pipeline.components)):
                pipeline.register_modules(**{name: None})
            PipelineTrajectories(pipeline, sampler, lines, embeddings).script([0])
        except Exception:  # then its text encoders read prompts in every task
            return False
    return True


def _components(folder: Path, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each component's name, library, class, numbers in its weights, and bytes of all its files."""
    found = []
    for name, (library, class_name) in component_entries(index).items():
        files = [path for path in (folder / name).glob("*") if path.is_file()]
        weights = [path for path in files if path.suffix == ".safetensors"]
        found.append(
            {
                "name": name,
                "library": library,
                "class_name": class_name,
                "parameters": sum(map(_count, weights)),
                "bytes": sum(path.stat().st_size for path in files),
            }
        )
    return found


def _count(path: Path) -> int:
    """Return how many numbers a safetensors file holds."""
    total = 0
    with safe_open(path, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - not a mapping
            count = 1
            for size in handle.get_slice(key).get_shape():
                count *= size
            total += count
    return total
