"""Registering models: check a folder, copy it into the store, look at its units, remember it under a name."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from orchestrator.actions.local import run_task
from orchestrator.db.registry import add_model, find_model
from orchestrator.db.rows import ModelRow
from orchestrator.errors import NotFoundError
from orchestrator.planning.model import INSPECTED
from orchestrator.service import Service
from quant_spec.errors import InvalidInputError
from workers.errors import ModelError
from workers.storage.model_folder import find_model as find_folder
from workers.storage.model_folder import import_model, resolve_source
from workers.storage.names import check_name
from workers.storage.pipeline_index import read_decoders
from workers.storage.store import Store, open_store

_HUB = "hf:"
#: Digits of the digest that are put behind a name which another model has.
_SUFFIX_DIGITS = 8
#: Length of a name that leaves room for them.
_NAME_LENGTH = 128 - _SUFFIX_DIGITS - 1


def add_model_from(service: Service, source: str, name: str | None, *, tell: Callable[[str], None]) -> ModelRow:
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
    model = look_at(service, source, service.store, tell=tell)
    if name is not None:
        model = replace(model, name=name)
    elif (known := _registered(service, model.digest)) is not None:
        model = replace(known, inspection=model.inspection)
    else:
        model = _with_free_name(service, model)
    with service.database.session() as session:
        return add_model(session, model)


def resolve_model(service: Service, text: str, *, tell: Callable[[str], None], dry_run: bool = False) -> ModelRow:
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

    Raises
    ------
    NotFoundError
        If it is none of these.
    """
    if not text.startswith(_HUB) and "/" not in text:
        with service.database.session(read_only=True) as session:
            try:
                found = find_model(session, text)
            except NotFoundError:
                found = None
                if not Path(text).is_dir():
                    raise NotFoundError(
                        f"model: got {text!r}, wanted a name of models ls, a folder or hf:owner/name"
                    ) from None
        if found is not None:
            return _up_to_date(service, found, tell)
    if not dry_run:
        return add_model_from(service, text, None, tell=tell)
    with tempfile.TemporaryDirectory(prefix="quantmill-dry-run-") as folder:
        model = look_at(service, text, open_store(folder), tell=tell)
    known = _registered(service, model.digest)
    return model if known is None else replace(known, inspection=model.inspection)


def _up_to_date(service: Service, model: ModelRow, tell: Callable[[str], None]) -> ModelRow:
    """Return a registered model, inspected again if that was done by an older release that looked for less."""
    if model.inspection.keys() >= INSPECTED:
        return model
    _check_decoder(model)
    tell(f"inspecting {model.name} again: an older release registered it, and looked for less")
    task = run_task(service.settings, "inspect", {}, {"model": [model.digest]})
    with service.database.session() as session:
        return add_model(session, replace(model, inspection=task.metrics["inspection"]))


def _check_decoder(model: ModelRow) -> None:
    """Refuse a model that an older release registered without its pipeline's decoder, so that latents look like pixels.

    Its bytes say nothing of a pipeline; the folder that it came from still may.
    """
    try:
        folder = find_folder(Path(model.source))
        decoders = read_decoders(folder.denoiser, folder.config)
    except ModelError:
        return
    if decoders:
        raise InvalidInputError(
            f"model {model.name}: got a registration by an older release, which took its latents for pixels, wanted it "
            f"added again: quantmill models add {model.source} --name ANOTHER"
        )


def look_at(service: Service, source: str, store: Store, *, tell: Callable[[str], None]) -> ModelRow:
    """Check a model, copy it into a store and inspect it, without registering it.

    A model whose digest is registered is not inspected again, unless its inspection lacks what is looked for now.
    """
    if source.startswith(_HUB):
        tell(f"fetching {source}")
    record = import_model(store, resolve_source(source))
    known = _registered(service, record.digest)
    if known is not None and known.inspection.keys() >= INSPECTED:
        inspection = known.inspection
    else:
        tell(f"inspecting {source}")
        task = run_task(service.settings, "inspect", {}, {"model": [record.digest]}, store_url=store.url)
        inspection = task.metrics["inspection"]
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
