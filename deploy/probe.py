"""Ends with 0 if an address answers 200: `python -m deploy.probe http://127.0.0.1:9464/healthz`."""

from __future__ import annotations

import sys
import urllib.request


def main(address: str) -> int:
    """Return 0 if the address answers 200."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return 0
    except OSError as error:
        print(f"{address}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
