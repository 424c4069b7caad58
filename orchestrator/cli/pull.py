"""`quantmill artifacts pull`; in a file of its own, as what other commands import takes longer than a small pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.actions.releases import pull_denoiser, pull_release
from orchestrator.cli.app import App, Command, pass_app
from orchestrator.cli.keys import key_option

if TYPE_CHECKING:
    from orchestrator.db.rows import ReleaseRow
    from orchestrator.service import Service
    from workers.storage.signature import VerifyingKey


@click.command("pull", cls=Command)
@click.argument("ref")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--denoiser-only", is_flag=True, help="Of a whole pipeline: the packed denoiser alone, as load_quantized takes it."
)
@key_option
@pass_app
def artifacts_pull(app: App, ref: str, folder: Path, denoiser_only: bool, key_file: Path | None) -> None:
    """Write a release into a new folder, every file verified. It is there whole or not at all.

    A folder that has it already is kept if every file in it still is as its digest says. If somebody signed it, the
    signature goes with it as model.sig; with --key, it must be that key's.
    """
    key = _key(key_file)
    if denoiser_only and key is not None:
        raise click.UsageError(
            "--key: got it with --denoiser-only, wanted one of them: a signature is of the whole release"
        )
    if denoiser_only:
        with app.service() as service:
            only = pull_denoiser(service, ref, folder)
        document = {"release": only.ref, "digest": only.digest, "bytes": only.bytes, "folder": str(folder.absolute())}
        app.answer(document | {"kept": False}, lambda: f"the denoiser of {only.ref} is in {folder}")
        return
    with app.service() as service:
        release, kept = _pull(service, ref, folder, key)
    document = {
        "release": release.ref,
        "digest": release.digest,
        "bytes": release.bytes,
        "folder": str(folder.absolute()),
        "kept": kept,
    }
    app.answer(document, lambda: f"{release.ref} is in {folder}" + (" already, every file checked" if kept else ""))


def _pull(service: Service, ref: str, folder: Path, key: VerifyingKey | None) -> tuple[ReleaseRow, bool]:
    """Pull a release, which somebody must have signed with the key, if there is one."""
    if key is None:
        return pull_release(service, ref, folder)
    from orchestrator.actions.signing import pull_signed

    return pull_signed(service, ref, folder, key)


def _key(file: Path | None) -> VerifyingKey | None:
    """Read a public key, if one was given."""
    if file is None:
        return None
    from workers.storage.signature import load_verifying_key

    return load_verifying_key(file)
