"""Load and call any diffusers denoiser without knowing its class.

Nothing here names a model: what a denoiser takes is read from its config and from the signature of its `forward`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from quant_core.diffusion.streamed import is_large, stored_tensors, stream_weights
from quant_core.errors import DenoiserError
from quant_spec.documents import read_json_file
from quant_spec.model_files import CONDITIONING_FILE, DENOISER_FOLDERS, SCHEDULER_FILE, first_file
from quant_spec.pipeline import MODEL_INDEX, component_entries, is_whole

#: Stands in for the length of a sequence of packed latents where neither config nor conditioning gives it.
PACKED_TOKENS = 1024
# Of one sample: a GiB of float32.
_MOST_NUMBERS = 1 << 28
#: What keys of a conditioning begin with whose tensors have no row for each sample, but are the same for all of them.
SHARED = "shared."
#: What keys begin with whose tensors, shape (), stand for numbers of Python.
PLAIN = "plain."


@dataclass(frozen=True, slots=True)
class Denoiser:
    """A loaded model folder: the network in float32 and eval mode, and what lies beside it."""

    model: nn.Module
    config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any] | None
    conditioning: Path | None  # safetensors with prompts' conditioning
    pipeline: Mapping[str, Any] | None = None  # the pipeline's model_index.json, or what of it is known
    folder: Path | None = None  # where all of it lies

    @property
    def is_whole(self) -> bool:
        """Whether a whole pipeline lies around it."""
        return is_whole(self.pipeline)


def load_denoiser(folder: str | Path, *, streamed: bool | None = False) -> Denoiser:
    """Load a diffusers model folder, or a pulled model artifact, in full precision.

    Parameters
    ----------
    folder : str | Path
        Holds `config.json` itself or in a subfolder `denoiser`, `unet` or `transformer`;
        `scheduler/scheduler_config.json` and `conditioning.safetensors` are looked for in it, then (for the former
        kind) in its parent.
    streamed : bool or None
        Leave weights in their files (`quant_core.diffusion.streamed`), for who does not write to them; None does so
        where they are large.

    Returns
    -------
    Denoiser
        Its parameters are float32, do not require gradients and live on the CPU.

    Raises
    ------
    DenoiserError
        If there is no config, diffusers has no such class, the pipeline's index names another, or the safetensors do
        not match the class key by key.
    """
    root = Path(folder)
    home = find_denoiser_folder(root)
    config = read_json_file(home / "config.json")
    beside = (root,) if home != root else (root, root.parent)
    scheduler = first_file(beside, SCHEDULER_FILE)
    index = home.parent / MODEL_INDEX
    pipeline = read_json_file(index) if home != root and index.is_file() else None
    if pipeline is not None:
        _check_index(pipeline, home, config["_class_name"])
    return Denoiser(
        model=_load_model(home, config, is_large(home) if streamed is None else streamed),
        config=config,
        scheduler_config=None if scheduler is None else read_json_file(scheduler),
        conditioning=first_file(beside, CONDITIONING_FILE),
        pipeline=pipeline,
        folder=root,
    )


def empty_denoiser(folder: Path) -> Denoiser:
    """Return a model folder's denoiser without its weights, on torch's meta device: for what never calls it."""
    import diffusers
    from accelerate import init_empty_weights

    home = find_denoiser_folder(folder)
    config = read_json_file(home / "config.json")
    cls = getattr(diffusers, config["_class_name"])
    with init_empty_weights():
        model = cls.from_config(config)
    scheduler = folder / SCHEDULER_FILE
    return Denoiser(
        model=model.eval(),
        config=config,
        scheduler_config=read_json_file(scheduler) if scheduler.is_file() else None,
        conditioning=None,
        pipeline=read_json_file(folder / MODEL_INDEX),
        folder=folder,
    )


def find_denoiser_folder(root: Path) -> Path:
    """Return the folder of `config.json` under a model folder."""
    for home in (root, *(root / name for name in DENOISER_FOLDERS)):
        config = home / "config.json"
        if config.is_file() and "_class_name" in read_json_file(config):
            return home
    raise DenoiserError(
        f"model folder {root}: no config.json with a _class_name in it or in {', '.join(DENOISER_FOLDERS)}"
    )


def _check_index(index: Mapping[str, Any], home: Path, class_name: str) -> None:
    """Refuse a pipeline that would load another class than the denoiser's own config names."""
    _, named = component_entries(index).get(home.name, ("", class_name))
    if named != class_name:
        raise DenoiserError(
            f"{home.parent / MODEL_INDEX}: {home.name}: got {named}, wanted {class_name} as in {home.name}/config.json"
        )


