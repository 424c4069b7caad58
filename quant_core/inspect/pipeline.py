"""What the planner needs to know of a whole pipeline: its components, what its call takes, and what it costs.

The pipeline is called once, for two steps, as any prompt would call it; what its denoiser is told then is what it is
looked at with.
"""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quant_core.diffusion.conditioning import is_shared
from quant_core.diffusion.denoiser import Denoiser, config_value, forward_signature
from quant_core.diffusion.embeddings import Embeddings, encode, encodes
from quant_core.diffusion.pipeline import call_parameters, decoder_of, is_for_text, load_pipeline
from quant_core.diffusion.sampler import make_scheduler
from quant_core.diffusion.trajectories import PipelineTrajectories, Script
from quant_core.inspect.first_call import Call
from quant_spec.errors import QuantServiceError
from quant_spec.pipeline import component_entries, denoiser_entry
from quant_spec.prompts import PromptFile, PromptLine
from quant_spec.sampler import Sampler
from quant_spec.scheduler_choice import default_scheduler

#: Steps of a call, and of one that may leave most of them out, as those do that begin with an image.
_STEPS, _MANY_STEPS = 2, 20
#: Names of what a call may need besides a prompt: images, and embeddings of them.
_IMAGE, _EMBEDDING = re.compile(r"(\w+_)?image"), re.compile(r"(\w+_)?image_embeds")
#: A default size is too large to look at where a sample has more numbers than this; Flux's of 1024 x 1024 has 262,144.
_LARGEST = 400_000
#: Frames, and pixels of a side, to look at instead.
_FRAMES, _SIDES = 9, (256, 64)
#: Pixels of a side of the images that stand in for a user's.
_SIDE = 64
GIGA = 1e9


