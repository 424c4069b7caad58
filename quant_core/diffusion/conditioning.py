"""Conditioning: what a denoiser is called with besides the sample and the timestep, drawn per seed.

A *conditioning* is a flat mapping from forward keyword (dotted for entries of a dictionary argument) to a tensor whose
rows are samples. Class labels are drawn from the seed. Everything else comes from a `conditioning.safetensors` beside
the model: the same keys, one row per prompt, and optionally rows without a prompt under `null.<key>`, for
classifier-free guidance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quant_core.diffusion.denoiser import PACKED_TOKENS, PLAIN, SHARED, config_value, forward_signature
from quant_core.errors import ConditioningError
from quant_core.nn.model_dtype import model_dtype

Conditioning = Mapping[str, Tensor]

NULL = "null."
UNBATCHED = frozenset({"img_ids", "txt_ids"})  # positions, which diffusers wants once and not per sample
TEXT_TOKENS = 77  # stands in for the prompts' length where only the shape of a forward matters


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of a denoiser's conditioning: shape of a row; `classes` if it is a label in [0, classes)."""

    shape: tuple[int, ...]
    classes: int | None = None


def is_shared(key: str) -> bool:
    """Whether an entry of a conditioning has no row for each sample, but is the same for all."""
    return key in UNBATCHED or key.startswith((SHARED, PLAIN))


