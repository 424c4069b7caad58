"""From a search's file to a search in the queue: its models are found and looked at, and all that can be is checked."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.actions.gpu_check import require_gpu
from orchestrator.actions.registration import resolve_model
from orchestrator.actions.rehearsal import rehearse_sampler
from orchestrator.actions.submission import notify_scheduler
from orchestrator.db.registry import add_model, list_models
from orchestrator.db.rows import ModelRow, SearchRow
from orchestrator.db.searches import (
    add_search_models,
    create_search,
    find_open_search,
    find_search,
    search_models,
    update_search,
    update_search_model,
)
from orchestrator.db.session import lock_enqueue
from orchestrator.errors import NotFoundError, SearchError
from orchestrator.planning.model import ModelInfo
from orchestrator.planning.planner import plan
from orchestrator.prompts.choose import NEUTRAL, told_by, with_prompts
from orchestrator.recipes.load import recipe_from_json, store_files
from orchestrator.search.advance import release_name
from orchestrator.search.bounds import check_budgets
from orchestrator.search.load import LoadedSearch, load_search, search_digest, spec_from_json
from orchestrator.search.warm import shape_digest
from orchestrator.service import Service
from orchestrator.states import ACTIVE_JOBS, JobState
from quant_spec.errors import InvalidInputError
from quant_spec.recipe import Recipe
from quant_spec.search import BASE_VARIANT, SearchBudget, SearchSpec
from workers.errors import ModelError
from workers.storage.model_folder import find_model

_HUB = "hf:"
_WILD = frozenset("*?[")
_PRIORITY_BOUND = 2**30


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A search's file, assignments on top of it, and how to queue it.

    `only` is "sensitivity" if nothing is to be measured. With `skip_bad`, models that cannot be used are left out.
    `here`: this process is to execute it, and a search of the same that has not ended is what is asked for.
    """

    spec: str
    overrides: tuple[str, ...] = ()
    only: str | None = None
    skip_bad: bool = False
    priority: int = 0
    here: bool = False


@dataclass(frozen=True, slots=True)
class PreparedSearch:
    """A search whose models were looked at; `left_out` says of those that cannot be used why."""

    loaded: LoadedSearch
    models: tuple[ModelRow, ...]
    left_out: tuple[str, ...]


def submit_search(service: Service, request: SearchRequest, *, notify: Callable[[str], None]) -> SearchRow:
    """Queue a search; its models are registered first if they are not. Nothing is changed if anything is wrong.

    Raises
    ------
    SearchError, RecipeError, QuantizationError, ModelError
        If the search, its recipe or a model cannot be used, or what is asked for cannot be had.
    """
    if abs(request.priority) > _PRIORITY_BOUND:
        raise InvalidInputError(f"priority: got {request.priority}, wanted -2^30 to 2^30")
    prepared = prepare_search(service, request, notify=notify)
    loaded, models = prepared.loaded, prepared.models
    store_files(loaded.files, service.store)
    _put_prompts(service, models)
    recipes = loaded.recipes_json()
    asked = (loaded.spec, recipes, [model.digest for model in models], loaded.latency, request.only)
    digest = search_digest(*asked)
    with service.database.session() as session:
        lock_enqueue(session)
        same = find_open_search(session, digest) if request.here else None
        if same is not None:
            return same
        for model in models:
            add_model(session, model)
        search = create_search(
            session,
            {
                "name": loaded.spec.name,
                "owner": service.settings.owner,
                "priority": request.priority,
                "only": request.only,
                "spec": loaded.spec.model_dump(mode="json"),
                "recipes": recipes,
                "latency": loaded.latency,
                "digest": digest,
            },
        )
        add_search_models(session, search, [_model_values(model, loaded.spec) for model in models])
        return find_search(session, search)


def prepare_search(
    service: Service, request: SearchRequest, *, notify: Callable[[str], None], dry_run: bool = False
) -> PreparedSearch:
    """Read a search and look at its models, as `submit_search` does; nothing is queued or registered."""
    loaded = load_search(request.spec, request.overrides, allowed=service.settings.allowed_paths)
    for line in loaded.left_out:
        notify(line)
    loaded = replace(loaded, spec=_with_parent(service, loaded.spec))
    recipes = {name: each.recipe for name, each in loaded.recipes.items()}
    if request.here and not dry_run:
        for recipe in recipes.values():
            require_gpu(recipe, service.settings.ray_address, os.environ)
    models, left_out = find_models(
        service, loaded.spec, recipes, loaded.folder, skip_bad=request.skip_bad, notify=notify, dry_run=dry_run
    )
    for model in models:
        for each in loaded.recipes.values():
            with_prompts(each, model)
    _check_parent(service, loaded.spec, models)
    return PreparedSearch(loaded, models, left_out)


