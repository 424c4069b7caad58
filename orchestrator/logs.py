"""Log records as lines on stderr, for people or as JSON: when, how bad, what, about which job, task and attempt."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

from orchestrator.text import printable
from quant_spec.errors import InvalidInputError
from workers.urls import hide_passwords, known_secrets

#: The variable that says how lines are written where the command line doesn't.
FORMAT_VARIABLE = "QUANTMILL_LOG_FORMAT"

# What the scheduler adds to a record, in the order in which it is shown; more of it in JSON.
_FIELDS = ("job", "task", "attempt", "kind", "fault")
_JSON_FIELDS = (*_FIELDS, "jobs", "seconds")


class LogFormat(StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class _Lines(logging.Formatter):
    """One line a record; the fields that the scheduler adds follow as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = [(name, getattr(record, name)) for name in _FIELDS if hasattr(record, name)]
        shown = [f"{name}={str(value)[:12] if name == 'task' else value}" for name, value in fields]
        time = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        return printable(" ".join([time, record.levelname.lower(), _message(record), *shown]))


class _JsonLines(logging.Formatter):
    """One JSON document a record, in one line: `time` (UTC), `level`, `logger`, `message`, and fields that it has."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        document |= {name: getattr(record, name) for name in _JSON_FIELDS if hasattr(record, name)}
        if record.exc_info:
            document["exception"] = hide_passwords(self.formatException(record.exc_info), known_secrets(os.environ))
        return json.dumps(document, ensure_ascii=False, default=str)


def _message(record: logging.LogRecord) -> str:
    return hide_passwords(" ".join(record.getMessage().split()), known_secrets(os.environ))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is now, so that a live view can put lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_format(environ: Mapping[str, str], given: str | None = None) -> LogFormat:
    """Return the format that the command line gave, else the environment's, else text.

    Raises
    ------
    InvalidInputError
        If there is no such format.
    """
    name = given or environ.get(FORMAT_VARIABLE) or LogFormat.TEXT
    try:
        return LogFormat(name)
    except ValueError:
        wanted = " or ".join(LogFormat)
        raise InvalidInputError(f"{FORMAT_VARIABLE}: got {name!r}, wanted {wanted}") from None


def log_to_stderr(style: LogFormat = LogFormat.TEXT) -> None:
    """Show warnings and errors on stderr, other packages' too; as JSON also what the orchestrator does.

    The last call says how.
    """
    root = logging.getLogger()
    handler = next((each for each in root.handlers if isinstance(each, _Stderr)), None)
    if handler is None:
        handler = _Stderr(sys.stderr)
        root.addHandler(handler)
    handler.setFormatter(_JsonLines() if style is LogFormat.JSON else _Lines())
    logging.getLogger("orchestrator").setLevel(logging.INFO if style is LogFormat.JSON else logging.WARNING)
    logging.captureWarnings(style is LogFormat.JSON)


def is_json() -> bool:
    """Say whether stderr is for machines, so that nothing but JSON may be written there."""
    handlers = logging.getLogger().handlers
    return any(isinstance(each, _Stderr) and isinstance(each.formatter, _JsonLines) for each in handlers)
