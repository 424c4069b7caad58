"""Log records as lines on stderr: when, how bad, what, about which task."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from orchestrator.text import printable
from workers.urls import hide_passwords, known_secrets

_FIELDS = ("task", "attempt", "kind", "fault")


class _Lines(logging.Formatter):
    """One line a record; the fields that the scheduler adds follow as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        fields = [(name, getattr(record, name)) for name in _FIELDS if hasattr(record, name)]
        shown = [f"{name}={str(value)[:12] if name == 'task' else value}" for name, value in fields]
        time = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        message = hide_passwords(" ".join(record.getMessage().split()), known_secrets(os.environ))
        return printable(" ".join([time, record.levelname.lower(), message, *shown]))


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is now, so that a live view can put lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr() -> None:
    """Show the orchestrator's warnings and errors on stderr; calling it again changes nothing."""
    logger = logging.getLogger("orchestrator")
    if not logger.handlers:
        handler = _Stderr(sys.stderr)
        handler.setFormatter(_Lines())
        logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
