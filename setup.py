"""Build the native kernels with the package, where there is a C compiler. All else is in ``pyproject.toml``.

They need neither Python's headers nor PyTorch's: a wheel that holds them fits every Python 3 on its platform. Without a
compiler, or with ``TIMM_DYACTS_NATIVE_BUILD=0``, the wheel is a pure one.
"""
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

OPS = Path(__file__).resolve().parent / 'timm_dyacts' / 'ops'


def load_builder():
    """Import ``native_build``, and not the package, which needs torch."""
    spec = importlib.util.spec_from_file_location('native_build', OPS / 'native_build.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native_build = load_builder()
WANTED = os.environ.get('TIMM_DYACTS_NATIVE_BUILD') != '0' and native_build.compiler() is not None


def build_libraries(folder: Path, levels) -> None:
    """Compile into a folder. A failure is told, and leaves out the kernels."""
    for level in levels:
        try:
            native_build.build(folder, level)
        except (OSError, RuntimeError) as e:
            print(f'timm_dyacts: no native kernels for {level}: {e}', file=sys.stderr)


class BuildPy(build_py):
    """Copies the package, and adds libraries for all levels of instructions. An editable installation compiles at its
    first use, as what has been edited is compiled anew there."""

    def run(self) -> None:
        super().run()
        if WANTED and not self.editable_mode:
            build_libraries(Path(self.build_lib, 'timm_dyacts', 'ops', 'native_libraries'), native_build.LEVELS)


class BdistWheel(bdist_wheel):
    """Names the platform, but no version of Python, of a wheel with libraries."""

    def get_tag(self) -> tuple[str, str, str]:
        return ('py3', 'none', super().get_tag()[2])


class WithLibraries(Distribution):
    """Has libraries, if none that Python imports."""

    def has_ext_modules(self) -> bool:
        return WANTED


setup(
    distclass=WithLibraries,
    cmdclass=dict(build_py=BuildPy, **(dict(bdist_wheel=BdistWheel) if WANTED else {})),
)
