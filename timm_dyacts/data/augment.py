"""The names of timm's augmentation policies."""
import re

from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

__all__ = ['check_auto_augment']


def check_auto_augment(name: str | None) -> None:
    """Raise ``ValueError`` for a policy (``--aa``) that timm does not know, or cannot read.

    timm reads it as it builds the transforms, and says no more than what went wrong inside.
    """
    if not name:
        return
    create = auto_augment_transform
    if name.startswith('rand'):
        create = rand_augment_transform
    elif name.startswith('augmix'):
        create = augment_and_mix_transform
    try:
        for part in name.split('-')[1:]:
            if not re.fullmatch(r'[a-z]+\d+(\.\d+)?|t\w+', part) or part == 'w0':  # which timm passes over
                raise ValueError(f'{part!r} is none of its parts')
        create(name, dict(translate_const=100, img_mean=(124, 116, 104)))
    except Exception as e:  # an assertion, a wrong number, an index: whatever its parser runs into
        raise ValueError(
            f"aa (--aa) must be 'original', 'originalr', 'v0', 'v0r' or '3a' (with '-mstd0.5' or the like), "
            f"'rand-m9-n2-mstd0.5-inc1' or 'augmix-m5-w4-d2' (with any of these parts), got {name!r} "
            f'({e or type(e).__name__}).') from None
