"""Requests and answers."""
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .repos import Blob, HubError

__all__ = ['Request', 'Response', 'content_response', 'json_response', 'refuse_token']


@dataclass(frozen=True)
class Request:
    """A request as the routes see it."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise HubError(400, f"The request's body is not JSON: {error}") from None

    def flag(self, name: str) -> bool:
        return self.query.get(name, '').lower() in ('1', 'true')


@dataclass(frozen=True)
class Response:
    """An answer as the routes give it."""

    body: bytes = b''
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(data).encode(), status, {'Content-Type': 'application/json', **(headers or {})})


def content_response(request: Request, blob: Blob, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a file or, where the request has a ``Range``, with the part of it."""
    headers = {'Accept-Ranges': 'bytes', 'ETag': f'"{blob.etag}"', **(headers or {})}
    size = len(blob.content)
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('Range', ''))
    if wanted is None:
        return Response(blob.content, headers=headers)
    start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
    if start >= stop:
        raise HubError(416, 'Requested range not satisfiable', headers={'Content-Range': f'bytes */{size}'})
    headers['Content-Range'] = f'bytes {start}-{stop - 1}/{size}'
    return Response(blob.content[start:stop], 206, headers)


def refuse_token(request: Request) -> None:
    """Refuse a request that brings the token along."""
    # The storage's URLs are signed. It takes no second authorization, and a token must not reach it.
    if 'Authorization' in request.headers:
        raise HubError(400, 'Only one auth mechanism allowed')
