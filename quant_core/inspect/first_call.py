"""The forward that a model is looked at with: what it is called with, and what is wrong if it cannot be called so.

Quantmill has never seen most models that it is given. What their forward raises says where inside it something did not
fit; here it is said in terms of what the user gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quant_core.diffusion.conditioning import (
    NULL,
    Conditioning,
    Field,
    conditioning_fields,
    draw_conditioning,
    dummy_conditioning,
    label_count,
    missing_conditioning,
    null_conditioning,
    null_keys,
)
from quant_core.diffusion.denoiser import Denoiser, config_value, forward_signature, nest, sample_shape
from quant_core.errors import ConditioningError, DenoiserError
from quant_spec.errors import QuantServiceError

_NO_MEMORY = ("allocate memory", "out of memory")


class Call(NamedTuple):
    """What a denoiser is looked at with: a sample, shape (1, ...), a timestep, shape (), and a row of conditioning."""

    x: Tensor
    timestep: Tensor
    conditioning: Conditioning

    @classmethod
    def of(cls, denoiser: Denoiser) -> Self:
        """Return that of a bare denoiser; see `first_call`."""
        x, conditioning = first_call(denoiser)
        return cls(x, torch.tensor(0), conditioning)


def first_call(denoiser: Denoiser) -> tuple[Tensor, Conditioning]:
    """Return a sample, shape (1, ...), and one row of conditioning: the first seed's, or zeros where there is no file.

    Raises
    ------
    DenoiserError
        If the size of a sample is not known.
    ConditioningError
        If the conditioning file lacks what the model needs, or does not fit it; or there is none, and the model needs
        what cannot be made up.
    """
    model, file = denoiser.model, denoiser.conditioning
    if file is None:
        conditioning = dummy_conditioning(model)
    else:
        conditioning = draw_conditioning(model, [0], file)
        _check_file(denoiser, conditioning)
    if missing := sorted(forward_signature(model).required - set(nest(conditioning))):
        raise ConditioningError(
            f"{type(model).__name__}: got no {', '.join(missing)}, wanted conditioning.safetensors beside the model, "
            "one row per prompt"
        )
    tokens = len(conditioning["img_ids"]) if "img_ids" in conditioning else None
    return torch.zeros(1, *sample_shape(model, tokens)), conditioning


def _check_file(denoiser: Denoiser, conditioning: Conditioning) -> None:
    """Refuse labels that the model has no embedding for, and rows without a prompt that don't match those with one."""
    model, file, classes = denoiser.model, denoiser.conditioning, label_count(denoiser.model)
    assert file is not None
    with safe_open(file, framework="pt") as handle:
        keys = set(handle.keys())
        for key in sorted(keys & {"class_labels", f"{NULL}class_labels"}):
            labels = handle.get_tensor(key)
            is_label = labels.dim() == 1 and not labels.is_floating_point()
            if classes is not None and not (is_label and 0 <= int(labels.min()) <= int(labels.max()) < classes):
                got = f"{labels.min():g} to {labels.max():g}, {labels.dtype} of shape {tuple(labels.shape)}"
                raise ConditioningError(f"{file}: {key}: got {got}, wanted a list of integers from 0 to {classes - 1}")
    if any(key.startswith(NULL) for key in keys):
        null_conditioning(model, conditioning, file, None)


@contextmanager
def explained(denoiser: Denoiser, x: Tensor, conditioning: Conditioning) -> Iterator[None]:
    """Turn whatever a forward raises into an error that says what the model was called with and what it wants.

    Raises
    ------
    DenoiserError
        With the first line of what was raised. Errors of ours and a lack of memory are left as they are.
    """
    try:
        yield
    except (QuantServiceError, MemoryError):
        raise
    except Exception as error:  # a stranger's forward may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        if any(words in reason for words in _NO_MEMORY):
            raise
        model = denoiser.model
        given = {forward_signature(model).sample: x, **conditioning}
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise DenoiserError(
            f"{type(model).__name__} cannot be called with {shapes}: got {type(error).__name__} ({reason}), wanted "
            f"{'; '.join(_wanted(denoiser, conditioning))}"
        ) from error


def _wanted(denoiser: Denoiser, conditioning: Conditioning) -> list[str]:
    """Return what to change, the likeliest first."""
    model = denoiser.model
    fields = conditioning_fields(model)
    wanted = [
        f"{key} with rows of {' x '.join(map(str, field.shape[-1:]))}"
        for key, field in fields.items()
        if key in conditioning and not _fits(field, conditioning[key])
    ]
    if config_value(model, "sample_size") is None:
        wanted.append("the size of a sample (--sample-size N or HxW)")
    if denoiser.conditioning is None and missing_conditioning(model, None):
        wanted.append("conditioning.safetensors beside the model, one row per prompt")
    return wanted or ["a sample of config.in_channels and sample_size, and conditioning that the forward takes"]


def _fits(field: Field, rows: Tensor) -> bool:
    """Whether the rows' last dimension is the field's; the number of tokens is free."""
    return tuple(rows.shape[1:][-1:]) == tuple(field.shape[-1:])


def check_prediction_shape(model: nn.Module, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a denoiser whose prediction is not of the sample's shape, learned variance apart.

    Raises
    ------
    DenoiserError
        Its input is then a sample and something else (a mask, an image), which has to come from somewhere.
    """
    if tuple(shape) == tuple(x.shape):
        return
    raise DenoiserError(
        f"{type(model).__name__}: got predictions of shape {tuple(shape[1:])} for inputs of {tuple(x.shape[1:])}, "
        "wanted the same shape, or a whole pipeline: a model whose input is a concatenation (inpainting, image "
        "conditioning) is quantized by its pipeline's own call"
    )


def describe_needs(denoiser: Denoiser) -> dict[str, Any]:
    """Return what of a model's conditioning is missing, and how guidance tells the model that there is no condition.

    `missing_conditioning`: keys that are neither drawn from seeds nor in its file. `null_conditioning`: keys for which
    there is a null row or an extra class. `label_count`: values of a class label, "no class" included, or None.
    """
    model, file = denoiser.model, denoiser.conditioning
    return {
        "missing_conditioning": missing_conditioning(model, file),
        "null_conditioning": null_keys(model, file),
        "label_count": label_count(model),
    }
