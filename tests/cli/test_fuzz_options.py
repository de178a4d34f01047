"""A fuzzer of the command line: hostile values for every option of train, validate and predict.

Each try is a whole command in this process. It must do what it was asked, or end with one line. ``--fuzz N`` tries N
times as many; the seed in the name of a failure is enough to repeat it.
"""
import random
import re
import string
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.photos import write_photos

from timm_dyacts.cli import predict, train, validate
from timm_dyacts.evaluation import PredictConfig, ValidateConfig
from timm_dyacts.options import declarations
from timm_dyacts.training import TrainConfig

COMMANDS = {'train': (train, TrainConfig), 'validate': (validate, ValidateConfig), 'predict': (predict, PredictConfig)}
HOSTILE = (
    '', '-', '--', '.', '..', '/', '~', 'nan', '-inf', 'inf', '1e400', '1e308', '5e-324', '-1', '-0.0', '0', '1', '2',
    '0.5', '1.5', str(2 ** 31), str(10 ** 30), '9' * 5000, '-' + '9' * 30, '0x10', '1_0', '१', 'é', '\u202e', '名前',
    '\n', 'a\nb', '\0', '\x1b[31m', '\r', '\udc80', 'x' * 4000, 'None', 'null', '[]', '{}', "';--", '%s', '%(prog)s',
    '=', 'a=', '=a', 'a=b', 'a=[', 'a=' + '(' * 300, 'num_classes=3', 'act_layer=', 'rand-m9x', 'local-dir:', 'hf-hub:',
    ':', 'torch/', 'wds/', '/dev/null', '/dev/full/x', '*',
)
# What takes long, writes outside of the test, asks a network or changes the process where it is accepted
LEFT_OUT = {
    'epochs', 'workers', 'torchcompile', 'torchcompile_mode', 'deterministic', 'log_wandb', 'log_mlflow', 'pretrained',
    'dataset_download', 'profile', 'log_tensorboard', 'dist_strategy', 'output', 'grad_accum_steps', 'resume',
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    write_photos(folder / 'photos')
    return folder


@pytest.fixture(autouse=True)
def beside_the_photos(folder, monkeypatch, without_pictures):
    monkeypatch.chdir(folder)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


def smallest(command: str) -> list[str]:
    """A command line of little work."""
    argv = ['--model', 'test_resnet', '--img-size', '32', '--batch-size', '8', '--workers', '0']
    if command == 'predict':
        return ['photos', *argv, '--checkpoint', 'missing.safetensors']
    if command == 'validate':
        return [*argv, '--data-dir', 'photos', '--checkpoint', 'missing.safetensors']
    return [*argv, '--data-dir', 'photos', '--epochs', '1', '--warmup-epochs', '0', '--output', 'out']


def draw(rng: random.Random, command: str) -> list[str]:
    """A command line with one to three options more, or the same again, of hostile values."""
    argv = smallest(command)
    declared = [d for name, d in declarations(COMMANDS[command][1]).items() if name not in LEFT_OUT]
    for option in rng.sample(declared, rng.choice((1, 1, 1, 2, 3))):
        count = option.count if isinstance(option.count, int) else 1
        if count == 1 and (option.count is ... or Mapping in option.types):
            count = rng.choice((1, 1, 2, 3))
        values = [] if option.types == (bool,) else [draw_value(rng) for _ in range(count)]
        argv += values if option.option.positional else [option.flag, *values]
    return argv


def draw_value(rng: random.Random) -> str:
    if rng.random() < 0.1:
        return ''.join(rng.choices(string.printable, k=rng.randrange(1, 12)))
    return rng.choice((*HOSTILE, 'photos', 'missing.yaml', 'photos/missing/../..'))


@pytest.mark.parametrize('command', COMMANDS)
def test_hostile_values(command, tries, capsys):
    bad = []
    for seed in range(tries(40)):
        argv = draw(random.Random(f'{command} {seed}'), command)
        problem = find_problem(command, argv, capsys)
        if problem is not None:
            bad.append(f'seed {seed}: {argv[len(smallest(command)):]!r:.300}: {problem:.600}')
    assert not bad, f'{len(bad)} of {tries(40)} tries are bad:\n' + '\n'.join(bad)


def find_problem(command: str, argv: list[str], capsys) -> str | None:
    """Run a command, and say what is wrong with the way it ended."""
    try:
        COMMANDS[command][0].main(argv)
    except SystemExit as e:
        err = capsys.readouterr().err
        line = e.code if isinstance(e.code, str) else (err.splitlines() or [''])[-1]
        if e.code in (0, None):
            return None
        if not re.fullmatch(rf'timm-dyacts {command}: error: \S.*', line) or not line.isprintable():
            return f'no message of one line: {line!r}'
        return line if 'this is a bug' in line else None
    except BaseException as e:
        return f'{type(e).__name__}: {e}'
    capsys.readouterr()
    return None


def test_a_bug_is_told_as_such_and_keeps_its_traceback(capsys, monkeypatch):
    def broken(config):
        raise KeyError('a\nb')

    monkeypatch.setattr(train, 'train', broken)
    with pytest.raises(SystemExit) as error:
        train.main([])
    line = error.value.code
    assert line.startswith("timm-dyacts train: error: this is a bug, please report it: KeyError: 'a\\nb'")
    kept = Path(re.search(r'its traceback: (\S+)\)', line)[1])
    assert 'in broken' in kept.read_text()
    kept.unlink()


def test_traceback_is_shown_if_asked_for(capsys):
    for argv, shown in ((['--lr', '-1'], False), (['--lr', '-1', '--traceback'], True), (['--lr', '-1'], False)):
        with pytest.raises(SystemExit, match=r'lr \(--lr\) must be'):
            train.main(argv)
        assert ('Traceback (most recent call last)' in capsys.readouterr().err) is shown


def test_memory_that_runs_out_is_told_with_advice(monkeypatch):
    def full(config):
        raise MemoryError

    monkeypatch.setattr(train, 'train', full)
    with pytest.raises(SystemExit, match='out of memory; a smaller --batch-size or --img-size needs less of it'):
        train.main([])
