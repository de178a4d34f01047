"""Image folders of every kind, through the real loaders and commands: a right result, or one line that says what is
wrong; and workers that die."""
import io
import os
import pickle
import random
import re
import signal
import sys
import tarfile

import numpy as np
import PIL
import pytest
import timm
import torch
from PIL import Image
from support.odd_images import huge_png, saved
from support.photos import write_photos
from support.small_run import assert_same_end, train_small
from timm.data.readers import reader_image_in_tar
from torchvision.datasets import ImageFolder

import timm_dyacts  # noqa: F401
from timm_dyacts.cli.predict import main as predict
from timm_dyacts.cli.train import main as train
from timm_dyacts.cli.validate import main as validate
from timm_dyacts.data import DataError, class_names, create_dataset
from timm_dyacts.data.errors import WorkerError
from timm_dyacts.data.identity import fingerprint
from timm_dyacts.data.images import INPUT_MODES, UnreadableImageError, read_image
from timm_dyacts.data.loaders import build_eval_loader, build_train_loader, image_mode
from timm_dyacts.data.resumable import BatchDataset, without_worker_trace
from timm_dyacts.data.streams import ImageStream
from timm_dyacts.training.checkpoint import save_checkpoint
from timm_dyacts.world import World

WORLD = World(torch.device('cpu'))
DATA_CONFIG = dict(
    input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, crop_mode='center', interpolation='bilinear')
