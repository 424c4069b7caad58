"""Registering models: check a folder, copy it into the store, look at its units, remember it under a name.

A name means the registered bytes, a path the bytes that lie there now. Where a folder of the name lies in the current
folder with other bytes, neither is chosen; where the folder that a model was registered from has changed, that is said.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.actions.local import run_task
from orchestrator.db.registry import add_model, find_model, list_models, name_taken
from orchestrator.db.rows import ModelRow
from orchestrator.errors import NotFoundError
from orchestrator.planning.model import INSPECTED
from orchestrator.service import Service
from orchestrator.text import utc_text
from quant_spec.errors import InvalidInputError
from quant_spec.tasks import inspect
from workers.errors import ModelError
from workers.storage.model_folder import SampleSize, changed_since, import_model, model_digest, resolve_source
from workers.storage.model_folder import find_model as find_model_folder
from workers.storage.names import check_name
from workers.storage.pipeline_index import read_decoders
from workers.storage.store import Store, open_store

_HUB = "hf:"
#: Digits of the digest that are put behind a name which another model has.
_SUFFIX_DIGITS = 8
#: Length of a name that leaves room for them.
_NAME_LENGTH = 128 - _SUFFIX_DIGITS - 1


#: Entries of the inspection of a model with LoRA files fused: what was fused (`file`, `sha256`, `scale`), in order; and
#: the digest of the model before.
LORAS, FUSED_FROM = "loras", "fused_from"
#: Looks at a model before it is registered, and refuses it by raising.
Check = Callable[[ModelRow], object]


def _accept(model: ModelRow) -> None:
    """Accept a model as it is."""


def add_model_from(
    service: Service,
    source: str,
    name: str | None,
    *,
    notify: Callable[[str], None],
    sample_size: SampleSize | None = None,
    check: Check = _accept,
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
    notify
        Called with a line for a person before what takes seconds.
    sample_size
        Of a sample, without channels, in place of what the model's config says.
    check
        Called with the model before it is registered; what it raises leaves none registered.

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
        _check_free(service, name, source, sample_size)
    model = look_at(service, source, service.store, notify=notify, sample_size=sample_size)
    check(model)
    if name is not None:
        model = replace(model, name=name)
    elif (known := _registered(service, model.digest)) is not None:
        model = replace(known, inspection=model.inspection)
    else:
        model = _with_free_name(service, model, notify, "registered")
    with service.database.session() as session:
        return add_model(session, model)


def _check_free(service: Service, name: str, source: str, sample_size: SampleSize | None) -> None:
    """Refuse a name that another model than a source's has, before that is copied and inspected."""
    with service.database.session(read_only=True) as session:
        taken = next((row for row in list_models(session) if row.name == name), None)
    if taken is None or source.startswith(_HUB):
        return
    digest = model_digest(resolve_source(source), sample_size)
    if digest != taken.digest:
        raise name_taken(name, digest, taken.digest)


def register(service: Service, model: ModelRow, *, notify: Callable[[str], None], name: str | None = None) -> ModelRow:
    """Register a model that was made here, under a name or one of its own that is free; again changes nothing."""
    if name is not None:
        model = replace(model, name=check_name(name))
    elif (known := _registered(service, model.digest)) is not None:
        model = replace(known, inspection=model.inspection)
    elif _find(service, model.name) is not None:
        suffix = f"-{model.digest[:_SUFFIX_DIGITS]}"
        model = replace(model, name=model.name[:_NAME_LENGTH] + suffix)
    notify(f"registering {model.name}")
    with service.database.session() as session:
        return add_model(session, model)


