"""`quantmill`: the table of commands, and what each way to fail returns to the shell.

Exit codes: 0 done, 1 our fault, 2 usage or invalid input (also: met by a job as it ran), 100 job failed, 101 not
finished in time, 102 not found, 103 cancelled.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Collection, Sequence

import click

from orchestrator.cli.app import LazyGroup, make_app
from orchestrator.logs import is_json
from orchestrator.text import printable
from quant_spec.errors import QuantServiceError
from workers.storage.blobs import NO_ROOM
from workers.urls import hide_passwords, known_secrets, shown_url

log = logging.getLogger(__name__)

#: What the operating system says of names that no file can have; only a user writes such.
_NO_PATH = {errno.ENAMETOOLONG, errno.ELOOP}

COMMANDS = {
    "init": ("orchestrator.cli.home:init", "Create the home, the database and the store."),
    "doctor": ("orchestrator.cli.doctor:doctor", "Check the database, the store, Ray and this machine."),
    "db": ("orchestrator.cli.home:db", "Look at or upgrade the database's schema."),
    "models": ("orchestrator.cli.models:models", "Register and show models."),
    "recipes": ("orchestrator.cli.recipes:recipes", "Show and validate recipes."),
    "run": ("orchestrator.cli.run:run", "Submit a job and execute it here, with progress."),
    "submit": ("orchestrator.cli.submit:submit", "Queue a job."),
    "serve": ("orchestrator.cli.serve:serve", "Execute queued jobs on Ray; any number may run."),
    "jobs": ("orchestrator.cli.jobs:jobs", "Follow, cancel and retry jobs."),
    "search": ("orchestrator.cli.search:search", "Search bit widths for many models, as Pareto sets."),
    "artifacts": ("orchestrator.cli.artifacts_group:artifacts", "List, pull, verify, name and compare releases."),
    "bench": ("orchestrator.cli.bench:bench", "Measure a release on this machine: latency, images/s, memory."),
    "report": ("orchestrator.cli.report:report", "Write a job's report, one HTML file."),
}


@click.group(
    cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--home", metavar="DIR", help="Folder of the embedded database and store. [QUANTMILL_HOME, ~/.quantmill]")
@click.option("--db", metavar="URL", help="Database: sqlite:////PATH or postgresql://... [QUANTMILL_DB]")
@click.option("--store", metavar="URL", help="Object store: a folder or s3://BUCKET/PREFIX. [QUANTMILL_STORE]")
@click.option(
    "--ray", metavar="ADDRESS", help="Ray cluster to run on; a local one is started by default. [RAY_ADDRESS]"
)
@click.option(
    "--allow-path",
    metavar="DIR",
    multiple=True,
    help="Folder that recipes and model folders may name files in, besides their own. [QUANTMILL_ALLOWED_PATHS]",
)
@click.version_option(package_name="quantmill", message="quantmill %(version)s")
@click.pass_context
def cli(
    context: click.Context,
    home: str | None,
    db: str | None,
    store: str | None,
    ray: str | None,
    allow_path: tuple[str, ...],
) -> None:
    """Quantize diffusion models to packed low-bit releases that diffusers loads."""
    context.obj = make_app(home, db, store, ray, allow_path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run_cli(arguments))


def run_cli(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what went wrong becomes one line on stderr and an exit code."""
    words = list(arguments) if arguments is not None else sys.argv[1:]
    secrets = known_secrets(os.environ, (part for word in words for part in (word, word.partition("=")[2])))
    try:
        result = cli.main(args=words, prog_name="quantmill", standalone_mode=False)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(printable(_without_passwords(said.getvalue(), words, secrets)), err=True, nl=False)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except QuantServiceError as error:
        return _fail(_one_line(error, secrets), error.exit_code)
    except OSError as error:
        if error.errno in _NO_PATH:
            return _fail(f"path: got {str(error.filename)[:200]} ({error.strerror}), wanted one that can be", 2)
        if error.errno not in NO_ROOM:
            _print_traceback(secrets)
            return _fail(_one_line(error, secrets), 1)
        where = error.filename or "a file"
        return _fail(f"no room left to write {where}: got {error.strerror}, wanted free space", 2)
    except Exception as error:
        _print_traceback(secrets)
        return _fail(f"this is a fault of Quantmill: {_one_line(error, secrets)}", 1)
    return result if isinstance(result, int) else 0


def _one_line(error: BaseException, secrets: Collection[str]) -> str:
    return hide_passwords(" ".join(str(error).split()), secrets) or type(error).__name__


def _without_passwords(message: str, arguments: Sequence[str], secrets: Collection[str]) -> str:
    """Hide the passwords in what click says of the arguments, which it quotes: a URL in a wrong place, say."""
    for argument in sorted(arguments, key=len, reverse=True):
        option, equals, value = argument.partition("=")
        for text in (argument, value if equals and option.startswith("-") else ""):
            for quoted in (text, repr(text)[1:-1]):  # where a tab, say, is two characters
                message = message.replace(quoted, shown_url(text)) if text else message
    return hide_passwords(message, secrets)


def _print_traceback(secrets: Collection[str]) -> None:
    if is_json():
        log.error("traceback", exc_info=True)
        return
    text = hide_passwords(traceback.format_exc(), secrets)
    click.echo(printable(text), err=True, nl=False)


def _fail(message: str, code: int) -> int:
    if is_json():
        log.error("%s", message)
        return code
    click.echo(printable(f"error: {message}"), err=True)
    return code
