"""The small web server of `quantmill serve --metrics`: `/metrics`, `/healthz`, `/readyz`, for reading only."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector, disable_created_metrics

from orchestrator.db.session import Database
from orchestrator.monitoring.collector import ServiceCollector
from orchestrator.monitoring.counting import CountingWatch
from orchestrator.monitoring.health import health
from orchestrator.monitoring.store_size import StoreSize
from orchestrator.scheduling.watch import Watch
from quant_spec.errors import InvalidInputError
from workers.storage.store import Store
from workers.urls import hide_passwords

_HEALTH = {"/healthz": "live", "/readyz": "ready"}


class _Handler(MetricsHandler):
    """Answers GET; `registry` and `watch` are set in a subclass for each server."""

    watch: Watch
    # A client that says nothing more holds its thread no longer than this.
    timeout = 10

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            super().do_GET()
        elif path in _HEALTH:
            document = health(self.watch.status)
            good = document[_HEALTH[path]]
            self._send(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, document)
        else:
            self._send(HTTPStatus.NOT_FOUND, {"error": "wanted /metrics, /healthz or /readyz"})

    def _send(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    """One thread a request; they end with the process."""

    daemon_threads = True
    # With Python's own 5, a dozen that ask at once are not heard at first, and try again after a second: longer than a
    # probe waits for an answer.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no matter of ours."""


@contextmanager
def monitoring(
    database: Database, store: Store, host: str, port: int, orchestrator: str
) -> Iterator[tuple[Watch, str]]:
    """Serve metrics and health while the block runs.

    Parameters
    ----------
    database, store
        Of the service.
    host, port
        Where to listen; port 0: any that is free.
    orchestrator
        The name that the orchestrator's leases have as their owner.

    Yields
    ------
    tuple of (Watch, str)
        What the scheduler has to be given, and the address of the metrics.

    Raises
    ------
    InvalidInputError
        If there is nothing to listen on at that place.
    """
    disable_created_metrics()
    registry = CollectorRegistry()
    watch = CountingWatch(registry)
    sizes = StoreSize(store)
    registry.register(ServiceCollector(database, watch, sizes, orchestrator))
    ProcessCollector(registry=registry)
    handler = type("Handler", (_Handler,), {"registry": registry, "watch": watch})
    try:
        server = _Server((host, port), handler)
    except (OSError, OverflowError) as error:
        what = hide_passwords(getattr(error, "strerror", None) or str(error))
        raise InvalidInputError(f"--metrics: got {host}:{port} ({what}), wanted an address to listen on") from error
    sizes.start()
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield watch, f"http://{shown}:{server.server_address[1]}/metrics"
    finally:
        sizes.stop()
        server.shutdown()
        server.server_close()
        thread.join()
