"""Image files of every kind: a right image, or an error of one line."""
import io
import json
import random

import numpy as np
import pytest
import timm
from PIL import Image
from support.odd_images import huge_png, saved
from support.photos import write_photos
from support.small_run import train_small

from timm_dyacts.cli.predict import main as predict
from timm_dyacts.data.images import UnreadableImageError, read_image
from timm_dyacts.data.loaders import image_mode
from timm_dyacts.training import TrainConfig, train
from timm_dyacts.training.checkpoint import save_checkpoint

GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF'])
def test_sixteen_bits_are_scaled(file_format):
    deep = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert deep.mode == 'I;16'
    for mode in ('L', 'RGB'):
        expected = Image.fromarray(GREY).convert(mode)
        assert np.array_equal(read_image(saved(deep, file_format), mode), expected)


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_pixels_of_no_known_range_are_refused(dtype):
    file = saved(Image.fromarray(GREY.astype(dtype)), 'TIFF')
    with pytest.raises(UnreadableImageError, match='of mode [IF], have no known range: convert it to 8 or 16 bits'):
        read_image(file, 'RGB')


@pytest.mark.parametrize('orientation', range(1, 9))
def test_images_are_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T, 6: np.rot90(GREY, -1),
              7: GREY[::-1, ::-1].T, 8: np.rot90(GREY)}[orientation]
    file = saved(Image.fromarray(GREY), exif=exif)
    assert np.array_equal(np.asarray(read_image(file, 'L')), turned)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK'])
def test_modes(mode):
    """What each mode makes of a black and white picture is that picture."""
    picture = Image.fromarray(np.where(GREY > 100, 255, 0).astype(np.uint8))
    result = read_image(saved(picture.convert('RGB').convert(mode), 'TIFF'), 'RGB')
    assert np.array_equal(np.asarray(result.convert('L')), picture)


@pytest.mark.parametrize('channels, mode', [(1, None), (3, None), (4, 'RGBA'), (4, 'CMYK'), (2, 'LA')])
def test_channels_and_modes_that_fit(channels, mode):
    assert image_mode(channels, mode) == (mode or {1: 'L', 3: 'RGB'}[channels])


def test_four_channels_need_a_mode(tmp_path):
    photos = write_photos(tmp_path / 'photos')
    config = TrainConfig(data_dir=photos, model='test_resnet', img_size=32, batch_size=8, in_chans=4, workers=0,
                         output=tmp_path)
    with pytest.raises(ValueError, match='--input-img-mode is needed for 4 channels, such as RGBA or CMYK'):
        train(config)


def test_broken_exif_data_do_not_lose_an_image():
    file = saved(Image.fromarray(GREY), exif=b'Exif\0\0MM\0*\0\0\xff\xff' + bytes(range(40)))
    assert np.array_equal(np.asarray(read_image(file, 'L')), GREY)


@pytest.mark.parametrize('workers', [0, 1])
def test_odd_images_are_left_out(tmp_path, without_pictures, capsys, workers):
    """Neither a bomb nor what makes Pillow raise ValueError ends a run."""
    photos = write_photos(tmp_path / 'photos')
    for split in ('train', 'validation'):
        (photos / split / 'red' / '0.png').write_bytes(huge_png())
        (photos / split / 'blue' / '1.png').write_bytes(b'P6\nx y 255\n' + bytes(100))
    result = train_small(photos, tmp_path, '--epochs', '1', '--workers', workers, '--experiment', 'run')
    assert json.loads((tmp_path / 'run/results.json').read_text())['num_images'] == 10
    assert '2 of 24 training images cannot be read' in capsys.readouterr().out
    assert result.best_epoch == 0
    (photos / 'train/blue/1.png').unlink()
    with pytest.raises(ValueError, match=r'red/0\.png cannot be read \(Image size \(400000000 pixels\) exceeds limit'):
        train_small(photos, tmp_path, '--epochs', '1', '--on-bad-image', 'error', '--batch-size', '23')


def test_predict_says_what_it_could_not_read(tmp_path, capsys):
    (tmp_path / 'huge.png').write_bytes(huge_png())
    name = 'two\nlines\x1b[31m.png'
    (tmp_path / name).write_bytes(b'no image')
    save_checkpoint(timm.create_model('test_resnet', num_classes=3), tmp_path / 'model')
    arguments = ['--model', f'local-dir:{tmp_path / "model"}', '-j', '0', str(tmp_path)]
    with pytest.raises(SystemExit, match='^timm-dyacts predict: error: 2 of 2 images cannot be read: .*png$') as error:
        predict(arguments)
    out, err = capsys.readouterr()
    assert not err and out.count('\n') == 2 and '\x1b' not in out + error.value.code
    Image.fromarray(GREY).save(tmp_path / 'good.png')
    predict(arguments)
    assert '2 of 3 images cannot be read' in capsys.readouterr().err


# Whatever the file holds


@pytest.mark.parametrize('file_format', ['PNG', 'JPEG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM', 'ICO', 'TGA', 'JPEG2000'])
def test_damaged_files(file_format, tries, seed):
    """An image of the mode asked for, or ``UnreadableImageError`` in one line; nothing else."""
    draw = random.Random(seed)
    colours = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (23, 17, 3), dtype=np.uint8))
    whole = saved(colours, file_format).getvalue()
    outcomes = {'image': 0, 'refused': 0}
    for _ in range(tries(60)):
        content = bytearray(whole)
        for _ in range(draw.choice((0, 1, 3, 30))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        content = content[:draw.choice((len(content), draw.randrange(len(content))))]
        content[draw.randrange(len(content) + 1):0] = draw.randbytes(draw.choice((0, 0, 1, 40)))
        mode = draw.choice(('RGB', 'L', 'RGBA'))
        try:
            image = read_image(io.BytesIO(content), mode)
        except UnreadableImageError as e:
            assert str(e).isprintable() and str(e)
            outcomes['refused'] += 1
        else:
            assert image.mode == mode and 0 not in image.size
            outcomes['image'] += 1
    assert outcomes['image'], outcomes
