"""Options for keys: who signs, and whose signature is wanted."""

from __future__ import annotations

from pathlib import Path

import click

_FILE = click.Path(path_type=Path)

#: For commands that publish.
sign_option = click.option(
    "--sign",
    "key_file",
    type=_FILE,
    metavar="KEY",
    help="Sign what is published with this private key (PEM, elliptic curve). [password: QUANTMILL_SIGN_PASSWORD]",
)
#: For commands that read what somebody published.
key_option = click.option(
    "--key", "key_file", type=_FILE, metavar="PUB", help="Public key (PEM) that must have signed the release."
)