def _with_parent(service: Service, spec: SearchSpec) -> SearchSpec:
    """Return a search that names the one that it starts from by its whole id."""
    if not isinstance(spec.warm_start, str):
        return spec
    try:
        with service.database.session(read_only=True) as session:
            return spec.replaced(warm_start=find_search(session, spec.warm_start).id)
    except (InvalidInputError, NotFoundError) as error:
        raise SearchError(f"warm_start: {error}") from error


def _check_parent(service: Service, spec: SearchSpec, models: Sequence[ModelRow]) -> None:
    """Refuse a search to start from that has no model from whose front one of these could start."""
    if not isinstance(spec.warm_start, str):
        return
    with service.database.session(read_only=True) as session:
        parent = find_search(session, spec.warm_start)
        shapes = [(each.shape_digest, each.digest) for each in search_models(session, parent.id)]
    for model in models:
        shape = shape_digest(model)
        if parent.only is not None or not any(own == shape and digest != model.digest for own, digest in shapes):
            what = "sensitivities alone" if parent.only is not None else "no other model of that architecture"
            raise SearchError(
                f"warm_start: got search {parent.id} ({parent.name}) for model {model.name}, which has {what}, wanted "
                "one that searched a model of the same architecture, or true"
            )


def extend_search(
    service: Service,
    prefix: str,
    *,
    models: Sequence[str] = (),
    budgets: Sequence[str] = (),
    skip_bad: bool = False,
    notify: Callable[[str], None],
) -> SearchRow:
    """Add models and budgets to a search, open or ended; only what is new is computed.

    Parameters
    ----------
    models
        As in a search's file, relative to the current folder.
    budgets
        Limits of a budget each, as `bytes=2.8MB,bops=1e9`.
    """
    with service.database.session(read_only=True) as session:
        row = find_search(session, prefix)
        before = search_models(session, row.id)
    if budgets and row.only is not None:
        raise SearchError(
            f"search extend: got a budget for search {row.id}, which is of {row.only} only and measures nothing, "
            "wanted one without --only; search run takes its tables as they are"
        )
    spec = _extended(spec_from_json(row.spec), models, budgets)
    recipes = {name: recipe_from_json(values) for name, values in row.recipes.items()}
    added: tuple[ModelRow, ...] = ()
    if models:
        asked = spec.replaced(models=tuple(models))
        added, _ = find_models(service, asked, recipes, Path.cwd(), skip_bad=skip_bad, notify=notify)
        added = tuple(model for model in added if model.name not in {each.name for each in before})
        _put_prompts(service, added)
    if budgets:
        with service.database.session(read_only=True) as session:
            known = {each.name: each for each in list_models(session)}
        for each in before:
            _check_model(spec, recipes, known[each.name], notify=lambda _: None)
    if not added and len(spec.budgets) == len(spec_from_json(row.spec).budgets):
        raise SearchError("search extend: got nothing new, wanted models or budgets that the search has not")
    with service.database.session() as session:
        lock_enqueue(session)
        now = find_search(session, row.id)
        if now.spec != row.spec:
            raise SearchError(f"search {row.id}: got changed by another meanwhile, wanted it left alone")
        for model in added:
            add_model(session, model)
        add_search_models(session, row.id, [_model_values(model, spec) for model in added])
        if budgets:
            for each in search_models(session, row.id):
                if each.stage == "done":
                    again = {"stage": "sensitivity", "state": JobState.RUNNING.value, "last_round": each.round + 1}
                    update_search_model(session, row.id, each.name, **again)
        digests = [each.digest for each in search_models(session, row.id)]
        update_search(
            session,
            row.id,
            spec=spec.model_dump(mode="json"),
            digest=search_digest(spec, row.recipes, digests, row.latency, row.only),
            state=(now.state if now.state in ACTIVE_JOBS else JobState.RUNNING).value,
            finished_at=None,
            error=None,
        )
        return find_search(session, row.id)


