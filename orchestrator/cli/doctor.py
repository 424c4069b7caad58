"""`quantmill doctor`."""

from __future__ import annotations

from dataclasses import asdict

import click

from orchestrator.actions.doctor import examine
from orchestrator.cli.app import App, Command, pass_app


@click.command(cls=Command)
@pass_app
def doctor(app: App) -> int:
    """Check the database, the store, Ray and this machine; exit code 1 if something is wrong."""
    checks = examine(app.settings)
    ok = all(check.ok for check in checks)
    document = {"ok": ok, "checks": [asdict(check) for check in checks]}
    lines = [f"{'ok  ' if check.ok else 'BAD '}  {check.name:<13} {check.detail}" for check in checks]
    app.answer(document, lambda: "\n".join(lines))
    return 0 if ok else 1
