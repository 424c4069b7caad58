"""Files of recipes, for the tests beside this."""

from __future__ import annotations

from pathlib import Path

from orchestrator.recipes.files import recipe_path, shipped_names
from orchestrator.recipes.load import load_recipe
from quant_spec.recipe import Recipe

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
FILES = [*(recipe_path(name, ROOT) for name in shipped_names()), *EXAMPLES]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def loaded(text: str, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write(folder, "mine.yaml", text), overrides).recipe
