"""Load a packed model by folder, release name or address."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import nn

from kernels.backend import BackendUnavailableError, check_backend, resolve_backend
from quant_core.artifact.folder import check_weights, packed_home, read_config, verify_folder
from quant_core.errors import ArtifactError, QuantCoreError
from quant_core.runtime.build import build_runtime
from quant_core.runtime.memory import return_free_memory
from quant_core.runtime.replayed import Replayed, why_not_replayed
from quant_spec.enums import KernelBackend, WeightMemory
from quant_spec.errors import QuantizationError

Resolver = Callable[[str], Path]

# Names live in SQL and blobs in a store, which this package does not know: whoever does is found by name.
_RESOLVER = ("workers.storage.resolve", "pull")
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
_REFERENCE = re.compile(r"s3://.+|[a-z0-9][a-z0-9._-]{0,127}(@[a-z0-9][a-z0-9._-]{0,127})?")


def load_quantized(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    backend: KernelBackend | str = KernelBackend.AUTO,
    dtype: torch.dtype | None = None,
    memory: WeightMemory | str = WeightMemory.AUTO,
    replay: bool = False,
    resolve: Resolver | None = None,
) -> nn.Module:
    """Load a packed model, verified, in eval mode.

    The step that runs is state of the model, so one model serves one thread at a time; a copy serves another.

    Parameters
    ----------
    source : str or Path
        An artifact folder; or a release (`name@3`, `name@prod`) or the `s3://` address of an artifact, which are
        pulled first.
    device : torch.device or str, optional
        Where to put it; the CPU by default.
    backend : {"auto", "reference", "triton", "cpu"}
        What its layers run on: Triton kernels, the CPU's operators, or plain torch, which defines what the others
        compute and is what the release's metrics were measured with. "auto" takes Triton on a GPU, else the CPU's
        operators, of integers or, where it has no exact ones, of floats; of two exact products of small layers it takes
        the one that was faster when they were timed (2 s at most in a process), and floats where integers took 1.1 of
        their time. On a GPU it times FP8 layers (15 s at most). "cpu" and "triton" time nothing, so that two loads give
        the same bit for bit; nor does "auto" under `torch.use_deterministic_algorithms`. Layers that a backend
        can't run exactly run the reference; `quant_core.layer_runs(model)` says which, and why.
    dtype : {torch.float32, torch.float16, torch.bfloat16}, optional
        What the model computes in between its packed layers, and gives; float32 by default. Scales stay in float32.
        Later casts are refused, as of any quantized model of diffusers.
    memory : {"auto", "packed", "fast"}, optional
        How weights lie in memory. On a GPU: "packed" as in the release, "fast" as one int8 each, which gives the same
        and is multiplied faster where a call has many rows; "auto" takes "fast" on GPUs that were seen to be, but for
        layers that read one vector of a sample (embeddings of the timestep, modulations), which stay packed. On a CPU:
        one int8 each where it multiplies integers; others one float32 each with "fast" and "auto", packed on the
        reference with "packed". What each layer has, and its bytes, is in `quant_core.layer_runs(model)`.
    replay : bool
        Call it from CUDA graphs, on a GPU: the host launches a step's kernels at once, where it would take several
        times as long as the device to launch them one by one. The first call with each shape captures a graph, which
        keeps the memory of one call (`quant_core.runtime.replayed.Replayed`). Not of releases in differences between
        steps, whose order the host follows.
    resolve : callable, optional
        Turns a source that is not a folder into one. By default the installed Quantmill looks the name up in its
        registry.

    Returns
    -------
    Module
        The diffusers model of the artifact's class.

    Raises
    ------
    ArtifactError
        If there is no such folder, or what it holds is truncated, damaged, or not ours.
    BackendUnavailableError
        If the backend or device is not available here.
    QuantizationError
        If models do not compute in `dtype`, `memory` is none of these, or steps can't be replayed here.
    """
    check_backend(backend)
    place = check_device("cpu" if device is None else device)
    choice = resolve_backend(backend, place)
    if dtype not in _DTYPES:
        raise QuantizationError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, _DTYPES[1:]))}")
    if replay and place.type != "cuda":
        raise QuantizationError(f"replay: got device {place}, wanted a GPU: CUDA graphs are of kernels")
    folder = _locate(source, resolve)
    verify_folder(folder)
    model = load_runtime(folder, place, choice, asked=backend, dtype=dtype, memory=memory)
    if not replay:
        return model
    reason = why_not_replayed(model)
    if reason is not None:
        raise QuantizationError(f"replay: got {source}, whose {reason}; wanted replay=False")
    return Replayed(model)


def load_runtime(
    folder: Path,
    device: torch.device,
    backend: KernelBackend,
    *,
    asked: KernelBackend | str = KernelBackend.REFERENCE,
    dtype: torch.dtype | None = None,
    memory: WeightMemory | str = WeightMemory.AUTO,
) -> nn.Module:
    """Load a verified folder for a backend that `asked` was resolved to; as `load_quantized` otherwise."""
    model = load_folder(folder, dtype).to(device)
    build_runtime(model, backend, asked, memory)
    if device.type == "cpu" and backend is not KernelBackend.REFERENCE:
        # Layers were laid out anew. What is left must not keep the file mapped beside them.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        return_free_memory()
    return model


def load_folder(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load an artifact folder on the CPU, in eval mode, without comparing it with its manifest.

    For a folder whose bytes were just written or verified; a folder of links will do. As `load_quantized` otherwise.
    """
    folder = packed_home(folder)
    config = read_config(folder)
    check_weights(folder)
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ArtifactError(f"{folder}: got class {config.get('_class_name')!r}, wanted a model class of diffusers")
    loader = cast(Any, cls)
    try:
        model: nn.Module = loader.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **({} if dtype is None else {"torch_dtype": dtype})
        )
    except (QuantCoreError, QuantizationError):
        raise
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{folder}: does not load as {cls.__name__}: {reason}") from error
    return model


def _locate(source: str | Path, resolve: Resolver | None) -> Path:
    """Return the local folder of a source."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or not _REFERENCE.fullmatch(source):
        raise ArtifactError(
            f"model {str(source)!r}: got neither a folder nor a name; wanted a folder, name@version or s3://…"
        )
    if resolve is None:
        module, function = _RESOLVER
        try:
            resolve = getattr(importlib.import_module(module), function)
        except ImportError as error:
            raise ArtifactError(
                f"model {source!r}: no such folder, and no registry to look the name up ({error})"
            ) from error
    return Path(resolve(source))


def check_device(device: torch.device | str) -> torch.device:
    """Return a device; BackendUnavailableError if torch does not know it or this machine does not have it."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise BackendUnavailableError(f"device: got {str(device)!r}: {str(error).splitlines()[0]}") from error
    if place.type == "meta":
        raise BackendUnavailableError("device: got 'meta', which holds no values; wanted cpu or a GPU")
    return place
