"""Image folders made of collections of pictures."""
import numpy as np
import pytest
from PIL import Image

from timm_dyacts.cli import main
from timm_dyacts.data import class_names, create_dataset
from timm_dyacts.data.pictures import COLLECTIONS, Collection, make_image_folder

COLLECTION = Collection(
    'some-pictures', 'usr/share/some', dict(cats=('animals/cats',), cars=('cars', 'trucks')), excluded=('cars/signs',))


def write(path, seed, size=(40, 30), mode='RGBA'):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)


@pytest.fixture
def root(tmp_path):
    """A system with the package installed: 41 pictures, one of them excluded and two of the same content."""
    root = tmp_path / 'system'
    pictures = root / COLLECTION.root
    for i in range(20):
        write(pictures / 'animals' / 'cats' / 'small' / f'{i}.png', i)
    for i in range(9):
        write(pictures / 'cars' / f'{i}.png', 100 + i, mode='RGB')
        write(pictures / 'trucks' / f'{i}.png', 200 + i, size=(300, 100))
    write(pictures / 'cars' / 'signs' / 'stop.png', 300)
    write(pictures / 'trucks' / 'copy.png', 200, size=(300, 100))
    (pictures / 'cars' / 'link.png').symlink_to(pictures / 'cars' / '0.png')
    return root


def test_an_image_folder(root, tmp_path):
    counts = make_image_folder(COLLECTION, root, tmp_path / 'out')
    assert sum(counts['train'].values()) + sum(counts['validation'].values()) == 38
    for split, of_class in counts.items():
        dataset = create_dataset('', root=str(tmp_path / 'out'), split=split)
        assert len(dataset) == sum(of_class.values()) and class_names(dataset) == ['cars', 'cats']
    files = sorted((tmp_path / 'out').rglob('*.png'))
    assert len(files) == 38 and not any('stop' in path.name or 'link' in path.name for path in files)
    for path in files:
        image = Image.open(path)
        assert image.mode == 'RGB' and image.size == ((192, 64) if 'trucks' in path.name else (40, 30))


def test_transparent_pictures_lie_on_white(root, tmp_path):
    Image.new('RGBA', (8, 8), (255, 0, 0, 0)).save(root / COLLECTION.root / 'cars' / 'glass.png')
    make_image_folder(COLLECTION, root, tmp_path / 'out')
    path, = (tmp_path / 'out').rglob('*glass.png')
    assert Image.open(path).getcolors() == [(64, (255, 255, 255))]


def test_the_split_follows_from_the_path(root, tmp_path):
    """Also if the folder of the pictures itself is given, and whatever lies beside a picture."""
    make_image_folder(COLLECTION, root, tmp_path / 'a')
    (root / COLLECTION.root / 'cars' / '3.png').unlink()
    make_image_folder(COLLECTION, root / COLLECTION.root, tmp_path / 'b')
    a, b = ({path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob('*.png')} for name in 'ab')
    assert len(a - b) == 1 and b < a


def test_nothing_is_half_made(root, tmp_path):
    (root / COLLECTION.root / 'trucks' / 'broken.png').write_bytes(b'no picture')
    with pytest.raises(OSError):
        make_image_folder(COLLECTION, root, tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['system']


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(source='missing'), FileNotFoundError, 'source .--source. must be the folder that some-pictures is installed'),
    (dict(output='system'), FileExistsError, 'output .--output. must not exist yet'),
    (dict(max_size=0), ValueError, 'max_size .--max-size. must be at least 1, got 0'),
    (dict(validation_share=1.0), ValueError, 'between 0 and 1, got 1.0'),
])
def test_bad_input(root, tmp_path, kwargs, error, words):
    source, output = tmp_path / kwargs.pop('source', 'system'), tmp_path / kwargs.pop('output', 'out')
    with pytest.raises(error, match=words):
        make_image_folder(COLLECTION, source, output, **kwargs)


def test_the_command(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(COLLECTIONS, 'some', COLLECTION)
    main(['demo', 'pictures', 'some', '--source', str(root), '--output', str(tmp_path / 'out'), '--max-size', '16'])
    train, validation = capsys.readouterr().out.splitlines()
    assert train.startswith('train: ') and 'pictures (cats ' in train and validation.startswith('validation: ')
    with pytest.raises(SystemExit, match='must not exist yet'):
        main(['demo', 'pictures', 'some', '--source', str(root), '--output', str(tmp_path / 'out')])