def resolve_model(
    service: Service,
    text: str,
    *,
    notify: Callable[[str], None],
    dry_run: bool = False,
    register: bool = True,
    sample_size: SampleSize | None = None,
    check: Check = _accept,
    inspections: MutableMapping[str, dict[str, Any]] | None = None,
) -> ModelRow:
    """Return the model that a name, `name@digest`, a digest's beginning, a folder or hf:ID means.

    Parameters
    ----------
    service
        Knows the registered models, which come first.
    text
        What the user wrote.
    notify
        As for `add_model_from`.
    dry_run
        Do not register a model that is not registered yet, and leave nothing of it in the store.
    register
        False leaves that to the caller: the model's bytes are in the store, its row is only returned.
    sample_size, check
        As for `add_model_from`; `check` is called with a model that is registered already, too.
    inspections
        As for `look_at`; only where the model is not registered here.

    Raises
    ------
    NotFoundError
        If it is none of these.
    InvalidInputError
        If it is a registered model's name, and a folder of that name in the current folder holds another model; or if a
        sample size is given with a registered model, which has one.
    """
    if not text.startswith(_HUB) and "/" not in text:
        known = _find(service, text)
        if known is not None:
            if sample_size is not None:
                raise InvalidInputError(
                    f"--sample-size: got one for {text!r}, which is registered; wanted a folder or hf:owner/name, or "
                    "models add with another --name"
                )
            _check_same(known, text)
            _say_if_changed(known, notify)
            known = _up_to_date(service, known, notify=notify, dry_run=dry_run)
            check(known)
            return known
        if not Path(text).is_dir():
            raise NotFoundError(f"model: got {text!r}, wanted a name of models ls, a folder or hf:owner/name")
    if register and not dry_run:
        return add_model_from(service, text, None, notify=notify, sample_size=sample_size, check=check)
    with tempfile.TemporaryDirectory(prefix="quantmill-dry-run-") as folder:
        store = open_store(folder) if dry_run else service.store
        model = look_at(service, text, store, notify=notify, sample_size=sample_size, inspections=inspections)
    check(model)
    registered = _registered(service, model.digest)
    if registered is not None:
        return replace(registered, inspection=model.inspection)
    return _with_free_name(service, model, notify, "would be registered" if dry_run else "registered")


def _up_to_date(service: Service, model: ModelRow, *, notify: Callable[[str], None], dry_run: bool) -> ModelRow:
    """Return a registered model, inspected again if that was done by an older release that looked for less."""
    if model.inspection.keys() >= INSPECTED:
        return model
    _check_decoder(model)
    notify(f"inspecting {model.name} again: an older release registered it, and looked for less")
    kept = {name: value for name, value in model.inspection.items() if name in (LORAS, FUSED_FROM)}
    model = replace(model, inspection=_inspect(service, model.digest, service.store) | kept)
    if dry_run:
        return model
    with service.database.session() as session:
        return add_model(session, model)


def _inspect(service: Service, digest: str, store: Store) -> dict[str, Any]:
    """Look at a model in a store; return its inspection."""
    inputs = inspect.Inputs(model=digest)
    task = run_task(service.settings, inspect.KIND, inspect.Params(), inputs, store_url=store.url)
    inspection: dict[str, Any] = task.metrics["inspection"]
    return inspection


def _check_decoder(model: ModelRow) -> None:
    """Refuse a model that an older release registered without its pipeline's decoder, so that latents look like pixels.

    Its bytes say nothing of a pipeline; the folder that it came from still may.
    """
    try:
        folder = find_model_folder(Path(model.source))
        decoders = read_decoders(folder.denoiser, folder.config)
    except ModelError:
        return
    if decoders:
        raise InvalidInputError(
            f"model {model.name}: got a registration by an older release, which took its latents for pixels, wanted it "
            f"added again: quantmill models add {model.source} --name ANOTHER"
        )


