"""The version of this package, and those of others that it supports."""
__all__ = ['SUPPORTED', '__version__', 'needs', 'unsupported']

__version__ = '0.1.0'

SUPPORTED = dict(torch='>=2.4', timm='>=1.0.16,<2', huggingface_hub='>=0.25')


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


def needs(what: str, package: str, least: str, installed: str) -> ImportError:
    """Give the error for a single feature that needs a newer release of another package than the rest does.

    Args:
        what: The feature, as its user calls it.
        package: Name of the package.
        least: The oldest version that has what the feature is built on.
        installed: The version that is there.
    """
    return ImportError(f'{what} needs {package}>={least}, got {package} {installed}. The rest works without.')
