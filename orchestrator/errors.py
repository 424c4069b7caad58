"""Errors of the orchestrator.

OrchestratorError
├── DatabaseError                 the database refused or lost a statement (exit code 1)
│   ├── DatabaseUnreachableError  no such file, server, user or database (2)
│   ├── DatabaseUnavailableError  it was there and does not serve now: restarted, hung, locked, read-only (1)
│   ├── DatabaseFullError         no room left for the database (2)
│   ├── ConflictError             the transaction ran into another and gave way; to be run again (1)
│   └── SchemaError               the schema is behind or ahead of this Quantmill (2)
├── NotFoundError                 no job, model, release or alias of that name (102)
├── GraphError                    a task graph refers to a task it does not hold before it (1)
├── ResultError                   a task's outputs or metrics cannot be recorded (1)
├── RecipeError                   a recipe cannot be read, resolved or planned (2)
└── SearchError                   a search cannot be read, or asks for what cannot be (2)

Other bad input from a user is `quant_spec.errors.InvalidInputError` itself.
"""

from __future__ import annotations

from quant_spec.errors import InvalidInputError, QuantServiceError


class OrchestratorError(QuantServiceError):
    """Base of the orchestrator's errors."""


class DatabaseError(OrchestratorError):
    """The database refused or lost a statement; the transaction was rolled back."""


class DatabaseUnreachableError(DatabaseError, InvalidInputError):
    """The database does not exist, does not answer, or is not a database."""

    exit_code = 2


class DatabaseUnavailableError(DatabaseError):
    """The database, which was there, does not serve now; it may be back at any time."""


class DatabaseFullError(DatabaseError, InvalidInputError):
    """There is no room left where the database lies; the transaction was rolled back."""

    exit_code = 2


class ConflictError(DatabaseError):
    """Two transactions waited for each other or claimed the same key; this one was rolled back, to be run again."""


#: What passes by itself, if one waits.
OUTAGES = (DatabaseUnavailableError, DatabaseUnreachableError, DatabaseFullError)


class SchemaError(DatabaseError, InvalidInputError):
    """The database's schema is not the one this version of Quantmill works with."""

    exit_code = 2


class NotFoundError(OrchestratorError):
    """What was asked for by name, id or digest is not in the database."""

    exit_code = 102


class GraphError(OrchestratorError, ValueError):
    """A task graph is not in dependency order, or lacks its target."""


class ResultError(OrchestratorError, ValueError):
    """What a task returned cannot be recorded: not JSON, or a number that is not finite."""


class RecipeError(OrchestratorError, InvalidInputError):
    """A recipe cannot be read, resolved or planned."""

    exit_code = 2


class SearchError(OrchestratorError, InvalidInputError):
    """A search cannot be read, or asks for what cannot be."""

    exit_code = 2
