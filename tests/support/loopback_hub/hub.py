"""The server."""
import os
import re
import sys
import threading
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from . import reading, writing  # noqa: F401
from .faults import Fault
from .repos import HubError
from .routing import dispatch
from .store import Store
from .wire import Request, Response, json_response

__all__ = ['LoopbackHub']


class LoopbackHub(Store):
    """The server; a context manager, listening while it is open.

    Args:
        request_limit: Requests answered before everything is refused, so that a client in a loop comes to an end.

    Attributes:
        requests: What was asked so far, as ``(method, path)``, the path unquoted and without query. Large files have
            paths that begin with ``/storage/``.
    """

    def __init__(self, *, request_limit: int = 1000) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []
        self._request_limit = request_limit
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # Large files come from an origin of their own, as from the Hub's CDN: whatever may not leave the Hub, a token
        # above all, shows when it does.
        self._hub_server, self._storage_server = _Server(self), _Server(self)
        self.url, self.storage_url = self._hub_server.url, self._storage_server.url

    def __enter__(self) -> 'LoopbackHub':
        for server in (self._hub_server, self._storage_server):
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.set()
        for server in (self._hub_server, self._storage_server):
            server.shutdown()
            server.server_close()

    def inject(self, fault: Fault) -> Fault:
        """Have the server misbehave from now on; of several faults, the first that strikes a request is applied.

        Args:
            fault: What to do to which requests. It is copied, so that it can be used for many tests.

        Returns:
            The copy in force, which counts its hits.
        """
        self._faults.append(replace(fault))
        return self._faults[-1]

    def reset(self) -> None:
        """Forget the repos, uploads, requests and faults."""
        with self._lock:
            for memory in (self.repos, self.uploads, self.requests, self._faults):
                memory.clear()

    def clear_faults(self) -> None:
        """Behave again."""
        self._faults.clear()

    def env(self, cache_dir: str | Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """Make the environment of a client that knows this Hub and no other.

        Args:
            cache_dir: Home of everything that the client and ``torch.hub`` store.
            token: The token that the client is logged in with.
            offline: Whether the client must do without the network.

        Returns:
            This process's environment without its proxies, tokens and Hugging Face settings.
        """
        foreign = re.compile(r'HF_|HUGGING|TRANSFORMERS_|.*_PROXY$', re.IGNORECASE)
        env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        env |= {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(cache_dir),
            'HF_HUB_CACHE': str(Path(cache_dir, 'hub')),
            'HF_HUB_DISABLE_PROGRESS_BARS': '1',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_HUB_DISABLE_XET': '1',
            'HF_HUB_OFFLINE': str(int(offline)),
            'TORCH_HOME': str(Path(cache_dir, 'torch')),
        }
        if token is not None:
            env['HF_TOKEN'] = token
        return env

    def admit(self, method: str, path: str) -> Fault:
        """Note a request, and find the fault to apply to it, if only the one that does nothing."""
        with self._lock:
            self.requests.append((method, path))
            if len(self.requests) > self._request_limit:
                # No client retries this status.
                return Fault(status=508)
            return next((fault for fault in self._faults if fault.strikes(method, path)), Fault())

    def answer(self, request: Request, fault: Fault) -> Response:
        """Answer a request, or fail it in the way of the fault."""
        self._closing.wait(fault.delay)
        try:
            if fault.status is not None:
                raise HubError(fault.status, 'Refused by a fault that a test injected', headers=fault.headers)
            with self._lock:
                return dispatch(self, request)
        except HubError as error:
            headers = {'X-Error-Message': str(error).encode('ascii', 'replace').decode(), **error.headers}
            if error.code is not None:
                headers['X-Error-Code'] = error.code
            return json_response({'error': str(error)}, error.status, headers)
        except Exception:
            # Shown by the client as part of its own error; a 500 would only make it try again.
            return Response(traceback.format_exc().encode(), 501, {'Content-Type': 'text/plain'})


class _Server(ThreadingHTTPServer):
    """One origin of the Hub, on a free port of the loopback interface."""

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.hub = hub
        self.url = f'http://127.0.0.1:{self.server_port}'

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up is no error of the server's: tests kill clients, and clients time out.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Carries requests and answers over the wire, and does there what a fault asks for."""

    protocol_version = 'HTTP/1.1'
    # Otherwise an answer's body waits for the client to acknowledge its headers: 40 ms each.
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition('?')
        fault = hub.admit(self.command, unquote(path))
        if fault.drop:
            self.close_connection = True
            return
        if fault.no_resume:
            del self.headers['Range']
        sent = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        request = Request(
            self.command,
            path,
            dict(parse_qsl(query)),
            self.headers,
            _flip_bit(sent) if fault.corrupt else sent,
        )
        response = hub.answer(request, fault)
        if fault.then is not None:
            fault.then()
        body = _flip_bit(response.body) if fault.corrupt and not sent else response.body
        self.send_response(response.status)
        for name, value in {'Content-Length': str(len(body)), **response.headers, **fault.answer_headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:fault.cut_after])
        if fault.cut_after is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the log is ``LoopbackHub.requests``."""


def _flip_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes(byte ^ 1 for byte in body[middle:middle + 1]) + body[middle + 1:]
