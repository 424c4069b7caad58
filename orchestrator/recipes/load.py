"""From a reference to a recipe: read its layers, check the whole, give it a digest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import RecipeError
from orchestrator.recipes.bundles import CONFIG, bundled, bundled_folder
from orchestrator.recipes.components import Read, check_beside, lay_components
from orchestrator.recipes.files import Layer, assign, merge, read_layers, recipe_path, shipped_names
from orchestrator.recipes.idle import refuse_idle
from quant_spec.keys import canonical_json
from quant_spec.messages import first_problem
from quant_spec.recipe import HOW_IT_RUNS, Recipe
from workers.storage.plain_files import file_within
from workers.storage.store import Store

#: Fields that no result depends on, so that a recipe's digest leaves them out.
_UNDIGESTED = ("name", "description")
#: Fields that name a file, as paths through the recipe.
_FILE_FIELDS = (("evaluation", "extractor_weights"), ("evaluation", "lpips"), ("prompts",))
#: Fields that name a folder.
_FOLDER_FIELDS = (("evaluation", "clip"),)
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, and the files that it refers to, by digest; they must be in the store when it runs.

    A prompts file that names others is its bundle's bytes.
    """

    recipe: Recipe
    files: Mapping[str, Path | bytes]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The one text of a recipe: canonical JSON with every field, and the SHA-256 of it without name and description."""

    json: str
    digest: str


def load_recipe(
    reference: str | Path,
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
    allowed: Sequence[Path] = (),
) -> LoadedRecipe:
    """Load a recipe.

    Parameters
    ----------
    reference
        Name of a shipped recipe, or a file.
    overrides
        Assignments `a.b=v` that go on top, in order; v is YAML.
    folder
        Where relative file names start; the current folder by default.
    allowed
        Folders that recipe files may name files in, besides the one that the recipe lies in. What an override names may
        lie anywhere: it is the user's own word.

    Returns
    -------
    LoadedRecipe
        Its name is that of the file unless the file (not what it extends) states one.

    Raises
    ------
    RecipeError
        If it does not exist, cannot be read, or is not valid: one line that says where, what it got and what it wanted.
    """
    here = Path.cwd() if folder is None else folder.absolute()
    values, name, below = _layered(recipe_path(str(reference), here), allowed)
    values.setdefault("name", name)
    below = values if overrides else below
    for override in overrides:
        values = _assigned(values, override, here, allowed)
    values, files = _replace_files(values, here)
    recipe = recipe_from_json(values)
    refuse_idle(recipe, below)
    return LoadedRecipe(recipe, files)


def _layered(path: Path, allowed: Sequence[Path]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return what a recipe's file and all that it extends say, recipes of components laid in; and the file's name.

    Then what it extends says alone.
    """
    layers = read_layers(path, allowed)
    roots = (path.parent, *allowed)
    values: dict[str, Any] = {}
    below = values
    for layer in layers:
        below = values
        own = {
            key: value
            for key, value in _anchored(layer, roots).items()
            if layer is layers[-1] or key not in _UNDIGESTED
        }
        check_beside(own)
        components = own.pop("components", {})
        if components is None:
            values.pop("components", None)
        elif components:
            values = lay_components(values, components, _reader(layer.folder, roots, allowed))
        values = merge(values, own)
    return values, layers[-1].name, below


def _reader(folder: Path, roots: Sequence[Path] | None, allowed: Sequence[Path]) -> Read:
    """Return what reads components' recipes: by name, or files below `folder`, in `roots` (None: anywhere)."""

    def read(reference: str) -> tuple[dict[str, Any], Recipe]:
        path = recipe_path(reference, folder)
        if roots is not None and reference not in shipped_names():
            file_within(path, roots, "components", error=RecipeError)
        values, name, _ = _layered(path, allowed)
        values.setdefault("name", name)
        return values, recipe_from_json(_replace_files(values, folder)[0])

    return read


def _assigned(values: dict[str, Any], override: str, folder: Path, allowed: Sequence[Path]) -> dict[str, Any]:
    """Return values with one `a.b=v` applied; a component may be given a recipe's name."""
    head, *rest = override.partition("=")[0].strip().split(".")
    if head != "components" or len(rest) > 1:
        return assign(values, override)
    stated = assign({}, override).get("components")
    if stated is None or (rest and not stated):  # null removes
        return assign(values, override)
    return lay_components(values, stated, _reader(folder, None, allowed))