def conditioning_fields(model: nn.Module) -> dict[str, Field]:
    """Return what a denoiser cannot be called without, read from its config and its forward's signature."""
    signature = forward_signature(model)
    takes = signature.keywords
    fields: dict[str, Field] = {}
    if "class_labels" in takes:
        fields |= _label_field(model)
    width = config_value(model, "encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
    if "encoder_hidden_states" in takes and width is not None:
        fields["encoder_hidden_states"] = Field((TEXT_TOKENS, width if isinstance(width, int) else width[0]))
    if "pooled_projections" in takes and (width := config_value(model, "pooled_projection_dim")):
        fields["pooled_projections"] = Field((width,))
    if "guidance" in takes and config_value(model, "guidance_embeds"):
        fields["guidance"] = Field(())
    if axes := config_value(model, "axes_dims_rope"):
        fields |= {
            k: Field((n, len(axes))) for k, n in (("img_ids", PACKED_TOKENS), ("txt_ids", TEXT_TOKENS)) if k in takes
        }
    if "added_cond_kwargs" in takes:
        fields |= {f"added_cond_kwargs.{key}": field for key, field in _added_fields(model).items()}
    return fields


def _label_field(model: nn.Module) -> dict[str, Field]:
    """Return the field `class_labels` if the model embeds classes, a noise level ("timestep") or vectors."""
    kind = config_value(model, "class_embed_type")
    if kind in ("projection", "simple_projection"):
        return {"class_labels": Field((config_value(model, "projection_class_embeddings_input_dim"),))}
    if kind == "timestep":
        return {"class_labels": Field(())}
    if kind == "identity":
        channels = config_value(model, "block_out_channels")
        return {"class_labels": Field((config_value(model, "time_embedding_dim") or 4 * channels[0],))}
    classes = config_value(model, "num_class_embeds", "num_embeds_ada_norm")
    return {} if classes is None else {"class_labels": Field((), classes)}


def _added_fields(model: nn.Module) -> dict[str, Field]:
    """Return the entries of `added_cond_kwargs` (SDXL's text and time ids, micro-conditions of a size)."""
    if config_value(model, "addition_embed_type") == "text_time":
        ids, width = 6, config_value(model, "addition_time_embed_dim")
        text = config_value(model, "projection_class_embeddings_input_dim") - ids * width
        return {"text_embeds": Field((text,)), "time_ids": Field((ids,))}
    if getattr(model, "use_additional_conditions", False):
        return {"resolution": Field((2,)), "aspect_ratio": Field((1,))}
    return {}


def dummy_conditioning(model: nn.Module) -> dict[str, Tensor]:
    """Return one row of zeros of the right shapes, to look at a forward and not at its values."""
    return {
        key: torch.zeros(
            field.shape if is_shared(key) else (1, *field.shape),
            dtype=torch.int64 if field.classes else torch.float32,
        )
        for key, field in conditioning_fields(model).items()
    }


def seed_stream(seed: int, purpose: str) -> torch.Generator:
    """Return a generator that depends on the seed and on what it is for, independent of the noise's own generator."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(seed: int, purpose: str, high: int) -> int:
    """Return the seed's own number in [0, high)."""
    return int(torch.randint(high, (), generator=seed_stream(seed, purpose)))


def draw_conditioning(model: nn.Module, seeds: Sequence[int], file: Path | None) -> dict[str, Tensor]:
    """Draw the conditioning of each seed.

    Parameters
    ----------
    seeds : sequence of int
        One per sample; the same seed always gets the same label and the same row of the file.
    file : Path | None
        Safetensors with one row per prompt, keys as in a conditioning. Floats of any width: text encoders of
        half-precision pipelines give float16 or bfloat16.

    Returns
    -------
    dict of str to Tensor, leading dimension len(seeds) (but for what `is_shared`)
        Floats are in the model's dtype.

    Raises
    ------
    ConditioningError
        If the model needs what can neither be drawn nor is in the file, or the file's tensors differ in their number
        of rows.
    """
    fields = conditioning_fields(model)
    stored = {} if file is None else _in_model_dtype(model, _read_rows(file, seeds))
    drawn = {
        key: torch.tensor([draw(seed, "class", field.classes) for seed in seeds])
        for key, field in fields.items()
        if field.classes is not None and key not in stored
    }
    if missing := sorted(set(fields) - set(stored) - set(drawn)):
        wanted = "conditioning.safetensors beside the model, one row per prompt"
        raise ConditioningError(
            f"conditioning of {type(model).__name__}: got no {', '.join(missing)}, wanted them in {wanted}"
        )
    return stored | drawn


def null_conditioning(
    model: nn.Module, conditioning: Conditioning, file: Path | None, null_class: int | None
) -> dict[str, Tensor]:
    """Return the unconditional counterpart of a conditioning, for classifier-free guidance.

    Rows `null.<key>` of the file replace those of `<key>`; class labels become `null_class`, or the extra row that the
    model's label embedding has beyond its classes; entries without either are kept (time ids, sizes).

    Raises
    ------
    ConditioningError
        If the unconditional call would be the same as the conditional one.
    """
    nulls: dict[str, Tensor] = {}
    if file is not None:
        with safe_open(file, framework="pt") as handle:
            for key in sorted(handle.keys()):
                if key.startswith(NULL):
                    row = handle.get_tensor(key)[:1]
                    nulls[key.removeprefix(NULL)] = row.expand(_rows(conditioning), *row.shape[1:]).clone()
    label = conditioning_fields(model).get("class_labels")
    if label is not None and label.classes is not None and "class_labels" not in nulls:
        null = null_class if null_class is not None else _extra_class(model, label.classes)
        if null is not None:
            nulls["class_labels"] = torch.full_like(conditioning["class_labels"], null)
    if not nulls:
        where = file or "a conditioning file"
        raise ConditioningError(
            f"guidance of {type(model).__name__}: got neither a null class nor null.* rows in {where}, "
            "wanted one of them for a guidance scale other than 1"
        )
    nulls = _in_model_dtype(model, nulls)
    for key, rows in nulls.items():
        if key not in conditioning or rows.shape != conditioning[key].shape:
            got = "no rows of that" if key not in conditioning else f"rows {tuple(conditioning[key].shape[1:])} of that"
            raise ConditioningError(
                f"guidance of {type(model).__name__}: got null.{key} of shape {tuple(rows.shape[1:])} and {got}, "
                "wanted the same shape"
            )
    return dict(conditioning) | nulls


def _in_model_dtype(model: nn.Module, conditioning: Conditioning) -> dict[str, Tensor]:
    """Cast floats to the dtype of the model's parameters; integers stay."""
    dtype = model_dtype(model)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in conditioning.items()}