def describe_pipeline(denoiser: Denoiser) -> tuple[dict[str, Any], Call | None]:
    """Describe a whole pipeline for planning.

    Returns
    -------
    (dict, tuple or None)
        JSON: `class_name`; `denoiser`, the component that is quantized; `components`, for each its name, library,
        class, parameters and bytes; `prompts`, "prompt", "class_labels", "files" or null; `takes`, names of its call's
        keywords; `guidance_scale`, its default, null if it has none; `rows`, of the denoiser's input for one seed at
        that guidance; `needs`, keywords of its call that every prompt must come with a file for; `image_shape`;
        `encode_gmacs` and `decode_gmacs`, giga-MACs for one sample; `problem`, why it cannot be called, or null;
        `encodes`, whether prompts can be encoded by themselves; `arguments`, of the call that was looked at, which are
        for smaller samples where the default is too large. And what the denoiser is called with; None with a problem.
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
        "needs": [],
        "arguments": {},
        "problem": None,
    }
    try:
        scheduler = make_scheduler(
            Sampler(scheduler=default_scheduler(denoiser.scheduler_config)), denoiser.scheduler_config
        )
        pipeline = load_pipeline(denoiser.folder, denoiser.model, scheduler)
    except QuantServiceError as error:
        # Kept for good, unlike the folder that the model was put into to be looked at.
        said = str(error).replace(f"{denoiser.folder}/", "").replace(f" in {denoiser.folder}", "")
        return facts | {"problem": said}, None
    takes = call_parameters(pipeline)
    guidance = takes.get("guidance_scale")
    told = next((name for name in ("prompt", "class_labels") if name in takes), None)
    facts |= {
        "prompts": told,
        "takes": sorted(takes),
        "guidance_scale": float(guidance) if isinstance(guidance, int | float) else None,
    }
    images, embeddings = _stand_ins(takes, denoiser)
    if told is None and not embeddings:
        return facts | {"problem": f"its call takes neither prompt nor class_labels, but {', '.join(takes)}"}, None
    if more := [name for name in _required(takes, told) if name not in {**images, **embeddings}]:
        return facts | {"problem": f"its call must be given {', '.join(more)}, besides {told or 'files'}"}, None
    facts["prompts"] = told or "files"
    required = {name: value for name, value in (images | embeddings).items() if name in _required(takes, told)}
    problem, too_large = None, False
    further = {name: value for name, value in images.items() if name not in required}
    for size, needs in itertools.product(_sizes(takes), _choices(further)):
        line = _line(told, required | needs)
        sampler = Sampler(
            num_inference_steps=_MANY_STEPS if line.more else _STEPS,
            guidance_scale=facts["guidance_scale"],
            arguments=size,
        )
        try:
            script, gmacs = _rehearse(pipeline, sampler, line)
            break
        except Exception as caught:  # a stranger's call may raise anything
            raised = caught.__cause__ if isinstance(caught.__cause__, TypeError | ValueError) else caught
            reason = (str(raised).strip().splitlines() or [""])[0]
            said = f"its call raised {type(raised).__name__.strip('_')}: {reason}"
            problem = said if problem is None or too_large else problem
            too_large = isinstance(raised, _TooLargeError)
    else:
        return facts | {"problem": problem}, None
    facts |= {"needs": [name for name, _ in line.more], "arguments": size}
    facts["encodes"] = _encodes_alone(pipeline, sampler, line) if told == "prompt" else False
    row = {
        key: value if is_shared(key) or value.dim() == 0 else value[:1] for key, value in script.conditioning.items()
    }
    told_row = {key: v.expand(1) if v.dim() == 0 and not is_shared(key) else v for key, v in row.items()}
    call = Call(torch.zeros(1, *script.x), torch.zeros_like(script.timesteps[0]), told_row)
    return facts | gmacs | {"rows": script.rows, "image_shape": list(script.sample)}, call


def _required(takes: Mapping[str, Any], told: str | None) -> list[str]:
    return [name for name, default in takes.items() if default is inspect.Parameter.empty and name != told]


def _stand_ins(takes: Mapping[str, Any], denoiser: Denoiser) -> tuple[dict[str, PromptFile], dict[str, PromptFile]]:
    """Return a file for each image that a call takes, and for each embedding of images, by keyword."""
    picture, array = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (_SIDE, _SIDE), "gray").save(picture, "PNG")
    width = config_value(denoiser.model, "encoder_hid_dim", "cross_attention_dim")
    np.save(array, np.zeros(width if isinstance(width, int) else 1, np.float32))
    images = {name: PromptFile(f"{name}.png", picture.getvalue()) for name in takes if _IMAGE.fullmatch(name)}
    embeddings = {name: PromptFile(f"{name}.npy", array.getvalue()) for name in takes if _EMBEDDING.fullmatch(name)}
    return images, {name: value for name, value in embeddings.items() if takes[name] is inspect.Parameter.empty}


def _line(told: str | None, files: Mapping[str, PromptFile]) -> PromptLine:
    """Return a prompt, or a class label, with files."""
    more = tuple(sorted(files.items()))
    if told == "prompt":
        return PromptLine(prompt="a picture", more=more)
    return PromptLine(class_label=0 if told == "class_labels" else None, more=more)


def _sizes(takes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield arguments that make samples smaller and smaller, of those that a call takes; none first."""
    seen: list[dict[str, Any]] = []
    for frames, side in ((None, None), (_FRAMES, None), *((_FRAMES, side) for side in _SIDES)):
        wanted = {"num_frames": frames, "height": side, "width": side}
        size = {name: value for name, value in wanted.items() if value is not None and name in takes}
        if size not in seen:
            seen.append(size)
            yield size


class _TooLargeError(Exception):
    """A sample is too large to look at a denoiser with."""


def _choices(files: Mapping[str, PromptFile]) -> Iterator[dict[str, PromptFile]]:
    """Yield no file, each alone, each pair, and so on: the first choice with which a call works is what it needs."""
    for count in range(len(files) + 1):
        for names in itertools.combinations(files, count):
            yield {name: files[name] for name in names}


def _rehearse(pipeline: Any, sampler: Sampler, line: PromptLine) -> tuple[Script, dict[str, float]]:
    """Run two steps of one sample; count what is done beside the denoiser."""
    decoder: Any = decoder_of(pipeline)
    spent = {"decode": 0, "denoise": 0}
    trajectories = PipelineTrajectories(pipeline, sampler, [line])

    def bounded(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[forward_signature(model).sample]
        if isinstance(x, Tensor) and x[:1].numel() > _LARGEST:
            raise _TooLargeError(f"its samples are {' x '.join(map(str, x.shape[1:]))}, which is too large to look at")
        return denoise(*args, **kwargs)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = function(*args, **kwargs)
            spent[name] += counter.get_total_flops()
            return result

        return run

    model = trajectories.model
    denoise = counted("denoise", model.forward)
    model.forward = functools.wraps(model.forward)(bounded)
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


def _encodes_alone(pipeline: Any, sampler: Sampler, line: PromptLine) -> bool:
    """Whether prompts can be encoded by themselves, so that who samples needs no text encoders; they are taken away."""
    if not encodes(pipeline):
        return False
    lines = [replace(line, prompt=words) for words in ("a", "several words that take more room than one")]
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
