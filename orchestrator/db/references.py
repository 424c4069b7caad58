"""Which bytes the database still means; all others in the store may go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db.models import Job, Model, Release, Result
from quant_spec.kinds import KINDS

_PER_READ = 1000


class Owner(StrEnum):
    """What refers to a blob."""

    MODEL = "model"
    RELEASE = "release"
    RESULT = "result"
    RECIPE = "recipe"


@dataclass(frozen=True, slots=True)
class Reference:
    """A blob that something in the database refers to.

    `name` is the model's, the release's ("emoji@3"), the job's of a recipe, or the output's of a result ("pack
    packed"), whose `key` is then given. `tree` says whether the blob is a tree, which lists others; None if the kind of
    task that made it is not known here.
    """

    digest: str
    owner: Owner
    name: str
    tree: bool | None
    key: str | None = None
    source: str | None = None


def recipe_files(recipe: Mapping[str, Any]) -> set[str]:
    """Return the digests of the files that a resolved recipe names."""
    evaluation = recipe.get("evaluation") or {}
    stated = (*(evaluation.get(name) for name in ("extractor_weights", "clip", "lpips")), recipe.get("prompts"))
    return {digest for digest in stated if digest}


def references(session: Session) -> Iterator[Reference]:
    """Stream everything that the database refers to; a blob comes as often as it is referred to.

    `source` is where a model came from, and the job that made a release.
    """
    for model in session.scalars(select(Model).order_by(Model.name)):
        yield Reference(model.digest, Owner.MODEL, model.name, True, source=model.source)
    for release in session.scalars(select(Release).order_by(Release.name, Release.version)):
        name = f"{release.name}@{release.version}"
        yield Reference(release.digest, Owner.RELEASE, name, True, source=release.job_id)
    recipes = select(Job.id, Job.recipe).order_by(Job.created_at).execution_options(yield_per=_PER_READ)
    for job in session.execute(recipes):
        for digest in recipe_files(job.recipe):
            yield Reference(digest, Owner.RECIPE, job.id, False)
    results = select(Result.key, Result.kind, Result.outputs).execution_options(yield_per=_PER_READ)
    for row in session.execute(results):
        kind = KINDS.get(row.kind)
        for output, digest in row.outputs.items():
            tree = None if kind is None else output in kind.trees
            yield Reference(digest, Owner.RESULT, f"{row.kind} {output}", tree, row.key)
