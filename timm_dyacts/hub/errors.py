"""What can go wrong between here and the Hub, said so that one knows what to do."""
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import HfApi, get_token

from ..messages import one_line
from ..version import unsupported

try:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
except ImportError as e:
    raise unsupported('huggingface_hub', huggingface_hub.__version__, f'its errors ({e})') from e

__all__ = [
    'ChecksumError',
    'HubError',
    'MissingFileError',
    'check_token',
    'explained',
    'shown',
    'summarize',
]


class HubError(OSError):
    """Something could not be had from the Hub, or not be put there. The message names the repo and the remedy."""


class ChecksumError(HubError):
    """A file is not the one that was published."""


class MissingFileError(HubError):
    """The repo is there, the file is not."""


def check_token(token: str | None) -> str | None:
    """Take white space off a token and refuse an impossible one, which the HTTP library would quote in its error."""
    if token is None:
        return None
    token = token.strip()
    if not token or not all('!' <= char <= '~' for char in token):
        raise ValueError(
            'token must be a token of the Hub, as from https://huggingface.co/settings/tokens; got something else, '
            'which is not repeated here.')
    return token


@contextmanager
def explained(what: str, repo_id: str, token: str | None, missing: str = '') -> Iterator[None]:
    """Turn what the client raises into a ``HubError`` with a remedy.

    The errors of the client have no base in common: they come from its HTTP library, from the file system, and from
    what it finds in an answer. They quote the server, so the token is taken out.

    Args:
        what: What could not be done, the beginning of the message.
        repo_id: The repo.
        token: The token that was used.
        missing: The remedy if a file is missing.
    """
    try:
        yield
    except Exception as e:
        shown = e.__cause__ if isinstance(e, LocalEntryNotFoundError) and e.__cause__ else e
        message = f'{what}: {type(shown).__name__}: {summarize(shown)}\n{_remedy(e, repo_id, missing)}'
        for secret in {token, get_token()} - {None}:
            message = message.replace(secret, '<token>')
        error = (MissingFileError if _lacks_file(e) else HubError)(message)
    else:
        return
    raise error from None  # the cause quotes the server too


def _remedy(error: Exception, repo_id: str, missing: str) -> str:
    causes = list(_chain(error))
    status = next((e.response.status_code for e in causes if getattr(e, 'response', None) is not None), None)
    page = f'{HfApi().endpoint}/{repo_id}'

    def is_a(kind: type[Exception]) -> bool:
        return any(isinstance(e, kind) for e in causes)

    if is_a(OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set. Do it once with the variable unset; what was loaded stays in the cache.'
    if is_a(GatedRepoError):
        return f'Ask for access at {page} and log in as the one who has it: hf auth login, or HF_TOKEN.'
    if is_a(RevisionNotFoundError):
        return f'Give a branch, tag or commit that {page} lists.'
    if any(_lacks_file(e) for e in causes):
        return missing
    if is_a(RepositoryNotFoundError):
        return (
            'Check the spelling. A private repo is shown only to those who have access: log in with `hf auth login`, '
            'set HF_TOKEN, or pass token.')
    if is_a(HFValidationError):
        return "Give the repo as 'user/name'."
    if status == 401:
        return 'The token is missing or no longer valid. Log in with `hf auth login`, set HF_TOKEN, or pass token.'
    if status == 403:
        return f'The token may not do that. Use one with the rights for {page}.'
    if status in (409, 412):
        return 'Somebody else changed the repo at the same moment. Look at what is there, then do it again.'
    if status == 429:
        return 'The Hub limits how often one may ask. Wait some minutes and do it again; with a token one may ask more.'
    if status is not None and status >= 500:
        return 'The Hub has a problem of its own (https://status.huggingface.co). Do it again later.'
    if status is not None:
        return 'The Hub does not take the request as it is; see its words above.'
    return (
        'If there is no network, or it broke off, do it again later. To use a mirror of the Hub, set the environment '
        'variable HF_ENDPOINT to its address.')


def _lacks_file(error: BaseException) -> bool:
    """Whether the Hub said that the repo does not have the file, as opposed to the cache, while the Hub is away."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def summarize(error: BaseException) -> str:
    """Give the beginning of an error's message, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith('For more information check: ')]
    summary = one_line(' '.join(lines[:2])) or type(error).__name__
    return summary if len(summary) <= 400 else f'{summary[:400]} ...'


def shown(value: object) -> str:
    """Give a value from elsewhere for a message: short, in one line."""
    return one_line(reprlib.repr(value))