MODES = ('1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'LAB', 'I', 'F', 'I;16')
FORMATS = ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM')
NAMES = ('plain', 'ünïcode 漢字', 'two\nlines', '\x1b[31mred\x1b[0m', "quote'\"", '--option',
         '\udcff no utf-8', 'a' * 200)


def one_line(text):
    """Whether a text is a single line that a terminal shows as it is."""
    return text.removesuffix('\n').isprintable()


def odd_content(draw):
    """Draw what is in a file."""
    kind = draw.choice(('image', 'image', 'damaged', 'noise', 'empty', 'huge', 'text'))
    if kind == 'noise':
        return draw.randbytes(draw.randrange(1, 300))
    if kind in ('empty', 'huge', 'text'):
        return dict(empty=b'', huge=huge_png(), text=b'<html>Not found</html>')[kind]
    size = draw.choice(((9, 7), (1, 1), (1, 200), (300, 1), (24, 24)))
    mode, exif = draw.choice(MODES), Image.Exif()
    exif[0x0112] = draw.randrange(10)
    image = Image.new(mode, size, draw.choice((0, 1)))
    while True:
        try:
            content = bytearray(saved(image, draw.choice(FORMATS), exif=exif).getvalue())
            break
        except (OSError, KeyError, ValueError):  # a format without this mode
            continue
    if kind == 'damaged':
        for _ in range(draw.choice((1, 3, 20))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        del content[draw.choice((len(content), draw.randrange(len(content)))):]
    return bytes(content)


def odd_folder(root, draw):
    """Draw an image folder of two classes; one image at least is good."""
    for name in ('a', 'b'):
        folder = root / f'{name}{draw.choice(NAMES)}'
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f'{number}{draw.choice(NAMES)}.png').write_bytes(odd_content(draw))
        Image.new('RGB', (8, 8)).save(folder / 'good.png')
        odd = draw.choice(('nothing', 'pipe', 'broken link', 'folder', 'empty folder'))
        if odd == 'pipe':
            os.mkfifo(folder / 'pipe.png')
        elif odd == 'broken link':
            (folder / 'link.png').symlink_to('nowhere')
        elif odd == 'folder':
            (folder / 'folder.png').mkdir()
        elif odd == 'empty folder':
            (folder / 'empty').mkdir()
    return root


def batches_of(dataset, is_training, **kwargs):
    if is_training:
        loader = build_train_loader(dataset, DATA_CONFIG, WORLD, 2, 0, 2, **kwargs)
        loader.set_position(0)
    else:
        loader = build_eval_loader(dataset, DATA_CONFIG, WORLD, 3, num_classes=2, **kwargs)
    return list(without_worker_trace(loader))


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
@pytest.mark.filterwarnings('ignore')
def test_odd_folders(tmp_path, name, tries, seed):
    outcomes = {'whole': 0, 'refused': 0}
    for number in range(tries(12)):
        draw = random.Random(f'{seed} {number}')
        root = odd_folder(tmp_path / str(number), draw)
        for on_bad_image in ('skip', 'error'):
            for is_training in (False, True):
                dataset = create_dataset(name, root=str(root))
                options = dict(on_bad_image=on_bad_image, workers=int(number % 10 == 0 and not name))
                try:
                    batches = batches_of(dataset, is_training, **options)
                except DataError as e:
                    outcomes['refused'] += 1
                    assert one_line(str(e)) and ('cannot be read' in str(e)), (number, str(e))
                    assert on_bad_image == 'error', (number, str(e))
                else:
                    outcomes['whole'] += 1
                    assert sum(len(labels) for _, labels in batches) >= 2
    print(outcomes)
    assert all(outcomes.values()), outcomes


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    save_checkpoint(timm.create_model('test_resnet', num_classes=2), folder)
    return f'local-dir:{folder}'


@pytest.mark.filterwarnings('ignore')
def test_predict_odd_folders(model, tmp_path, tries, seed, capfd):
    for number in range(tries(3)):
        root = odd_folder(tmp_path / str(number), random.Random(f'{seed} {number}'))
        predict(['-m', model, '-j', '0', '--img-size', '32', str(root), '--results-format', 'csv', '--results-file',
                 str(tmp_path / 'results.csv')])
        err = capfd.readouterr().err
        assert all(line.isprintable() for line in err.splitlines()), err
        (tmp_path / 'results.csv').read_bytes().decode()


# Modes whose files are refused; Pillow before 13 cannot read the TIFF files of YCbCr that it writes.
NO_RANGE = ('I', 'F', 'LAB', *(['YCbCr'] if int(PIL.__version__.split('.')[0]) < 13 else []))


def test_every_mode_becomes_every_mode_of_input():
    for name in MODES:
        image = Image.new(name, (4, 3))
        if name == 'P':  # nor the BMP files without a palette
            image.putpalette(list(range(256)) * 3)
        for file_format in FORMATS:
            try:
                file = saved(image, file_format)
            except (OSError, KeyError, ValueError):
                continue
            for mode in INPUT_MODES:
                try:
                    assert read_image(file, mode).mode == mode
                except UnreadableImageError as e:
                    assert name in NO_RANGE and one_line(str(e)), (name, file_format, mode)


@pytest.mark.parametrize('mode', ['nonsense', 'I;16', 'F', '1', 'LAB'])
def test_modes_that_are_no_input(mode):
    with pytest.raises(ValueError, match='--input-img-mode must be one of L, LA, RGB, YCbCr, HSV, RGBA, RGBX, CMYK'):
        image_mode(1, mode)


# Bounds


def test_an_elongated_image_does_not_take_all_memory(tmp_path):
    """Scaled to 16 pixels on its short side, 1 x 60000 has a million; to 512, 16 billion."""
    folder = tmp_path / 'a'
    folder.mkdir()
    Image.new('L', (1, 60_000)).save(folder / 'long.png')
    [(images, _)] = batches_of(create_dataset(root=str(tmp_path)), False)
    assert images.shape == (1, 3, 16, 16)
    loader = build_eval_loader(
        create_dataset(root=str(tmp_path)), DATA_CONFIG | dict(input_size=(3, 512, 512)), WORLD, 1,
        on_bad_image='error')
    with pytest.raises(DataError, match='1 x 60000 pixels would become too many where the short side'):
        list(loader)


def test_scans_without_end_are_refused():
    """Each scan of a progressive JPEG costs a pass over all pixels, and hardly any bytes."""
    content = saved(Image.new('L', (3000, 3000)), 'JPEG', progressive=True).getvalue()
    scan = content.rindex(b'\xff\xda')
    assert read_image(saved(Image.new('L', (300, 300)), 'JPEG', progressive=True), 'L').size == (300, 300)
    with pytest.raises(UnreadableImageError, match='scans of 3000 x 3000 pixels would take too long'):
        read_image(io.BytesIO(content[:scan] + content[scan:-2] * 600 + content[-2:]), 'L')


def test_no_other_program_is_started_for_an_image():
    with pytest.raises(UnreadableImageError, match='EPS, for which Pillow starts Ghostscript'):
        read_image(saved(Image.new('L', (3, 3)), 'EPS'), 'RGB')


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_links_to_a_folder_above(tmp_path, name):
    """timm follows links: two such in a folder would be followed for days."""
    write_photos(tmp_path / 'data')
    for number in range(3):
        (tmp_path / 'data' / 'train' / 'red' / f'loop{number}').symlink_to('..')
    with pytest.raises(ValueError, match=r'--data-dir\) must not hold a link to a folder above, got .*loop\d'):
        create_dataset(name, root=str(tmp_path / 'data'), split='train')


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    write_photos(tmp_path / 'data')
    (tmp_path / 'linked').mkdir()
    for name in ('red', 'blue'):
        (tmp_path / 'linked' / name).symlink_to(tmp_path / 'data' / 'train' / name)
    assert len(create_dataset(root=str(tmp_path / 'linked'))) == 16


# What cannot be opened


@pytest.mark.parametrize('options, message', [
    (['--dataset', 'torch/nonsense', '--data-dir', '.'], "'torch/nonsense' .*Unknown torchvision dataset nonsense"),
    (['--dataset', 'torch/cifar10', '--data-dir', '.'], r"'torch/cifar10' .*--dataset-download"),
    (['--dataset', 'wds/x', '--data-dir', '.'], 'it needs a package: pip install webdataset'),
    (['--dataset', 'hfds/x'], 'it needs a package: pip install datasets'),
    (['--dataset', 'hfids/x'], 'it needs a package: pip install datasets'),
    (['--dataset', 'tfds/x'], 'it needs a package: pip install tensorflow-datasets'),
    (['--data-dir', '{photos}', '--class-map', 'nowhere.txt'], r"--class-map\) must be a .txt or .pkl file.* 'nowhere"),
    (['--data-dir', '{photos}', '--class-map', '{photos}/train/red/0.png'], 'must be a .txt file with a'),
    (['--data-dir', '{photos}', '--class-map', '{code}'],
     r'\.pkl.*: it holds objects .*system\), which may run'),
    (['--data-dir', '{photos}', '--class-map', '{empty}'], 'it gives no labels from 0 on'),
    (['--data-dir', '{photos}/train/red/0.png'], 'got .*0.png'),
    (['--data-dir', '{broken}'], 'broken.tar.* cannot be opened'),
    (['--data-dir', '{photos}/nothing'], 'must be an existing image folder or tar file'),
])
@pytest.mark.parametrize('command', [train, validate])
def test_what_cannot_be_opened_is_one_line(command, options, message, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / 'photos', 1, 1)
    (tmp_path / 'broken.tar').write_bytes(bytes(range(256)) * 8)
    (tmp_path / 'code.pkl').write_bytes(pickle.dumps(Code(str(tmp_path / 'ran'))))
    (tmp_path / 'empty.txt').touch()
    for module in ('webdataset', 'datasets', 'tensorflow', 'tensorflow_datasets'):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr('timm.data.readers.reader_wds.wds', None, raising=False)
    files = dict(
        photos=photos, broken=tmp_path / 'broken.tar', code=tmp_path / 'code.pkl', empty=tmp_path / 'empty.txt')
    options = [option.format(**files) for option in options]
    if command is train:
        options += ['--output', str(tmp_path), '--model', 'test_resnet']
    else:
        save_checkpoint(timm.create_model('test_resnet', num_classes=3), tmp_path / 'model')
        options += ['--model', f'local-dir:{tmp_path / "model"}']
    with pytest.raises(SystemExit) as exit_info:
        command([*options, '--workers', '0'])
    assert re.search(message, exit_info.value.code) and one_line(exit_info.value.code), exit_info.value.code
    assert not (tmp_path / 'ran').exists()


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def test_a_class_map_may_be_a_plain_pickle(tmp_path):
    photos = write_photos(tmp_path / 'photos', 1, 1)
    (photos / 'map.pkl').write_bytes(pickle.dumps(dict(red=0, blue=1)))
    dataset = create_dataset(root=str(photos), split='train', class_map='map.pkl')
    assert class_names(dataset) == ['red', 'blue'] and len(dataset) == 2


def test_an_index_of_tar_files_that_an_old_timm_would_unpickle(tmp_path, monkeypatch):
    """Newer releases read nothing but what belongs there (GHSA-pqww-w348-m542)."""
    photos = write_photos(tmp_path / 'photos', 1, 1)
    (tmp_path / 'tars').mkdir()
    write_tar(tmp_path / 'tars' / 'a.tar', photos)
    index = tmp_path / 'tars' / '_a_tarinfos.pickle'
    index.write_bytes(pickle.dumps(Code(str(tmp_path / 'ran'))))
    monkeypatch.delattr(reader_image_in_tar, '_TarInfoUnpickler', raising=False)
    with pytest.raises(ValueError, match='no pickle beside it, which timm .* would read .*_a_tarinfos.pickle'):
        create_dataset(root=str(tmp_path / 'tars' / 'a.tar'))
    index.unlink()
    assert len(create_dataset(root=str(tmp_path / 'tars' / 'a.tar'))) == 3 and not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('split, message', [
    ('test', "split must be one of train, validation, the folders of '.*', got 'test'"),
    ('trian', "got 'trian'"),
    ('../photos/train', r"split must be the name of a split in root \(--data-dir\), got '../photos/train'"),
    ('/', "got '/'"),
])
def test_a_split_that_is_not_there(tmp_path, split, message):
    """timm would take all splits together for it, and whoever misspells one would measure on training images."""
    photos = write_photos(tmp_path / 'photos', 2, 1)
    with pytest.raises(ValueError, match=message):
        create_dataset(root=str(photos), split=split)
    for name, count in dict(train=6, training=6, val=3, validation=3).items():
        assert len(create_dataset(root=str(photos), split=name)) == count
    assert len(create_dataset(root=str(photos / 'train'), split=split if split == 'test' else 'val')) == 6


# What data sets are told by


def write_tar(path, photos):
    with tarfile.open(path, 'w') as file:
        file.add(photos / 'train', 'photos')
    return path


@pytest.mark.parametrize('options', [
    ['--dataset', 'digits', '--val-split', 'train'],
    ['--dataset', 'torch/image_folder', '--data-dir', '{photos}', '--val-split', 'train'],
    ['--data-dir', '{tar}'],
], ids=['digits', 'torch', 'tar'])
def test_the_same_images_twice(options, tmp_path):
    photos = write_photos(tmp_path / 'photos')
    tar = write_tar(tmp_path / 'photos.tar', photos)
    options = [option.format(photos=photos, tar=tar) for option in options]
    with pytest.raises(SystemExit, match=r'--train-split and --val-split (give the same|share \d+) images'):
        train([*options, '--output', str(tmp_path), '--model', 'test_resnet', '--workers', '0'])


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_classes_that_changed_places(name, tmp_path):
    """Their files have the same names and labels as before."""
    photos = write_photos(tmp_path / 'photos')
    before = fingerprint(create_dataset(name, root=str(photos), split='train'))
    assert before == fingerprint(create_dataset(name, root=str(photos), split='train'))
    (photos / 'train' / 'red').rename(tmp_path / 'red')
    (photos / 'train' / 'blue').rename(photos / 'train' / 'red')
    (tmp_path / 'red').rename(photos / 'train' / 'blue')
    assert before != fingerprint(create_dataset(name, root=str(photos), split='train'))


def test_torch_folders_are_read_as_timm_reads_them(tmp_path):
    """Upright, and with 16 bits."""
    deep = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint16).reshape(4, 6) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        deep.save(tmp_path / name / '0.png', exif=exif)
    ours, torchs = (create_dataset(name, root=str(tmp_path)) for name in ('', 'torch/image_folder'))
    assert isinstance(torchs, ImageFolder)
    assert ours[0][0].size == (4, 6) and ours[0][0].tobytes() == torchs[0][0].tobytes()


