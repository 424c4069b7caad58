"""`quantmill artifacts` as the program finds it: `pull` starts without what the other commands import."""

from __future__ import annotations

import click

from orchestrator.cli.app import Group


class ArtifactsGroup(Group):
    """The commands of `orchestrator.cli.artifacts`, imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names."""
        return self._all().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command."""
        if cmd_name == "pull":
            from orchestrator.cli.pull import artifacts_pull

            return artifacts_pull
        return self._all().get_command(ctx, cmd_name)

    @staticmethod
    def _all() -> click.Group:
        from orchestrator.cli.artifacts import artifacts

        return artifacts


@click.group(cls=ArtifactsGroup)
def artifacts() -> None:
    """List, pull, verify, name and compare releases.

    REF is NAME@VERSION, NAME@ALIAS, NAME (its latest), or a unique beginning of a digest.
    """