def missing_conditioning(model: nn.Module, file: Path | None) -> list[str]:
    """Return what a denoiser must be told that is neither drawn from seeds nor in its file, by forward keyword."""
    fields = conditioning_fields(model)
    needed = {key for key, field in fields.items() if field.classes is None} | _other_keywords(model, fields)
    return sorted(needed - set(_stored_keys(file)))


def _other_keywords(model: nn.Module, fields: Mapping[str, Field]) -> set[str]:
    """Return the keywords that a forward has no default for and `conditioning_fields` knows nothing of."""
    return set(forward_signature(model).required) - {key.partition(".")[0] for key in fields}


def null_keys(model: nn.Module, file: Path | None) -> list[str]:
    """Return what guidance's unconditional call is told otherwise without a null class being named; maybe nothing."""
    found = {key.removeprefix(NULL) for key in _stored_keys(file) if key.startswith(NULL)}
    label = conditioning_fields(model).get("class_labels")
    if label is not None and label.classes is not None and _extra_class(model, label.classes) is not None:
        found.add("class_labels")
    return sorted(found)


def _stored_keys(file: Path | None) -> list[str]:
    """Return the names of a conditioning file's tensors."""
    if file is None:
        return []
    with safe_open(file, framework="pt") as handle:
        return sorted(handle.keys())


def label_count(model: nn.Module) -> int | None:
    """Return how many values a denoiser's class label can have, "no class" included; None if it takes none."""
    field = conditioning_fields(model).get("class_labels")
    if field is None or field.classes is None:
        return None
    return field.classes + (0 if _extra_class(model, field.classes) is None else 1)


def class_count(model: nn.Module) -> int:
    """Return how many classes a denoiser's label can name, "no class" not included; 0 if it takes no label."""
    field = conditioning_fields(model).get("class_labels")
    return 0 if field is None or field.classes is None else field.classes


def _extra_class(model: nn.Module, classes: int) -> int | None:
    """Return the index of the label embedding's row beyond the classes, if there is one."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == classes + 1]
    return classes if tables else None


def _read_rows(file: Path, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Read the seeds' rows of a conditioning file."""
    with safe_open(file, framework="pt") as handle:
        keys = [key for key in sorted(handle.keys()) if not key.startswith(NULL)]
        counts = {key: handle.get_slice(key).get_shape()[0] for key in keys if not is_shared(key)}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            raise ConditioningError(f"{file}: got rows {counts}, wanted the same number (at least 1) for every key")
        total = next(iter(counts.values()))
        rows = [draw(seed, "row", total) for seed in seeds]
        return {
            key: handle.get_tensor(key) if is_shared(key) else torch.stack([handle.get_slice(key)[row] for row in rows])
            for key in keys
        }


def _rows(conditioning: Conditioning) -> int:
    """Return the number of samples."""
    return next(len(value) for key, value in conditioning.items() if not is_shared(key))


def take(conditioning: Conditioning, index: Tensor | slice) -> dict[str, Tensor]:
    """Return some rows of a conditioning."""
    return {key: value if is_shared(key) else value[index] for key, value in conditioning.items()}


def concatenate(parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Join conditionings of several batches."""
    return {
        key: value if is_shared(key) else torch.cat([part[key] for part in parts]) for key, value in parts[0].items()
    }


def interleave(first: Conditioning, second: Conditioning) -> dict[str, Tensor]:
    """Return rows first[0], second[0], first[1], second[1], …"""
    return {
        key: value if is_shared(key) else torch.stack([value, second[key]], dim=1).flatten(0, 1)
        for key, value in first.items()
    }


def to_device(conditioning: Conditioning, device: torch.device | str) -> dict[str, Tensor]:
    """Move a conditioning; numbers stay where Python reads them."""
    return {key: value if key.startswith(PLAIN) else value.to(device) for key, value in conditioning.items()}
