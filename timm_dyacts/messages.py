"""Messages of one line, whatever they quote."""
__all__ = ['one_line']

_LONGEST = 2000


def one_line(message: object) -> str:
    """Give a message as one line of at most 2,000 characters that a terminal only shows.

    A message quotes what it got: names of files, of classes, values of a file from elsewhere. None of it may move the
    cursor, colour the screen or look like a line of its own.

    Args:
        message: An error, or text.
    """
    text = ' '.join(str(message).split())
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST // 2]} ... {text[5 - _LONGEST // 2:]}'
