"""Makes the secrets that docker-compose.yml reads, in files that only their owner reads: `python -m deploy.secrets`.

Another folder than deploy/secrets may be given.

A file that is there already is kept, so that running it again changes nothing.
"""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

#: Where docker-compose.yml looks, unless SECRETS says otherwise.
FOLDER = Path(__file__).parent / "secrets"
NAMES = ("database_password", "store_credentials", "store_keys", "ray_token")


def make_secrets(folder: Path) -> list[str]:
    """Write the secrets that are not there yet; return their names."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [name for name in NAMES if not (folder / name).exists()]
    # The store's key pair is in two files, one for its clients and one for itself.
    if bool({"store_credentials", "store_keys"} & set(missing)):
        missing = [*dict.fromkeys([*missing, "store_credentials", "store_keys"])]
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    contents = {
        "database_password": secrets.token_hex(20),
        "store_credentials": f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n",
        "store_keys": f"{key},{secret}",
        "ray_token": secrets.token_hex(32),
    }
    for name in missing:
        path = folder / name
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(contents[name])
    return missing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m deploy.secrets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where they are, or will be")
    where = parser.parse_args().folder
    made = make_secrets(where)
    print(f"{where}: made {', '.join(made) or 'nothing, all are there'}")
