"""Help for whoever misspelt a name."""
import difflib
from collections.abc import Iterable

__all__ = ['close_names']


def close_names(name: object, known: Iterable[str], count: int = 3) -> str:
    """Give the end of an error message that names what was probably meant, empty if nothing is close.

    Args:
        name: What was asked for.
        known: What there is.
        count: Most names to give.

    Returns:
        For example ``' Close names: resnet18, resnet34.'``, with a space in front.
    """
    close = difflib.get_close_matches(str(name), list(known), n=count)
    return f' Close names: {", ".join(close)}.' if close else ''
