"""Alembic migrations: the only way that the schema changes, on SQLite and Postgres."""