def _load_model(home: Path, config: Mapping[str, Any], streamed: bool) -> nn.Module:
    """Build the class that the config names and load its weights strictly."""
    import diffusers  # seconds of import: only where a model is really loaded

    class_name = config["_class_name"]
    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_pretrained")):
        raise DenoiserError(
            f"{home}/config.json: got class {class_name!r}, wanted a model class of diffusers {diffusers.__version__}"
        )
    if config.get("quantization_config") is not None:
        raise DenoiserError(f"{home}/config.json: got a quantized model, wanted full precision")
    if streamed and (made := _streamed(cls, config, home)) is not None:
        return made
    try:
        model, info = cls.from_pretrained(
            home, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:  # with a config of a stranger's, a constructor may raise anything
        raise DenoiserError(f"{home}: weights do not load: {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise DenoiserError(
                f"{home}: {problem.replace('_', ' ')} for {class_name}: {sorted(map(str, info[problem]))[:3]}"
            )
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _streamed(cls: Any, config: Mapping[str, Any], home: Path) -> nn.Module | None:
    """Build a model around its files; None where names or shapes are not its own, so that loading must convert."""
    from accelerate import init_empty_weights

    try:
        stored = stored_tensors(home)
    except (OSError, SafetensorError) as error:
        raise DenoiserError(f"{home}: weights do not load: {_first_line(error)}") from error
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = cls.from_config(config)
    except Exception as error:  # as above
        raise DenoiserError(f"{home}: weights do not load: {_first_line(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in stored.items()}:
        return None
    stream_weights(model, stored)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class ForwardSignature:
    """Names of a denoiser's forward parameters."""

    sample: str
    timestep: str
    keywords: frozenset[str]  # all others, without `return_dict`
    required: frozenset[str]  # those of `keywords` without a default
    returns_dict: bool


def forward_signature(model: nn.Module) -> ForwardSignature:
    """Read what `model.forward` takes.

    Raises
    ------
    DenoiserError
        If it has no sample or no timestep parameter.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {n: p for n, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds}
    sample = next(iter(parameters), None)
    timestep = next((name for name in ("timestep", "timesteps", "t") if name in parameters), None)
    if sample is None or timestep is None or sample == timestep:
        raise DenoiserError(f"{type(model).__name__}.forward: got {list(parameters)}, wanted a sample and a timestep")
    keywords = {n: p for n, p in parameters.items() if n not in (sample, timestep, "return_dict")}
    required = frozenset(n for n, p in keywords.items() if p.default is inspect.Parameter.empty)
    return ForwardSignature(sample, timestep, frozenset(keywords), required, "return_dict" in parameters)


def call_denoiser(model: nn.Module, x: Tensor, t: Tensor | float, conditioning: Mapping[str, Any]) -> Tensor:
    """Predict with any diffusers denoiser.

    Parameters
    ----------
    x : Tensor, shape (B, ...), dtype float32
        Denoiser inputs, after the scheduler's scaling.
    t : Tensor, shape () or (B,), or a number
        Timesteps as the model takes them.
    conditioning : mapping of str to Tensor, leading dimension B
        By forward keyword; a dotted key (`added_cond_kwargs.time_ids`) or a nested mapping fills a dictionary argument.
        Those with `SHARED` before their keyword have no rows; those with `PLAIN` become numbers.

    Returns
    -------
    Tensor, shape as `x`
        The prediction, without learned-variance channels.
    """
    signature = forward_signature(model)
    steps = torch.as_tensor(t, device=x.device)
    # Some have no default for what may be None, as pipelines then say.
    arguments = dict.fromkeys(signature.required) | nest(conditioning)
    arguments |= {signature.sample: x, signature.timestep: steps.expand(len(x))}
    if unknown := sorted(set(arguments) - signature.keywords - {signature.sample, signature.timestep}):
        raise DenoiserError(
            f"{type(model).__name__}.forward: got conditioning {unknown}, wanted some of {sorted(signature.keywords)}"
        )
    if signature.returns_dict:
        arguments["return_dict"] = False
    output = model(**arguments)
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    learns_variance = prediction.shape[1] == 2 * x.shape[1] and prediction.shape[2:] == x.shape[2:]
    return prediction[:, : x.shape[1]] if learns_variance else prediction


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dictionaries, or tuples if they are all #0, #1, ...; `PLAIN` ones into numbers."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        is_plain = key.startswith(PLAIN)
        *parents, leaf = key.removeprefix(SHARED).removeprefix(PLAIN).split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value.item() if is_plain else value
    return {key: _sequences(value) for key, value in nested.items()}


def _sequences(value: Any) -> Any:
    """Turn dictionaries with the keys #0, #1, ... into tuples."""
    if not isinstance(value, dict):
        return value
    items = {key: _sequences(item) for key, item in value.items()}
    return tuple(items[f"#{place}"] for place in range(len(items))) if "#0" in items else items


def config_value(model: nn.Module, *names: str) -> Any:
    """Return the first of the config's entries that exists and is not None."""
    config: Mapping[str, Any] = getattr(model, "config", {})
    return next((config[name] for name in names if config.get(name) is not None), None)


def sample_shape(model: nn.Module, tokens: int | None = None) -> tuple[int, ...]:
    """Return the shape of one sample of a denoiser, without the batch dimension.

    (C, H, W) or, for a network of 1-D convolutions, (C, L), from the config's `in_channels` and `sample_size`;
    (tokens, C) for a network without a `sample_size`, which denoises packed latents, where `tokens` counts them
    (default 1024).

    Raises
    ------
    DenoiserError
        If the config has no `in_channels`, or no `sample_size` where a convolution reads the sample.
    """
    channels, size = config_value(model, "in_channels"), config_value(model, "sample_size")
    name = type(model).__name__
    if channels is None:
        raise DenoiserError(f"{name}: got a config without in_channels, wanted the sample's channels")
    kinds = _convolutions(model)
    if size is None:
        if channels in kinds.values():
            raise DenoiserError(
                f"{name}: got sample_size null in its config, wanted the size of a sample: --sample-size N or HxW (the "
                "latent's, not the image's), or sample_size in config.json"
            )
        return (tokens or PACKED_TOKENS, channels)
    one_dimension = nn.Conv1d in kinds and nn.Conv2d not in kinds
    shape = (channels, *(size if isinstance(size, list | tuple) else [size] * (1 if one_dimension else 2)))
    if not all(isinstance(each, int) and each > 0 for each in shape) or math.prod(shape) > _MOST_NUMBERS:
        raise DenoiserError(
            f"{name}: got in_channels {channels!r} and sample_size {size!r} in its config, wanted whole numbers "
            f"from 1, and no sample of more than {_MOST_NUMBERS} numbers"
        )
    return shape


def _convolutions(model: nn.Module) -> dict[type[nn.Module], int]:
    """Return the kinds of convolutions, quantized or not, each with the input channels of the first that there is."""
    found: dict[type[nn.Module], int] = {}
    for module in model.modules():
        kind = getattr(module, "kind", type(module))  # a quantized layer's: what it was
        if kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            found.setdefault(kind, module.in_channels)  # type: ignore[arg-type]
    return found


def has_tokens(model: nn.Module) -> bool:
    """Whether a denoiser's samples are packed tokens, shape (tokens, C), and not (C, H, W) or (C, L)."""
    return config_value(model, "sample_size") is None


def has_signals(model: nn.Module) -> bool:
    """Whether a denoiser's samples are signals, shape (C, L), as audio is."""
    return not has_tokens(model) and len(sample_shape(model)) == 2


def channel_dim(model: nn.Module) -> int:
    """Return the dimension of a batch of samples that holds the channels: the last of packed tokens, else 1."""
    return -1 if has_tokens(model) else 1
