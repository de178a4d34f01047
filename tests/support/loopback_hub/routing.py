"""Which function answers which request."""
import re
from collections.abc import Callable
from urllib.parse import unquote

from .repos import HubError
from .store import Store
from .wire import Request, Response

__all__ = ['dispatch', 'route']

_ROUTES: list[tuple[str, re.Pattern, Callable[..., Response]]] = []


def route(method: str, template: str) -> Callable:
    """Have a function answer a method and path; the fields of the template become its arguments, unquoted."""
    fields = {'repo': r'(?P<repo>[^/]+(?:/[^/]+)?)', 'path': r'(?P<path>.+)'}
    parts = re.split(r'\{(\w+)\}', template)
    parts[::2] = [re.escape(part) for part in parts[::2]]
    parts[1::2] = [fields.get(name, f'(?P<{name}>[^/]+)') for name in parts[1::2]]
    pattern = re.compile(''.join(parts))

    def register(answer: Callable[..., Response]) -> Callable[..., Response]:
        _ROUTES.append((method, pattern, answer))
        return answer

    return register


def dispatch(hub: Store, request: Request) -> Response:
    """Have a request answered."""
    method = 'GET' if request.method == 'HEAD' else request.method
    for route_method, pattern, answer in _ROUTES:
        if method == route_method and (match := pattern.fullmatch(request.path)):
            return answer(hub, request, **{name: unquote(value) for name, value in match.groupdict().items()})
    raise HubError(404, f'LoopbackHub has no endpoint {request.method} {request.path}')
