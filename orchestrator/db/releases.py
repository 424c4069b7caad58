"""The registry of releases: versions that never change meaning, and aliases that move."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select
from sqlalchemy.orm import Session

from orchestrator.db.clock import epoch_seconds
from orchestrator.db.models import Alias, Release
from orchestrator.db.rows import ReleaseRow
from orchestrator.db.statements import insert_into
from orchestrator.errors import NotFoundError
from quant_spec.errors import InvalidInputError
from workers.storage.names import check_name

#: The alias that follows whatever was published last.
LATEST = "latest"

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{4,64}")


def publish(session: Session, name: str, digest: str, size: int, *, job: str, metrics: Mapping[str, Any]) -> str:
    """Publish an artifact under a name and return "name@N"; the same bytes under the same name are one version.

    Called under `lock_graph`, so that versions count up without holes.
    """
    version = session.scalar(select(Release.version).where(Release.name == name, Release.digest == digest))
    if version is None:
        version = (session.scalar(select(func.max(Release.version)).where(Release.name == name)) or 0) + 1
        values = {"name": name, "version": version, "digest": digest, "bytes": size, "job_id": job}
        session.execute(insert(Release).values(**values, metrics=dict(metrics), created_at=epoch_seconds()))
    _point(session, name, LATEST, version)
    return f"{name}@{version}"


def list_releases(session: Session, name: str | None = None) -> list[ReleaseRow]:
    """Return releases by name and version, all or those of one name."""
    return _rows(session, Release.name == name) if name is not None else _rows(session)


def find_release(session: Session, ref: str) -> ReleaseRow:
    """Return the release that a reference means.

    Parameters
    ----------
    ref
        `name@3`, `name@alias`, `name` (its latest), or at least 4 digits of its digest.

    Raises
    ------
    NotFoundError
        If there is none.
    InvalidInputError
        If the digits fit several digests.
    """
    name, at, version = ref.partition("@")
    if not at:
        found = _find_version(session, name, LATEST)
        found = found or _find_digest(session, ref)
    else:
        found = _find_version(session, name, version)
    if found is None:
        raise NotFoundError(f"release: got {ref!r}, wanted NAME, NAME@VERSION, NAME@ALIAS or a digest of artifacts ls")
    return found


def set_alias(session: Session, ref: str, alias: str) -> ReleaseRow:
    """Point an alias of a release's name at that release, wherever it pointed before; return the release.

    Raises
    ------
    NotFoundError
        If there is no such release.
    InvalidInputError
        If the alias is not a name, is a number, or is "latest", which moves by itself.
    """
    check_name(alias)
    if alias.isdigit() or alias == LATEST:
        raise InvalidInputError(f"alias: got {alias!r}, wanted a name that is neither a number nor {LATEST!r}")
    release = find_release(session, ref)
    _point(session, release.name, alias, release.version)
    return find_release(session, release.ref)


def _point(session: Session, name: str, alias: str, version: int) -> None:
    statement = insert_into(session, Alias).values(name=name, alias=alias, version=version)
    session.execute(statement.on_conflict_do_update(index_elements=["name", "alias"], set_={"version": version}))


def _find_version(session: Session, name: str, version: str) -> ReleaseRow | None:
    number: Any = version
    if version.isascii() and version.isdigit():
        if len(version) > 9:
            return None
        number = int(version)
    else:
        number = select(Alias.version).where(Alias.name == name, Alias.alias == version).scalar_subquery()
    return next(iter(_rows(session, Release.name == name, Release.version == number)), None)


def _find_digest(session: Session, prefix: str) -> ReleaseRow | None:
    """Find by digest; of several names for the same bytes, the one published last."""
    if not _DIGEST_PREFIX.fullmatch(prefix):
        return None
    rows = _rows(session, Release.digest.startswith(prefix, autoescape=True))
    if len({row.digest for row in rows}) > 1:
        raise InvalidInputError(f"release: got {prefix!r}, which fits {len(rows)} releases; wanted more digits")
    return max(rows, key=lambda row: row.created_at, default=None)


def _rows(session: Session, *where: ColumnElement[bool]) -> list[ReleaseRow]:
    releases = session.scalars(select(Release).where(*where).order_by(Release.name, Release.version)).all()
    aliases: dict[tuple[str, int], list[str]] = {}
    for alias in session.scalars(select(Alias).where(Alias.name.in_({each.name for each in releases}))):
        aliases.setdefault((alias.name, alias.version), []).append(alias.alias)
    return [
        ReleaseRow(
            name=each.name,
            version=each.version,
            digest=each.digest,
            bytes=each.bytes,
            aliases=tuple(sorted(aliases.get((each.name, each.version), ()))),
            job=each.job_id,
            created_at=each.created_at,
            metrics=each.metrics,
        )
        for each in releases
    ]
