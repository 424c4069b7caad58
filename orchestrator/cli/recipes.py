"""`quantmill recipes`."""

from __future__ import annotations

import json
from typing import Any

import click

from orchestrator.actions.views import recipe_yaml
from orchestrator.cli.app import App, Group, pass_app
from orchestrator.recipes.load import load_recipe, resolve, shipped_recipes
from orchestrator.text import table
from quant_spec.recipe import Recipe


@click.group(cls=Group)
def recipes() -> None:
    """Show and validate recipes. A recipe is a YAML file or the name of one that comes with Quantmill."""


@recipes.command("ls")
@pass_app
def recipes_ls(app: App) -> None:
    """List the recipes that come with Quantmill."""
    views = [_view(recipe) for recipe in shipped_recipes().values()]
    rows = [(view["name"], view["digest"][:12], view["description"]) for view in views]
    app.answer([_without_recipe(view) for view in views], lambda: table(("NAME", "DIGEST", "DESCRIPTION"), rows))


@recipes.command("show")
@click.argument("recipe")
@click.option("--set", "overrides", metavar="A.B=V", multiple=True, help="Change a value; may be repeated.")
@pass_app
def recipes_show(app: App, recipe: str, overrides: tuple[str, ...]) -> None:
    """Show a recipe resolved: every layer of `extends` and every default filled in."""
    view = _view(load_recipe(recipe, overrides, allowed=app.settings.allowed_paths).recipe)
    app.answer(view, lambda: f"# digest {view['digest']}\n{recipe_yaml(view['recipe'])}".rstrip())


@recipes.command("validate")
@click.argument("file")
@pass_app
def recipes_validate(app: App, file: str) -> None:
    """Check a recipe; exit code 2 and one line if something is wrong with it."""
    view = _without_recipe(_view(load_recipe(file, allowed=app.settings.allowed_paths).recipe))
    app.answer(view, lambda: f"{view['name']} is valid, digest {view['digest'][:12]}")


def _view(recipe: Recipe) -> dict[str, Any]:
    resolved = resolve(recipe)
    return {
        "name": recipe.name,
        "digest": resolved.digest,
        "description": recipe.description,
        "recipe": json.loads(resolved.json),
    }


def _without_recipe(view: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in view.items() if name != "recipe"}
