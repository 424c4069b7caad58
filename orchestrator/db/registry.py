"""Registered models and recorded results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Model, Result
from orchestrator.db.rows import ModelRow
from orchestrator.db.session import lock_enqueue
from orchestrator.db.statements import batches
from orchestrator.errors import NotFoundError
from quant_spec.errors import InvalidInputError
from workers.storage.names import check_name

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{4,64}")


def add_model(session: Session, model: ModelRow) -> ModelRow:
    """Register a model; the same name and digest again is the model that is there, with the inspection given now.

    Raises
    ------
    InvalidInputError
        If the name is not one, or names another model.
    """
    check_name(model.name)
    # Two that register the same model at once: the second waits, then finds it there.
    lock_enqueue(session)
    present = session.get(Model, model.name)
    if present is None:
        values = {name: getattr(model, name) for name in ModelRow.__slots__ if name != "created_at"}
        session.execute(insert(Model).values(**values, created_at=epoch_seconds()))
    elif present.digest != model.digest:
        raise name_taken(model.name, model.digest, present.digest)
    elif present.inspection != model.inspection:
        session.execute(update(Model).where(Model.digest == model.digest).values(inspection=model.inspection))
        session.expire(present)
    return find_model(session, model.name)


def name_taken(name: str, digest: str, taken: str) -> InvalidInputError:
    """Return the refusal of a name for a model, by digest, that another model has."""
    return InvalidInputError(
        f"model name {name!r}: got digest {digest[:12]}, but it names {taken[:12]}; wanted another name"
    )


def find_model(session: Session, name: str) -> ModelRow:
    """Return a model by its name, or by at least 4 digits of its digest (of several names, the first registered).

    `name@digits` is the model of that name, if its digest begins with these digits.

    Raises
    ------
    NotFoundError
        If there is none.
    InvalidInputError
        If the digits fit several models.
    """
    own, at, digits = name.partition("@")
    model = session.get(Model, own)
    if model is not None and at and not (_DIGEST_PREFIX.fullmatch(digits) and model.digest.startswith(digits)):
        raise NotFoundError(
            f"model: got {name!r}, but the digest of {own} is {model.digest[:12]}; wanted one of models ls"
        )
    if model is not None:
        return _model_row(model)
    rows: Sequence[Model] = []
    if _DIGEST_PREFIX.fullmatch(name):
        statement = select(Model).where(Model.digest.startswith(name)).order_by(Model.created_at, Model.name)
        rows = session.scalars(statement).all()
    if not rows:
        raise NotFoundError(f"model: got {name!r}, wanted one of models ls")
    if len({row.digest for row in rows}) > 1:
        raise InvalidInputError(f"model: got {name!r}, which fits {len(rows)} models; wanted more digits")
    return _model_row(rows[0])


def list_models(session: Session) -> list[ModelRow]:
    """Return the registered models by name."""
    return [_model_row(model) for model in session.scalars(select(Model).order_by(Model.name))]


def known_results(session: Session, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the outputs of those keys that have a recorded result."""
    known: dict[str, dict[str, str]] = {}
    for batch in batches(keys):
        statement = select(Result.key, Result.outputs).where(Result.key.in_(batch))
        known.update((row.key, row.outputs) for row in session.execute(statement))
    return known


def _model_row(model: Model) -> ModelRow:
    return ModelRow(**{name: getattr(model, name) for name in ModelRow.__slots__})
