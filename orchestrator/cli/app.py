"""What all commands share: the global options, `--json` anywhere, and how answers are written."""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.settings import Settings, resolve_settings
from orchestrator.text import printable
from workers.urls import shown_url

if TYPE_CHECKING:
    from orchestrator.service import Service

#: Key of `click.Context.meta`, which all contexts of one call share.
JSON_KEY = "quantmill.json"


@dataclass(frozen=True, slots=True)
class App:
    """The settings of one call, and the two ways to answer: text, or one JSON document.

    `options` are the global options as they were given, but for passwords, to be repeated in the commands that the
    answer suggests.
    """

    settings: Settings
    options: tuple[str, ...] = ()

    @property
    def json(self) -> bool:
        """Return whether `--json` was given, before or after the command's name."""
        return bool(click.get_current_context().meta.get(JSON_KEY))

    @contextmanager
    def service(self, *, need_store: bool = True) -> Iterator[Service]:
        """Open the database and the store, which some can do without; the home is made on first use."""
        from orchestrator.service import open_service

        with open_service(self.settings, need_store=need_store) as service:
            yield service

    def answer(self, document: Any, text: Callable[[], str]) -> None:
        """Write the answer on stdout: the document as JSON if asked for, else the text."""
        if self.json:
            click.echo(json.dumps(document, indent=2, allow_nan=False))
        elif rendered := text():
            click.echo(printable(rendered))

    def command(self, *words: str) -> str:
        """Return a command that the user can type next, as this one was typed."""
        return shlex.join([*program(), *self.options, *words])

    def notify(self, message: str) -> None:
        """Write a message for a person, on stderr; one that nobody can read any more stops no work."""
        with suppress(BrokenPipeError):
            click.echo(printable(message), err=True)


pass_app = click.make_pass_decorator(App)


def _output_is_gone() -> bool:
    """Say whether nobody reads stdout any more."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0))


def _set_json(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        context.meta[JSON_KEY] = True


def _json_option() -> click.Option:
    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=_set_json,
        help="Answer with one JSON document on stdout.",
    )


class Command(click.Command):
    """A command that takes `--json`, and that no broken pipe ends in silence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; that the reader of our output is gone (`| head`) is no error, but there is no more to do.

        Any other broken pipe is an error. Left to click, it would end the program without a line.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            if not _output_is_gone():
                raise RuntimeError(f"a pipe broke that is not the output ({error})") from error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


class Group(click.Group):
    """A group that takes `--json` and whose commands do."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_json_option())


class LazyGroup(Group):
    """A group that imports a command only when it is called, so that `--help` answers at once.

    `lazy` maps a command's name to ("module:attribute", one line of help).
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the table."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


def make_app(
    home: str | None, db: str | None, store: str | None, ray: str | None, allow_path: Sequence[str] = ()
) -> App:
    """Resolve the global options against the environment."""
    given = {"--home": home, "--db": db, "--store": store, "--ray": ray}
    options = tuple(word for name, value in given.items() if value for word in (name, shown_url(value)))
    options += tuple(word for path in allow_path for word in ("--allow-path", path))
    settings = resolve_settings(
        os.environ, home=home, database_url=db, store_url=store, ray_address=ray, allowed_paths=allow_path
    )
    return App(settings, options)


def program() -> list[str]:
    """Return the words that start this program: its name if the shell finds it, else where it is."""
    script = Path(sys.executable).parent / "quantmill"
    if not script.is_file():
        return [sys.executable, "-m", "orchestrator.cli"]
    found = shutil.which("quantmill")
    if found is not None and Path(found).resolve() == script.resolve():
        return ["quantmill"]
    return [str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)]
