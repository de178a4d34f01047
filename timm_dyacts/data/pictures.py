"""Image folders of real pictures that need no data set to be downloaded: package collections of Debian.

``openclipart-png`` holds thousands of drawings (public domain), ``tuxpaint-stamps-default`` some hundred cut-out
photographs and drawings (the licence of each is in the package). Both lie in folders by subject, which become classes.
Install the package (``apt-get install openclipart-png``), or unpack its file (``dpkg-deb -x <file>.deb <folder>``).
"""
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

__all__ = ['COLLECTIONS', 'Collection', 'make_image_folder']


@dataclass(frozen=True)
class Collection:
    """A package of pictures.

    Attributes:
        package: Its name in Debian.
        root: Where its pictures lie in the file system that it is installed or unpacked into.
        classes: The folders below that make each class.
        excluded: Folders below that are left out.
    """
    package: str
    root: str
    classes: Mapping[str, tuple[str, ...]]
    excluded: tuple[str, ...] = ()


COLLECTIONS = dict(
    openclipart=Collection(
        'openclipart-png',
        'usr/share/openclipart/png',
        dict(
            animals=('animals',),
            buildings=('buildings',),
            flags=('signs_and_symbols/flags',),
            food=('food',),
            hardware=('computer/hardware',),
            music=('recreation/music',),
            office=('office',),
            people=('people',),
            plants=('plants',),
            sports=('recreation/sports',),
            tools=('tools',),
            vehicles=('transportation',),
        ),
        excluded=('transportation/aiga-symbols', 'transportation/roadsigns'),
    ),
    tuxpaint=Collection(
        'tuxpaint-stamps-default',
        'usr/share/tuxpaint/stamps',
        dict(
            animals=('animals',),
            food=('food',),
            household=('household', 'clothes', 'hobbies'),
            plants=('plants',),
            vehicles=('vehicles',),
        ),
    ),
)


def make_image_folder(
        collection: Collection,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        max_size: int = 192,
        validation_share: float = 0.3,
) -> dict[str, dict[str, int]]:
    """Make an image folder, ``<output>/<split>/<class>/<picture>.png``, of a collection.

    Pictures are put on white and made smaller where they are larger than ``max_size``. Which split a picture belongs to
    follows from a hash of its path, so it is the same everywhere. Of pictures with the same content the first is taken.

    Args:
        collection: What to make it of.
        source: The folder that the package is installed or unpacked into (``/``), or that of its pictures itself.
        output: Where to make it. Must not exist. It is there whole or not at all.
        max_size: Largest width and height in pixels.
        validation_share: Share of the pictures for the split ``validation``; the others are ``train``.

    Returns:
        The number of pictures by split and class.

    Raises:
        FileNotFoundError: There are no such pictures in ``source``.
        FileExistsError: ``output`` exists.
        ValueError: A number is out of range.
    """
    if max_size < 1:
        raise ValueError(f'max_size (--max-size) must be at least 1, got {max_size}.')
    if not 0 < validation_share < 1:
        raise ValueError(f'validation_share (--validation-share) must be between 0 and 1, got {validation_share}.')
    places = Path(source, collection.root), Path(source)
    root = next((path for path in places if _has_classes(collection, path)), None)
    if root is None:
        raise FileNotFoundError(
            f'source (--source) must be the folder that {collection.package} is installed or unpacked into, got '
            f'{os.fspath(source)!r}, which has no {collection.root}.')
    output = Path(output)
    if output.exists():
        raise FileExistsError(f'output (--output) must not exist yet, got {os.fspath(output)!r}.')
    beside = output.with_name(f'.{output.name}.making')
    shutil.rmtree(beside, ignore_errors=True)  # a killed process may have left it
    counts = {split: dict.fromkeys(collection.classes, 0) for split in ('train', 'validation')}
    seen = set()
    try:
        for name, path in _pictures(collection, root):
            image = _on_white(path, max_size)
            content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
            if content in seen:
                continue
            seen.add(content)
            relative = path.relative_to(root).with_suffix('')
            split = 'validation' if _draw(relative.as_posix()) < validation_share else 'train'
            folder = beside / split / name
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{"__".join(relative.parts)}.png')
            counts[split][name] += 1
        beside.rename(output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return counts


def _has_classes(collection: Collection, root: Path) -> bool:
    return all((root / folder).is_dir() for folders in collection.classes.values() for folder in folders)


def _pictures(collection: Collection, root: Path) -> Iterator[tuple[str, Path]]:
    """The class and path of each picture, in the same order everywhere."""
    excluded = [root / folder for folder in collection.excluded]
    for name, folders in collection.classes.items():
        for folder in folders:
            for path in sorted((root / folder).rglob('*.png')):
                if not path.is_symlink() and not any(path.is_relative_to(other) for other in excluded):
                    yield name, path


def _on_white(path: Path, max_size: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # some flags have 169 megapixels
        with Image.open(path) as file:
            image = file.convert('RGBA')
    image.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
    background = Image.new('RGBA', image.size, 'white')
    return Image.alpha_composite(background, image).convert('RGB')


def _draw(name: str) -> float:
    """A number from 0 to 1 that follows from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], 'big') / 2 ** 64
