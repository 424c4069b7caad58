"""Registering models: check a folder, copy it into the store, look at its units, remember it under a name."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.actions.local import run_task
from orchestrator.db.registry import add_model, find_model
from orchestrator.db.rows import ModelRow
from orchestrator.errors import NotFoundError
from orchestrator.service import Service
from quant_spec.errors import InvalidInputError
from workers.storage.model_folder import SampleSize, import_model, resolve_source
from workers.storage.names import check_name
from workers.storage.store import Store, open_store

_HUB = "hf:"
#: What an inspection must have; one of an earlier version may lack some of it.
_INSPECTED = {"units", "layers", "attentions", "temporal", "has_tokens", "missing_conditioning"}
#: Digits of the digest that are put behind a name which another model has.
_SUFFIX_DIGITS = 8
#: Length of a name that leaves room for them.
_NAME_LENGTH = 128 - _SUFFIX_DIGITS - 1


def add_model_from(
    service: Service,
    source: str,
    name: str | None,
    *,
    tell: Callable[[str], None],
    sample_size: SampleSize | None = None,
) -> ModelRow:
    """Register a model from a folder or the Hub; doing it again returns what is registered.

    Parameters
    ----------
    service
        Where to.
    source
        A diffusers folder (a pipeline's or a denoiser's), or `hf:owner/name@revision`.
    name
        To register it under. By default it is made from the source, and a model that is registered under any name
        stays as it is.
    tell
        Called with a line for a person before what takes seconds.
    sample_size
        Of a sample, without channels, in place of what the model's config says.

    Returns
    -------
    ModelRow
        The registered model.

    Raises
    ------
    ModelError
        If the folder is not a model that can be used; nothing was changed.
    InvalidInputError
        If the name is not one, or names another model.
    """
    if name is not None:
        check_name(name)
    model = look_at(service, source, service.store, tell=tell, sample_size=sample_size)
    if name is not None:
        model = replace(model, name=name)
    elif (known := _registered(service, model.digest)) is not None:
        model = replace(known, inspection=model.inspection)
    else:
        model = _with_free_name(service, model)
    with service.database.session() as session:
        return add_model(session, model)


def resolve_model(
    service: Service,
    text: str,
    *,
    tell: Callable[[str], None],
    dry_run: bool = False,
    sample_size: SampleSize | None = None,
) -> ModelRow:
    """Return the model that a name, a digest's beginning, a folder or hf:ID means.

    Parameters
    ----------
    service
        Knows the registered models, which come first.
    text
        What the user wrote.
    tell
        As for `add_model_from`.
    dry_run
        Do not register a model that is not registered yet, and leave nothing of it in the store.
    sample_size
        As for `add_model_from`.

    Raises
    ------
    NotFoundError
        If it is none of these.
    InvalidInputError
        If a sample size is given with a registered model, which has one.
    """
    if not text.startswith(_HUB) and "/" not in text:
        found = _find_named(service, text)
        if found is not None and sample_size is not None:
            raise InvalidInputError(
                f"--sample-size: got one for {text!r}, which is registered; wanted a folder or hf:owner/name, or "
                "models add with another --name"
            )
        if found is not None:
            return _inspected_anew(service, found, tell=tell, dry_run=dry_run)
    if not dry_run:
        return add_model_from(service, text, None, tell=tell, sample_size=sample_size)
    with tempfile.TemporaryDirectory(prefix="quantmill-dry-run-") as folder:
        model = look_at(service, text, open_store(folder), tell=tell, sample_size=sample_size)
    return _registered(service, model.digest) or model


def _find_named(service: Service, text: str) -> ModelRow | None:
    """Return the registered model of that name or digest, or None if the text is a folder's."""
    with service.database.session(read_only=True) as session:
        try:
            return find_model(session, text)
        except NotFoundError:
            if Path(text).is_dir():
                return None
            raise NotFoundError(f"model: got {text!r}, wanted a name of models ls, a folder or hf:owner/name") from None


def _inspected_anew(service: Service, model: ModelRow, *, tell: Callable[[str], None], dry_run: bool) -> ModelRow:
    """Return a registered model with an inspection of today, if an earlier Quantmill looked at less."""
    if set(model.inspection) >= _INSPECTED:
        return model
    model = replace(model, inspection=_inspect(service, model.name, model.digest, service.store, tell=tell))
    if dry_run:
        return model
    with service.database.session() as session:
        return add_model(session, model)


def _inspect(
    service: Service, source: str, digest: str, store: Store, *, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Look at a model in a store; return its inspection."""
    tell(f"inspecting {source}")
    inspection: dict[str, Any] = run_task(
        service.settings, "inspect", {}, {"model": [digest]}, store_url=store.url
    ).metrics["inspection"]
    return inspection


def look_at(
    service: Service,
    source: str,
    store: Store,
    *,
    tell: Callable[[str], None],
    sample_size: SampleSize | None = None,
) -> ModelRow:
    """Check a model, copy it into a store and inspect it, without registering it.

    A model whose digest is registered is not inspected again, unless its inspection lacks what is looked for now.
    """
    if source.startswith(_HUB):
        tell(f"fetching {source}")
    record = import_model(store, resolve_source(source), sample_size)
    known = _registered(service, record.digest)
    if known is not None and set(known.inspection) >= _INSPECTED:
        inspection = known.inspection
    else:
        inspection = _inspect(service, source, record.digest, store, tell=tell)
    return ModelRow(
        name=default_model_name(source),
        digest=record.digest,
        class_name=record.class_name,
        source=source if source.startswith(_HUB) else str(Path(source).expanduser().absolute()),
        bytes=record.bytes,
        parameters=record.parameters,
        inspection=inspection,
    )


def default_model_name(source: str) -> str:
    """Return a name made from a folder's or repository's: what is not allowed in a name becomes a hyphen."""
    if source.startswith(_HUB):
        text = source.removeprefix(_HUB).partition("@")[0].rpartition("/")[2]
    else:
        text = Path(source).expanduser().absolute().name
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:_NAME_LENGTH] or "model"


def _registered(service: Service, digest: str) -> ModelRow | None:
    with service.database.session(read_only=True) as session:
        try:
            return find_model(session, digest)
        except NotFoundError:
            return None


def _with_free_name(service: Service, model: ModelRow) -> ModelRow:
    """Return the model under its name, or that and some of its digest if another model has the name."""
    with service.database.session(read_only=True) as session:
        try:
            find_model(session, model.name)
        except NotFoundError:
            return model
    return replace(model, name=f"{model.name}-{model.digest[:_SUFFIX_DIGITS]}")
