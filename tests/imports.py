"""Import what tests and their processes import, so that it is compiled once: `make test` does so before all of them."""

from __future__ import annotations

import importlib
import warnings

from tests.warm_server import import_all

#: What tasks do not import, and tests or the processes that they start do.
OTHERS = (
    *("peft", "transformers", "scipy.stats", "scipy.optimize", "torchmetrics", "ray", "ray.cluster_utils"),
    *("ray._private.workers.default_worker", "boto3", "sqlalchemy.orm", "alembic.command", "psycopg", "hypothesis"),
    *("pytest", "xdist", "rich.live", "orchestrator.cli.main", "orchestrator.cli.app", "orchestrator.service"),
)


def main() -> None:
    """Import everything; what is not there is left to the tests to miss."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_all()
        for name in OTHERS:
            importlib.import_module(name)


if __name__ == "__main__":
    main()
