"""Run migrations on the connection that `orchestrator.db.session` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from orchestrator.db.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
    transactional_ddl=True,
)
context.run_migrations()
