"""Send a folder to a branch in one commit: all of it or nothing, and never over somebody else's work."""
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelInfo

from ..run_folder import CARD, PICKLED_WEIGHTS
from .branch import Branch, Published, differing, is_empty, names
from .errors import HubError

__all__ = ['upload']


def upload(
        branch: Branch,
        folder: Path,
        architecture: str,
        message: str,
        *,
        private: bool,
        create_pr: bool,
        overwrite: bool,
) -> tuple[str, str]:
    """Send the files of a folder in one commit, and remove what an earlier publication left.

    Args:
        branch: Where to.
        folder: What.
        architecture: The model that it is.
        message: Title of the commit.
        private: Create a private repo.
        create_pr: Open a pull request instead.
        overwrite: Also replace what was not published from here.

    Returns:
        The SHA of the commit, and its page or that of its pull request.

    Raises:
        HubError: Not all of it is there. The message says what is.
    """
    main = branch.open(private)
    head = branch.find_tip() or main
    published = branch.read_published(head)
    if not (create_pr or overwrite):
        _check_ours(branch, head, published, architecture)
    if head is main and branch.revision:
        branch.create(main)
    sent = {path.name for path in folder.iterdir()}
    stale = (published.hashes.keys() | {PICKLED_WEIGHTS}) & names(head) - sent
    sha, url = _commit(branch, folder, message, stale, head, create_pr)
    tip = branch.look(sha, f"The Hub took the commit {sha} to '{branch.repo_id}', but it could not be checked")
    if not create_pr and differing(tip, folder):
        # The Hub has no hash of small files to compare them with, so damage on the way goes unnoticed. Mend it.
        with suppress(HubError):
            sha, url = _commit(branch, folder, message, (), tip, create_pr)
            tip = branch.look(sha)
    if different := differing(tip, folder):
        raise HubError(
            f"'{branch.repo_id}' is damaged: in the commit {sha} these files are not what was sent: "
            f'{", ".join(different)}. Publish again with overwrite (--overwrite).')
    return sha, url


def _check_ours(branch: Branch, head: ModelInfo, published: Published, architecture: str) -> None:
    """Refuse to replace what was not published from here."""
    if is_empty(head):
        return
    card = published.hashes.get(CARD)
    if card is None:
        reason = 'what is there was not published from timm_dyacts'
    elif published.config['architecture'] != architecture:
        reason = f"there is a '{published.config['architecture']}', and this is a '{architecture}'"
    elif published.card_sha256 not in (card, None):
        reason = 'its card was edited by hand'
    else:
        return
    raise HubError(
        f"Did not publish '{branch.repo_id}': {reason}. Nothing was sent. To replace it: overwrite (--overwrite). To "
        f'propose it: create_pr (--create-pr).')


def _commit(
        branch: Branch,
        folder: Path,
        message: str,
        stale: Collection[str],
        head: ModelInfo,
        create_pr: bool,
) -> tuple[str, str]:
    """Put the files of a folder on top of ``head``, take the stale ones away, and find out what became of it."""
    operations = [
        *(CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir())),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]
    try:
        return branch.commit(operations, message, head, create_pr)
    except HubError as error:
        if create_pr:
            raise HubError(
                f'{error}\nThe branch is as it was. Before you do it again, see whether the pull request was opened '
                f'all the same: {branch.page}/discussions') from None
        return _find_commit(branch, folder, head, error)


def _find_commit(branch: Branch, folder: Path, head: ModelInfo, error: HubError) -> tuple[str, str]:
    """After an error: find the commit, if it was made and only the answer was lost."""
    try:
        tip = branch.look(branch.revision)
    except HubError:
        raise HubError(
            f'{error}\nIt could not be found out whether the commit was made. Publishing again does no harm.'
        ) from None
    if tip.sha == head.sha:
        state = 'there, with nothing of the model in it' if is_empty(head) else 'as it was'
        raise HubError(f'{error}\nThe repo is {state}.') from None
    if differing(tip, folder):
        raise HubError(f'{error}\nSomebody else changed the repo meanwhile; of this nothing is there.') from None
    return tip.sha, f'{branch.page}/commit/{tip.sha}'
