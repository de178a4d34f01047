"""Tests of what needs a newer timm than the rest."""
import pytest
import timm
from packaging.version import Version

__all__ = ['needs_timm']


def needs_timm(least: str) -> pytest.MarkDecorator:
    """Skip a test where timm is older."""
    return pytest.mark.skipif(Version(timm.__version__) < Version(least), reason=f'needs timm {least}')
