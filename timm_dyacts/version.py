"""The version of this package, and those of others that it supports."""
__all__ = ['SUPPORTED', '__version__', 'unsupported']

__version__ = '0.1.0'

SUPPORTED = dict(torch='>=2.11', timm='>=1.0.31,<2', huggingface_hub='>=1.0')


def unsupported(package: str, installed: str, what: str) -> ImportError:
    """Give the error for a private part of another package that is not what this release knows.

    Args:
        package: Name of the package, a key of ``SUPPORTED``.
        installed: Its version.
        what: What was looked for.
    """
    return ImportError(
        f'{package} {installed} is not known to this release of timm_dyacts: it lacks {what}. timm_dyacts '
        f'{__version__} supports {package}{SUPPORTED[package]}.')