def find_models(
    service: Service,
    spec: SearchSpec,
    recipes: dict[str, Recipe],
    folder: Path,
    *,
    skip_bad: bool,
    notify: Callable[[str], None],
    dry_run: bool = False,
) -> tuple[tuple[ModelRow, ...], tuple[str, ...]]:
    """Return the models that a search's patterns mean, each looked at and checked, and why others are left out.

    Raises
    ------
    SearchError
        If a pattern matches none; or if models cannot be used, all of which are named.
    """
    found: dict[str, ModelRow] = {}
    bad: list[str] = []
    inspections: dict[str, dict[str, Any]] = {}
    tried: set[str] = set()
    for text in _texts(service, spec.models, folder):
        try:
            model = resolve_model(
                service, text, notify=notify, dry_run=dry_run, register=False, inspections=inspections
            )
            _check_model(spec, recipes, model, notify=notify)
            rehearse_sampler(service, model, recipes[BASE_VARIANT], tried)
        except (InvalidInputError, NotFoundError, ModelError) as error:
            bad.append(f"{text}: {' '.join(str(error).split())}")
        else:
            found.setdefault(model.digest, model)
    for line in bad if skip_bad else ():
        notify(f"left out: {line}")
    if bad and (not skip_bad or not found):
        more = "" if len(bad) == 1 and len(found) == 0 else "; --skip-bad goes on with the others" if found else ""
        raise SearchError(f"models: {'; '.join(bad)}{more}")
    names = [model.name for model in found.values()]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise SearchError(
            f"models: got different models of the name {', '.join(twice)}, wanted models add --name first"
        )
    return tuple(found.values()), tuple(bad)


def _texts(service: Service, patterns: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield what each pattern means: registered names, folders, hf:IDs; each once."""
    with service.database.session(read_only=True) as session:
        names = sorted(model.name for model in list_models(session))
    seen: set[str] = set()
    for place, pattern in enumerate(patterns):
        matched = list(_matches(pattern, names, folder))
        if not matched:
            raise SearchError(
                f"models.{place}: got {pattern!r}, which matches no registered model and no folder with one, wanted a "
                "name of models ls, a folder, a glob of either, or hf:owner/name"
            )
        for text in matched:
            if text not in seen:
                seen.add(text)
                yield text


def _matches(pattern: str, names: Sequence[str], folder: Path) -> Iterator[str]:
    """Yield what one pattern means."""
    if pattern.startswith(_HUB):
        yield pattern
    elif not _WILD & set(pattern):
        place = folder / Path(pattern).expanduser()
        # A name comes first, as everywhere; what is neither is named when it is resolved.
        yield pattern if "/" not in pattern and (pattern in names or not place.is_dir()) else str(place)
    else:
        if "/" not in pattern:
            yield from fnmatch.filter(names, pattern)
        for text in sorted(glob.glob(str(folder / Path(pattern).expanduser()))):
            if Path(text).is_dir() and _has_model(Path(text)):
                yield text


def _has_model(folder: Path) -> bool:
    try:
        find_model(folder)
    except ModelError:
        # Broken models are for whoever named them to know of; other folders are not meant.
        return any(folder.glob("*.json")) or any(folder.glob("*/config.json"))
    return True


def _check_model(
    spec: SearchSpec, recipes: dict[str, Recipe], model: ModelRow, *, notify: Callable[[str], None]
) -> None:
    """Refuse a model that a variant of the recipe does not fit, or on which a budget cannot be met."""
    for variant in spec.space.variant_names():
        plan(model, recipes[variant])
    notify_scheduler(model, recipes[BASE_VARIANT], notify)
    check_budgets(spec, recipes[BASE_VARIANT], ModelInfo.read(model.digest, model.inspection))
    release_name(model.name, spec.name)


def _put_prompts(service: Service, models: Sequence[ModelRow]) -> None:
    """Store the shipped prompts, if a model may be told them."""
    if any(told_by(model) == "prompt" for model in models):
        service.store.put_file(NEUTRAL)


def _model_values(model: ModelRow, spec: SearchSpec) -> dict[str, object]:
    """Return the row of a model that a search begins with."""
    return {
        "model_name": model.name,
        "model_digest": model.digest,
        "shape_digest": shape_digest(model),
        "last_round": spec.effort.rounds,
    }


def _extended(spec: SearchSpec, models: Sequence[str], budgets: Sequence[str]) -> SearchSpec:
    """Return a search with more models and budgets."""
    values = spec.model_dump(mode="json")
    for text in budgets:
        limits: dict[str, object] = {}
        for part in text.split(","):
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals or name not in SearchBudget.model_fields:
                wanted = ", ".join(SearchBudget.model_fields)
                raise SearchError(f"--budget: got {text!r}, wanted LIMIT=VALUE[,LIMIT=VALUE] of {wanted}")
            limits[name] = value if name.endswith("bytes") else _number(name, value)
        values["budgets"].append(limits)
    asked = spec_from_json(values).budgets
    values["budgets"] = [each.model_dump(mode="json") for each in dict.fromkeys(asked)]
    values["models"] = [*values["models"], *(each for each in models if each not in values["models"])]
    return spec_from_json(values)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SearchError(f"--budget {name}: got {text!r}, wanted a number") from None
