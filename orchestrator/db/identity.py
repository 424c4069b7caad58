"""Which database this is, and which store belongs to it: the one row of `service`."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from orchestrator.db.models import Model, Result, ServiceRow


@dataclass(frozen=True, slots=True)
class Identity:
    """The id that a database got with its schema, and that of its store, None as long as none belongs to it."""

    id: str
    store_id: str | None


def read_identity(session: Session) -> Identity:
    """Return which database this is."""
    row = session.scalars(select(ServiceRow)).one()
    return Identity(row.id, row.store_id)


def set_store(session: Session, store_id: str, *, replace: bool = False) -> Identity:
    """Note which store belongs to this database, unless that is known or is to be replaced; return what holds now."""
    statement = update(ServiceRow).values(store_id=store_id)
    if not replace:
        statement = statement.where(ServiceRow.store_id.is_(None))
    session.execute(statement, execution_options={"synchronize_session": False})
    session.expire_all()
    return read_identity(session)


def some_digests(session: Session, count: int) -> list[str]:
    """Return digests of blobs that the store of this database should have: of models and of the newest results."""
    digests = list(session.scalars(select(Model.digest).order_by(Model.created_at.desc()).limit(count)))
    for outputs in session.scalars(select(Result.outputs).order_by(Result.created_at.desc()).limit(count)):
        digests += outputs.values()
    return list(dict.fromkeys(digests))[:count]