# Streams


class Images:
    """What stands in for a reader of a stream."""
    class_to_idx = dict(a=0, b=1)
    is_training = False

    def __init__(self, *images):
        self.images = images

    def __iter__(self):
        for number, image in enumerate(self.images):
            if isinstance(image, Exception):
                raise image
            yield image, number % 2


def test_streams_leave_out_what_cannot_be_read():
    deep = Image.fromarray(np.full((16, 16), 257 * 90, dtype=np.uint16))
    images = Image.new('L', (16, 16), 80), Image.new('F', (16, 16)), deep
    [(batch, labels)] = batches_of(ImageStream('', reader=Images(*images)), False)
    assert labels.tolist() == [0, 0]
    assert [round((float(image.mean()) + 1) * 127.5) for image in batch] == [80, 90]
    with pytest.raises(DataError, match=r'sample 1 of the stream cannot be read \(its pixels, of mode F'):
        batches_of(ImageStream('', reader=Images(*images)), False, on_bad_image='error')
    with pytest.raises(DataError, match='The stream cannot be read: broken'):
        batches_of(ImageStream('', reader=Images(OSError('broken'))), False)


# Workers that die




def kill_worker_at(monkeypatch, epoch):
    """Let a worker die of SIGKILL in an epoch, as one that takes too much memory does."""
    real = BatchDataset.__getitem__
    parent = os.getpid()

    def get(self, batch):
        if os.getpid() != parent and self.is_training and batch.epoch == epoch and batch.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)
    monkeypatch.setattr(BatchDataset, '__getitem__', get)


def test_a_killed_worker_loses_no_finished_epoch(tmp_path, monkeypatch, without_pictures):
    photos = write_photos(tmp_path / 'photos')
    options = ['--epochs', 2, '--workers', 1, '--experiment']
    train_small(photos, tmp_path, *options, 'whole')
    with monkeypatch.context() as patch:
        kill_worker_at(patch, epoch=1)
        with pytest.raises(WorkerError) as error:
            train_small(photos, tmp_path, *options, 'killed')
    assert one_line(str(error.value)) and 'died, as happens where memory runs out: lower' in str(error.value)
    assert len((tmp_path / 'killed' / 'summary.csv').read_text().splitlines()) == 2
    train_small(photos, tmp_path, *options, 'killed', '--resume', tmp_path / 'killed')
    assert_same_end(tmp_path / 'whole', tmp_path / 'killed')
