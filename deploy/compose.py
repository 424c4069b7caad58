"""Reads docker-compose.yml as far as processes need it: services with their commands, variables, checks and order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"

_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}$]*))?\})")


@dataclass(frozen=True, slots=True)
class Service:
    """One service, its variables filled in.

    `command` is what runs, entrypoint included. `after` maps the services that it waits for to what it waits for:
    "service_started", "service_healthy" or "service_completed_successfully". `check` says by its exit status whether
    the service works; empty: running is enough, or an output that has `ready`. `stop_seconds` is the time that it has
    to end after `stop_signal`.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    after: Mapping[str, str]
    check: tuple[str, ...] = ()
    restart: bool = False
    profiles: tuple[str, ...] = ()
    stop_seconds: float = 10.0
    stop_signal: str = "SIGTERM"
    ready: str = ""


def read_services(variables: Mapping[str, str], file: Path = FILE) -> dict[str, Service]:
    """Return the services of a compose file by name.

    Parameters
    ----------
    variables
        Values for `${NAME:-default}`; an empty value counts as absent.
    file
        The compose file.

    Raises
    ------
    ValueError
        If a service's text names a variable that has neither value nor default, or is written in a form that this
        does not read.
    """
    document = _filled(yaml.safe_load(file.read_text(encoding="utf-8")), variables)
    return {name: _service(name, body) for name, body in document["services"].items()}


def defaults(file: Path = FILE) -> dict[str, str]:
    """Return every variable of a compose file with its default."""
    found = _VARIABLE.finditer(_COMMENT.sub("", file.read_text(encoding="utf-8")))
    return {match["name"]: match["default"] or "" for match in found if match["name"]}


def _filled(node: Any, variables: Mapping[str, str]) -> Any:
    """Fill in the variables of all text below a node."""
    if isinstance(node, dict):
        return {key: _filled(value, variables) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, variables) for value in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        given = variables.get(match["name"]) or match["default"]
        if given is None:
            raise ValueError(f"compose file: got no value for {match['name']}, wanted one")
        return given

    if "$" in _VARIABLE.sub("", node):
        raise ValueError(f"compose file: got {node!r}, wanted variables as ${{NAME:-default}} and $$ for $")
    return _VARIABLE.sub(value, node)


def _service(name: str, body: Mapping[str, Any]) -> Service:
    process = body.get("x-process", {})
    entrypoint = process.get("entrypoint", body.get("entrypoint", []))
    after = body.get("depends_on", {})
    return Service(
        name=name,
        command=(*_words(name, entrypoint), *_words(name, body.get("command", []))),
        environment={key: str(value) for key, value in body.get("environment", {}).items()},
        after={other: wanted["condition"] for other, wanted in after.items()},
        check=_check(name, body.get("healthcheck", {}).get("test", [])),
        restart=body.get("restart", "no") != "no",
        profiles=tuple(body.get("profiles", ())),
        stop_seconds=float(str(body.get("stop_grace_period", "10s")).removesuffix("s")),
        stop_signal=body.get("stop_signal", "SIGTERM"),
        ready=process.get("ready", ""),
    )


def _words(name: str, words: Any) -> Sequence[str]:
    if not isinstance(words, list):
        raise ValueError(f"compose file: got {words!r} in {name}, wanted a list of words")
    return [str(word) for word in words]


def _check(name: str, test: Any) -> tuple[str, ...]:
    words = _words(name, test)
    if words and words[0] != "CMD":
        raise ValueError(f"compose file: got a check of {name} that begins with {words[0]!r}, wanted CMD")
    return tuple(words[1:])
