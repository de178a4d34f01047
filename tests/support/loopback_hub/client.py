"""Python processes that are clients of a Hub."""
import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ['Client', 'ClientError', 'run_python']


def run_python(code: str, env: Mapping[str, str], *args: str, timeout: float = 120.0) -> subprocess.CompletedProcess:
    """Run a piece of Python in a fresh interpreter.

    Args:
        code: Program text; common indentation is removed.
        env: Complete environment of the process, as made by ``LoopbackHub.env``.
        *args: What the program finds in ``sys.argv[1:]``.
        timeout: Seconds after which the process is killed.

    Returns:
        The finished process, with ``stdout`` and ``stderr`` as text.

    Raises:
        AssertionError: The program failed or ran out of time; the message holds all that it printed.
    """
    code = textwrap.dedent(code)
    command = [sys.executable, '-c', code, *args]
    failure = None
    try:
        process = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        if process.returncode != 0:
            failure = f'exited with status {process.returncode}'
    except subprocess.TimeoutExpired as error:
        process = error
        failure = f'was killed after {timeout} s'
    stdout, stderr = ((output or b'').decode() for output in (process.stdout, process.stderr))
    if failure is not None:
        raise AssertionError(f'Python {failure}\n--- code\n{code}\n--- stdout\n{stdout}\n--- stderr\n{stderr}')
    return subprocess.CompletedProcess(command, 0, stdout, stderr)


class ClientError(Exception):
    """An exception of a ``Client``, as text: what a user sees."""


class Client:
    """A Python process that stays, for many small questions: starting one takes seconds. A context manager.

    Args:
        env: Complete environment of the process, as made by ``LoopbackHub.env``.
        setup: Program text that runs first; common indentation is removed.
        log: Where the process's stderr goes.
    """

    _SERVE = textwrap.dedent("""
        import json, sys, traceback
        namespace, answers = {}, sys.stdout
        sys.stdout = sys.stderr
        exec(sys.argv[1], namespace)
        for line in sys.stdin:
            try:
                answer = json.dumps(dict(value=eval(json.loads(line), namespace)))
            except Exception:
                answer = json.dumps(dict(error=traceback.format_exc()))
            print(answer, file=answers, flush=True)
    """)

    def __init__(self, env: Mapping[str, str], setup: str, log: Path) -> None:
        self.log = log
        with open(log, 'w') as stderr:
            self._process = subprocess.Popen(
                [sys.executable, '-c', self._SERVE, textwrap.dedent(setup)],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def __enter__(self) -> 'Client':
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, expression: str) -> Any:
        """Evaluate an expression whose value is JSON.

        Raises:
            ClientError: It raised; the message is the whole traceback.
        """
        self._process.stdin.write(json.dumps(expression) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f'The client has ended.\n{self.log.read_text()}')
        answer = json.loads(line)
        if 'error' in answer:
            raise ClientError(answer['error'])
        return answer['value']