def recipe_from_json(values: Mapping[str, Any]) -> Recipe:
    """Check a recipe that is given as JSON values, such as a job's.

    Raises
    ------
    RecipeError
        If it is not valid.
    """
    try:
        text = json.dumps(values, default=str, ensure_ascii=False)
        return Recipe.model_validate_json(text.encode())
    except ValidationError as error:
        raise RecipeError(first_problem(error, Recipe)) from None
    except UnicodeEncodeError as error:
        raise RecipeError(f"recipe: got {error.object[error.start : error.end]!r} in a text, wanted UTF-8") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe: got a value that JSON cannot hold ({error})") from error


def resolve(recipe: Recipe) -> Resolved:
    """Return a recipe's canonical JSON and digest."""
    values = recipe.model_dump(mode="json")
    return Resolved(canonical_json(values), recipe_digest(values))


def recipe_digest(values: Mapping[str, Any]) -> str:
    """Return the digest of a recipe that is given as JSON values, every field among them."""
    digested = {key: value for key, value in values.items() if key not in (*_UNDIGESTED, *HOW_IT_RUNS)}
    return hashlib.sha256(canonical_json(digested).encode()).hexdigest()


def shipped_recipes() -> dict[str, Recipe]:
    """Return the recipes that come with Quantmill, by name."""
    return {name: load_recipe(name).recipe for name in shipped_names()}


def _stated(values: Mapping[str, Any], field: Sequence[str]) -> str | None:
    """Return the file that a recipe names in a field, if that is text, and not yet a digest."""
    value: Any = values
    for name in field:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) and value and not _DIGEST.fullmatch(value) else None


def _with(values: Mapping[str, Any], field: Sequence[str], value: str) -> dict[str, Any]:
    """Return a recipe with a field that is there replaced."""
    first, *rest = field
    return {**values, first: _with(values[first], rest, value) if rest else value}


def _anchored(layer: Layer, roots: Sequence[Path]) -> dict[str, Any]:
    """Return what a layer says, its files made independent of where it lies, if those are in a root."""
    values: dict[str, Any] = layer.values
    for field in _FILE_FIELDS:
        stated = _stated(values, field)
        if stated is not None:
            path = layer.folder / Path(stated).expanduser()
            values = _with(values, field, str(file_within(path, roots, ".".join(field), error=RecipeError)))
    for field in _FOLDER_FIELDS:
        stated = _stated(values, field)
        if stated is not None:
            path = layer.folder / Path(stated).expanduser()
            file_within(path / CONFIG, roots, ".".join(field), error=RecipeError)
            values = _with(values, field, str(path))
    return values


def store_files(files: Mapping[str, Path | bytes], store: Store) -> None:
    """Put the files of a recipe into a store.

    Raises
    ------
    RecipeError
        If one was changed since its digest was taken.
    """
    for digest, content in files.items():
        put = store.put_bytes(content) if isinstance(content, bytes) else store.put_file(content)
        if put != digest:
            raise RecipeError(f"{content!s}: got other bytes than a moment ago, wanted the file left alone")


def _replace_files(values: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Path | bytes]]:
    """Return a recipe with digests for the files that it names, and these by digest."""
    replaced = dict(values)
    files: dict[str, Path | bytes] = {}
    for where in _FOLDER_FIELDS:
        stated = _stated(replaced, where)
        if stated is not None:
            model = bundled_folder(folder / Path(stated).expanduser(), ".".join(where))
            digest = hashlib.sha256(model).hexdigest()
            replaced, files[digest] = _with(replaced, where, digest), model
    for field in _FILE_FIELDS:
        stated, name = _stated(replaced, field), ".".join(field)
        if stated is None:
            continue
        path = folder / Path(stated).expanduser()
        path = file_within(path, (path.resolve().parent,), name, error=RecipeError)
        packed = bundled(path) if name == "prompts" else None
        if packed is not None:
            digest = hashlib.sha256(packed).hexdigest()
            replaced, files[digest] = _with(replaced, field, digest), packed
            continue
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise RecipeError(f"{name}: got {stated} ({error.strerror}), wanted a readable file") from error
        replaced, files[digest] = _with(replaced, field, digest), path
    return replaced, files
