"""Run folders with something wrong in them: the right result, or one line that says what; never a traceback."""
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.photos import write_photos
from support.small_run import train_small

from timm_dyacts.cli import main

COMMANDS = {
    'resume': lambda run, photos: ['train', '--resume', run],
    'auto': lambda run, photos: [
        'train', '-c', run / 'args.yaml', '--output', run.parent, '--experiment', run.name, '--resume', 'auto'],
    'validate': lambda run, photos: ['validate', '--model', run, '-j', '0'],
    'verify': lambda run, photos: ['validate', '--verify', '--model', run, '-j', '0'],
    'last': lambda run, photos: ['validate', '--model', run / 'last', '-j', '0'],
    'predict': lambda run, photos: ['predict', '--model', run, photos / 'validation/red', '-j', '0'],
    'publish': lambda run, photos: ['publish', run, '--repo-id', 'user/name', '--dry-run', '--license', 'mit'],
}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp('photos'))


@pytest.fixture(scope='module')
def whole(tmp_path_factory, photos):
    """A run of two epochs, whose second one is still to be done for those who resume it."""
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_dyacts.training.recorder.write_report', lambda *args: None)
        patch.setattr('timm_dyacts.training.recorder.plot_curves', lambda *args, **kwargs: None)
        train_small(photos, folder, '--epochs', 2, '--experiment', 'run')
    return folder / 'run'


def _flip(path, draw):
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 5, 50))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def _replace_value(path, draw):
    """Give an entry of a text file a value that it should not have."""
    lines = path.read_text(errors='replace').splitlines()
    number = draw.randrange(len(lines))
    key = lines[number].partition(':')[0]
    value = draw.choice((
        'null', '-1', '1e400', '[]', '{}', '"\x1b[31m"', '"../../x"', '"' + 'a' * 5000 + '"', '[[[[', ''))
    lines[number] = f'{key}: {value}' + (',' if lines[number].endswith(',') else '')
    path.write_text('\n'.join(lines))


def _become_a_folder(path, draw):
    path.unlink()
    path.mkdir()


def _swap(path, draw):
    others = [other for other in path.parent.rglob('*') if other.is_file() and other != path]
    path.write_bytes(draw.choice(others).read_bytes())


def _link_outside(path, draw):
    path.unlink()
    path.symlink_to(draw.choice(('/etc/hostname', '/nowhere', '/dev/null', '..', path.name)))


DAMAGES = {
    'missing': lambda path, draw: path.unlink(),
    'empty': lambda path, draw: path.write_bytes(b''),
    'cut': lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    'random': lambda path, draw: path.write_bytes(draw.randbytes(draw.choice((1, 100, 5000)))),
    'flipped': _flip,
    'value': _replace_value,
    'folder': _become_a_folder,
    'swapped': _swap,
    'link': _link_outside,
}


def test_damaged_run_folders(whole, photos, tmp_path, without_pictures, monkeypatch, capsys, tries, seed):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)
    files = sorted(path.relative_to(whole) for path in whole.rglob('*') if path.is_file() and path.suffix != '.png')
    texts = [path for path in files if path.suffix in ('.json', '.yaml', '.csv')]
    outcomes: Counter[str] = Counter()
    for number in range(tries(36)):
        run = tmp_path / f'{number}'
        shutil.copytree(whole, run)
        damage = draw.choice(list(DAMAGES))
        file = draw.choice(texts if damage == 'value' else files)
        name = draw.choice(list(COMMANDS))
        said = f'try {number}: {name} with {file} {damage}'
        DAMAGES[damage](run / file, draw)
        try:
            main([str(word) for word in COMMANDS[name](run, photos)])
        except SystemExit as e:
            if isinstance(e.code, str):
                assert e.code.isprintable() and 'this is a bug' not in e.code, f'{said}: {e.code}'
            else:
                last = capsys.readouterr().err.strip().splitlines()[-1:]
                assert e.code in (1, 2) and last and last[0].isprintable(), f'{said}: {last}'
            outcomes['refused'] += 1
        except BaseException as e:
            pytest.fail(f'{said}: {type(e).__name__}: {e}')
        else:
            outcomes['done'] += 1
        shutil.rmtree(run)
    assert outcomes['refused'] and outcomes['done'], outcomes
    assert Path('/etc/hostname').is_file()