def look_at(
    service: Service,
    source: str,
    store: Store,
    *,
    notify: Callable[[str], None],
    sample_size: SampleSize | None = None,
    inspections: MutableMapping[str, dict[str, Any]] | None = None,
) -> ModelRow:
    """Check a model, copy it into a store and inspect it, without registering it.

    A model whose digest is registered is not inspected again, unless its inspection lacks what is looked for now.
    `inspections`, by `ModelRecord.form`, are those of models that were looked at just now, to which this one's is
    added: of many fine-tunes only one is inspected, as an inspection tells nothing of weights' values.
    """
    place = source if source.startswith(_HUB) else str(Path(source).expanduser().absolute())
    if not source or place != place.encode(errors="replace").decode():
        wanted = "a path in UTF-8" if source else "a diffusers model folder or hf:owner/name"
        raise InvalidInputError(f"model: got {place if source else source!r}, wanted {wanted}")
    if source.startswith(_HUB):
        notify(f"fetching {source}")
    record = import_model(store, resolve_source(source), sample_size, allowed=service.settings.allowed_paths)
    if record.left_out:
        notify(f"note: {source} is taken as a denoiser alone: {record.left_out}")
    known = _registered(service, record.digest)
    if known is not None and known.inspection.keys() >= INSPECTED:
        inspection = known.inspection
    elif inspections is not None and record.form in inspections:
        inspection = inspections[record.form]
    else:
        notify(f"inspecting {source}")
        inspection = _inspect(service, record.digest, store)
        if inspections is not None:
            inspections[record.form] = inspection
    return ModelRow(
        name=default_model_name(source),
        digest=record.digest,
        class_name=record.class_name,
        source=place,
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


def _check_same(known: ModelRow, text: str) -> None:
    """Refuse a registered model's name that is also the name of a folder here with another model in it."""
    path = Path(text)
    if not path.is_dir():
        return
    try:
        digest = model_digest(path)
    except ModelError as error:
        # A folder of another purpose, with no model in it, is not what is meant.
        if not _has_model(path):
            return
        folder = f"which cannot be read: {error}"
    else:
        if digest == known.inspection.get(FUSED_FROM, known.digest):
            return
        folder = f"digest {digest[:_SUFFIX_DIGITS]}"
    named = f"{known.name}@{known.digest[:_SUFFIX_DIGITS]}"
    raise InvalidInputError(
        f"model: got {text!r}, which names a registered model (digest {known.digest[:_SUFFIX_DIGITS]}) and a folder "
        f"here with other bytes ({folder}); wanted ./{text} for the folder or {named} for the registered model"
    )


def _has_model(path: Path) -> bool:
    try:
        find_model_folder(path)
    except ModelError:
        return False
    return True


def _say_if_changed(known: ModelRow, notify: Callable[[str], None]) -> None:
    """Say that the folder which a model was registered from has changed since: its name means what was registered."""
    source = Path(known.source)
    if known.source.startswith(_HUB) or not source.is_dir():
        return
    try:
        # Without this look at the files' times, every use of a name would read gigabytes.
        if known.created_at is not None and not changed_since(source, known.created_at):
            return
        same = model_digest(source) == known.inspection.get(FUSED_FROM, known.digest)
    except (ModelError, OSError):
        # No model is there any more, or none that can be read: nothing to be mixed up with.
        return
    if not same:
        notify(
            f"{known.name}: the folder {source} has changed since {utc_text(known.created_at)}, when it was "
            "registered; this is the model as it was, the folder's path would be the one that is there now"
        )


def _find(service: Service, name: str) -> ModelRow | None:
    with service.database.session(read_only=True) as session:
        try:
            return find_model(session, name)
        except NotFoundError:
            return None


def _registered(service: Service, digest: str) -> ModelRow | None:
    return _find(service, digest)


def _with_free_name(service: Service, model: ModelRow, notify: Callable[[str], None], what: str) -> ModelRow:
    """Return the model under its name, or that and some of its digest if another model has the name.

    If another model came from the same place, or has the name, that is said.
    """
    with service.database.session(read_only=True) as session:
        rows = list_models(session)
    taken = next((row for row in rows if row.name == model.name), None)
    name = model.name if taken is None else f"{model.name}-{model.digest[:_SUFFIX_DIGITS]}"
    before = [row for row in rows if _same_place(row.source, model.source)]
    if before:
        last = max(before, key=lambda row: row.created_at or 0.0)
        since = f"since {utc_text(last.created_at)}, when it was registered as {last.name}"
        notify(f"{model.name}: the weights or configs in {model.source} have changed {since}; {what} as {name}")
    elif taken is not None:
        notify(f"{model.name}: this name is that of another model, from {taken.source}; {what} as {name}")
    return replace(model, name=name)


def _same_place(one: str, other: str) -> bool:
    """Say whether two sources are the same repository and revision, or the same folder by whatever path."""
    if one.startswith(_HUB) or other.startswith(_HUB):
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)
