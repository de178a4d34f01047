"""Compile the native kernels.

Pure Python without torch, because an installation calls it too (``setup.py``), before there is any other module.

The C sources need a compiler that knows the options of gcc, which clang does, and nothing else: neither PyTorch's nor
Python's headers. So a library fits every version of both, and a wheel with libraries is a ``py3-none-<platform>`` one.
For each level of instructions there is a library of its own, and the loader picks one as PyTorch picks its own kernels.
``target_clones`` would put all levels into one file; but it needs a C library with indirect functions, which musl and
macOS lack, has other levels in other compilers, and does not let tests choose.
"""
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ['LEVELS', 'build', 'compiler', 'library_name', 'sources']

_HERE = Path(__file__).resolve().parent
# The options of each level, by the names that ``torch.backends.cpu.get_cpu_capability`` has for what it asks of a CPU.
# Elsewhere than on x86-64, the compiler's own level is the only one: arm64 has NEON in it.
LEVELS = {
    'AVX512': ('-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mavx2', '-mfma', '-mprefer-vector-width=512'),
    'AVX2': ('-mavx2', '-mfma'),
    'DEFAULT': (),
} if platform.machine().lower() in ('x86_64', 'amd64') else {'DEFAULT': ()}

# Not -ffast-math: NaN and infinities pass through as through the references. Products and sums are not contracted to
# single operations, except where the code says so: the output is that of the references to the last bit.
_OPTIONS = ('-std=c11', '-O3', '-fPIC', '-fopenmp-simd', '-fno-math-errno', '-fno-trapping-math', '-ffp-contract=off',
            '-fvisibility=hidden', '-pthread')
_DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def sources() -> list[Path]:
    """Give the files that are compiled."""
    return sorted(_HERE.glob('*/native.c'))


def _headers() -> list[Path]:
    return sorted(_HERE.glob('**/native*.h'))


def compiler() -> list[str] | None:
    """Find the C compiler: the command in ``CC``, else ``cc``, ``gcc`` or ``clang``; None if there is none."""
    command = shlex.split(os.environ.get('CC', ''))
    for candidate in [command] if command else [['cc'], ['gcc'], ['clang']]:
        if shutil.which(candidate[0]):
            return candidate
    return None


def library_name(level: str) -> str:
    """Name the library of a level after all that goes into it, so that a stale one is never taken for it."""
    digest = hashlib.sha256(repr((_OPTIONS, LEVELS[level], sys.platform, platform.machine())).encode())
    for path in [*_headers(), *sources()]:
        digest.update(f'{path.relative_to(_HERE).as_posix()}\n'.encode())
        digest.update(path.read_bytes())
    return f'native-{level.lower()}-{digest.hexdigest()[:16]}.so'


def build(folder: str | os.PathLike[str], level: str) -> Path:
    """Compile the library of a level into a folder, which is made where there is none.

    It appears there whole, and any number of processes may do this at once.

    Args:
        folder: Where it goes.
        level: A key of ``LEVELS``.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If there is no compiler.
        RuntimeError: If the compiler fails; with the end of what it says.
        OSError: If the folder cannot be written to.
    """
    command = compiler()
    if command is None:
        raise FileNotFoundError('no C compiler (cc, gcc, clang, or the command in CC)')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / library_name(level)
    options = [*command, *_OPTIONS, *LEVELS[level], '-I', str(_HERE)]
    with tempfile.TemporaryDirectory(prefix='.native-', dir=folder) as beside:
        tasks = []
        for source in sources():
            for dtype in _DTYPES:
                target = Path(beside, f'{source.parent.name}-{dtype}.o')
                tasks.append((target, [*options, f'-DDTYPE_{dtype}', '-c', str(source), '-o', str(target)]))
        with ThreadPoolExecutor(min(len(tasks), os.cpu_count() or 1)) as pool:
            list(pool.map(_run, [arguments for _, arguments in tasks]))
        whole = Path(beside, path.name)
        _run([*command, '-shared', '-pthread', *(str(target) for target, _ in tasks), '-o', str(whole), '-lm'])
        os.replace(whole, path)
    return path


def _run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace')
    if done.returncode:
        raise RuntimeError(f'{shlex.join(arguments)} failed with status {done.returncode}:\n{done.stderr[-2000:]}')
