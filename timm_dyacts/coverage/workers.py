"""Processes for cases: one that takes too long is killed, one that dies costs the case that it was at."""
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from .cases import COLUMNS, Row, measure

__all__ = ['DIED', 'run']

DIED = 'the process died'

Case = tuple[str, str, str]


def run(
        cases: Iterable[Case],
        workers: int,
        timeout: float,
        max_params: float,
        full_size: bool,
        threads: int | None,
) -> Iterator[Row]:
    """Give the rows of cases as they are done.

    Args:
        cases: Libraries, their architectures, and operations, those of one architecture together.
        workers: Number of processes.
        timeout: Seconds for one case.
        max_params: As for ``measure``.
        full_size: As for ``measure``.
        threads: Threads of each process, torch's default for ``None``.
    """
    architectures: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        architectures.setdefault(case[:2], []).append(case)
    todo = deque(architectures.values())
    team = [_Worker(timeout, max_params, full_size, threads) for _ in range(min(workers, len(todo)))]
    try:
        while True:
            for worker in team:
                if not worker.cases and todo:
                    worker.assign(todo.popleft())
            busy = [worker for worker in team if worker.cases]
            if not busy:
                return
            soonest = min(worker.deadline for worker in busy)
            wait([worker.connection for worker in busy], max(0, soonest - time.monotonic()))
            for worker in busy:
                row = worker.collect()
                if row:
                    yield row
    finally:
        for worker in team:
            worker.stop()


def _serve(connection: Connection, max_params: float, full_size: bool, threads: int | None) -> None:
    """Receive cases and send rows, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    with suppress(OSError):  # where memory gets short, Linux is to choose a worker, not the parent
        Path('/proc/self/oom_score_adj').write_text('1000')
    if threads:
        torch.set_num_threads(threads)
    connection.send('ready')
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            connection.send(measure(*connection.recv(), max_params, full_size))


class _Worker:
    """A process for one case at a time, and the cases of the architecture that it is at."""

    def __init__(self, timeout: float, *settings: Any):
        self.timeout = timeout
        self.settings = settings
        self.cases: deque[Case] = deque()
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, *self.settings), daemon=True)
        self.process.start()
        theirs.close()
        if self.receive() != 'ready':
            raise RuntimeError(f'A worker could not start (exit code {self.process.exitcode}).')
        self.deadline = float('inf')

    def assign(self, cases: Iterable[Case]) -> None:
        self.cases.extend(cases)
        self.next()

    def next(self) -> None:
        if self.cases:
            with suppress(BrokenPipeError):  # a death that `collect` will see
                self.connection.send(self.cases[0])
            self.deadline = time.monotonic() + self.timeout

    def receive(self) -> Any:
        """Give what the process sent, ``None`` if it died."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return None

    def collect(self) -> Row | None:
        """Give the row of the current case if there is one now, and go on to the next case then."""
        if self.connection.poll():
            row = self.receive() or self.failure('error', f'{DIED} (exit code {self.process.exitcode})')
        elif time.monotonic() >= self.deadline:
            row = self.failure('timeout', f'more than {self.timeout:g} s')
        else:
            return None
        self.cases.popleft()
        if not self.process.is_alive():
            self.start()
        self.next()
        return row

    def failure(self, result: str, reason: str) -> Row:
        self.stop()
        library, name, operation = self.cases[0]
        return dict.fromkeys(COLUMNS, '') | dict(
            library=library, architecture=name, operation=operation, result=result, reason=reason)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
