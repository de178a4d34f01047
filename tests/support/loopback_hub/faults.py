"""Misbehaviour on demand."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

__all__ = ['Fault']


@dataclass
class Fault:
    """A misbehaviour of the server, applied to the requests that match.

    Args:
        path: Shell-style pattern of the path, unquoted and without query; ``*`` also crosses slashes.
        method: Pattern of the method.
        skip: How many matching requests pass unharmed first.
        times: How many are harmed after that; ``None`` for all.
        status: Answer with this status, and do nothing else.
        headers: Headers added to the answer, say ``{"Retry-After": "0"}``.
        delay: Seconds to wait before the request has its effect and is answered.
        drop: Hang up before the request is read, so that it has no effect.
        cut_after: Hang up after this many bytes of the answer's body; the request has had its effect.
        corrupt: Flip one bit of the body in transit, of the request's if it has one, else of the answer's.
        answer_headers: Headers in place of those of an answer that is given as always.
        no_resume: Ignore that only the rest of a file is asked for.
        then: Called when the request has had its effect, before the answer leaves.

    Attributes:
        hits: How many requests were harmed: a test that injects a fault checks that it was met.
    """

    path: str = '*'
    method: str = '*'
    skip: int = 0
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    cut_after: int | None = None
    corrupt: bool = False
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    no_resume: bool = False
    then: Callable[[], object] | None = None
    hits: int = field(default=0, init=False)

    def strikes(self, method: str, path: str) -> bool:
        """Count a request, and say whether it is one to be harmed."""
        if self.hits == self.times or not (fnmatchcase(method, self.method) and fnmatchcase(path, self.path)):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True
