"""Signatures of releases, by the digest of what they are of and the key that made them; any number of keys may sign."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Release, Signature
from orchestrator.db.statements import insert_into


def add_signature(session: Session, digest: str, key: str, bundle: str) -> None:
    """Keep a signature; the first one of a key stays."""
    values = {"digest": digest, "key_id": key, "bundle": bundle, "created_at": epoch_seconds()}
    session.execute(insert_into(session, Signature).values(**values).on_conflict_do_nothing())


def find_signature(session: Session, digest: str, key: str | None = None) -> str | None:
    """Return the signature of an artifact by a key, or the oldest one of all; None if there is none."""
    wanted = [Signature.digest == digest, *([] if key is None else [Signature.key_id == key])]
    return session.scalar(select(Signature.bundle).where(*wanted).order_by(Signature.created_at, Signature.key_id))


def signing_keys(session: Session, digest: str) -> list[str]:
    """Return the keys that signed an artifact."""
    return list(session.scalars(select(Signature.key_id).where(Signature.digest == digest).order_by(Signature.key_id)))


def unsigned_releases(session: Session, key: str, since: float, limit: int = 100) -> list[tuple[str, int, str]]:
    """Return (name, version, digest) of releases published since a time that the key has not signed, oldest first."""
    signed = select(Signature.digest).where(Signature.digest == Release.digest, Signature.key_id == key).exists()
    statement = (
        select(Release.name, Release.version, Release.digest)
        .where(Release.created_at >= since, ~signed)
        .order_by(Release.created_at, Release.name, Release.version)
        .limit(limit)
    )
    return [(row.name, row.version, row.digest) for row in session.execute(statement)]
