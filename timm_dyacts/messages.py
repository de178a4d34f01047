"""Messages of one line, whatever they quote."""
__all__ = ['one_line']


def one_line(message: object) -> str:
    """Give a message in one line: names of files, and errors of libraries, may hold line breaks and escape sequences.

    Args:
        message: An error, or text.
    """
    words = ' '.join(str(message).split())
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in words)
