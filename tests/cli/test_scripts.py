"""Training, validation and prediction, as a user runs them."""
import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import timm_dyacts  # noqa: F401
from timm_dyacts.cli.train import parse_config

ROOT = Path(__file__).parents[2]


def run_script(name, *options, cwd=ROOT):
    env = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
    return subprocess.run(
        [sys.executable, str(ROOT / 'scripts' / name), *map(str, options)],
        cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def call_script(monkeypatch):
    """Run a script within this process, which saves its start: what it raises is for the test to catch."""
    def call(name, *options):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, options)])
        runpy.run_path(str(ROOT / 'scripts' / name), run_name='__main__')
    return call


@pytest.fixture
def validate(call_script, capsys):
    """The JSON after the '--result' line, as a program that drives timm's validate.py reads it."""
    def call(*options):
        call_script('validate.py', '--workers', '0', *options)
        return json.loads(capsys.readouterr().out.split('--result\n')[1])
    return call


@pytest.fixture(scope='module')
def shades(tmp_path_factory):
    """An image folder of two classes, 'dark' and 'light'."""
    root = tmp_path_factory.mktemp('shades')
    for split, count in (('train', 6), ('validation', 5)):
        for name, shade in (('dark', 60), ('light', 190)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (shade + 5 * i,) * 3).save(folder / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def run(shades, tmp_path_factory):
    """A finished run: (its folder, its process)."""
    output = tmp_path_factory.mktemp('output')
    process = run_script(
        'train.py', '--model', 'test_resnet', '--model-kwargs', 'act_layer=brelu', '--data-dir', shades,
        '--img-size', '32', '--epochs', '2', '--batch-size', '4', '--workers', '0', '--output', output,
        '--experiment', 'shades')
    assert process.returncode == 0, process.stderr
    return output / 'shades', process


def test_run_folder_holds_everything(run):
    folder, _ = run
    assert {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()} == {
        'model.safetensors', 'config.json', 'last/model.safetensors', 'last/config.json',
        '.lock', 'results.json', 'args.yaml', 'summary.csv', 'classes.csv', 'curves.png', 'classes.png',
        'confusion.png',
        'mistakes.png',
        'checkpoint/state.pt', 'checkpoint/previous.pt',
    }
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet'
    assert config['label_names'] == ['dark', 'light']
    assert config['model_args']['act_layer'] == 'brelu'
    cfg = config['pretrained_cfg']
    assert (cfg['num_classes'], cfg['input_size']) == (2, [3, 32, 32])
    assert {'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode'} <= set(cfg)


def test_run_prints_one_line_per_epoch_and_ends_with_the_summary(run):
    folder, process = run
    lines = process.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [['epoch', '0'], ['epoch', '1']]
    assert '12 training and 10 validation images of 2 classes' in lines[0]
    assert lines[-1].startswith('Best top1 ')
    assert lines[-1].endswith(f'timm-dyacts validate --model {folder}')
    assert process.stderr == '', 'no progress bar where nobody watches'


@pytest.mark.parametrize('checkpoint', ['.', 'last'])
def test_a_fresh_process_gets_the_same_logits(run, checkpoint, tmp_path):
    folder = run[0] / checkpoint
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / 'images.pt')
    code = (
        'import torch, timm, timm_dyacts\n'
        f'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
        f'logits = model(torch.load("{tmp_path}/images.pt"))\n'
        f'torch.save(logits.detach(), "{tmp_path}/logits.pt")\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
    with torch.no_grad():
        assert torch.equal(model(images), torch.load(tmp_path / 'logits.pt'))
    weights = load_file(folder / 'model.safetensors')
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_validate_repeats_the_evaluation_of_the_run(run, validate):
    folder, _ = run
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    best = max(rows, key=lambda row: float(row['eval_top1']))  # the first of equals, as in training
    for model, row in ((folder, best), (f'local-dir:{folder}', best), (folder / 'last', rows[-1])):
        result = validate('--model', model)
        assert list(result) == [
            'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
        assert result['model'] == str(model)
        assert result['top1'] == round(float(row['eval_top1']), 4)
        assert result['top1_err'] == round(100 - float(row['eval_top1']), 4)
        assert (result['top5'], result['img_size']) == (100.0, 32)


def test_validate_on_another_split_and_size(run, shades, validate):
    result = validate(
        '--model', run[0], '--data-dir', shades, '--split', 'train', '--img-size', '48', '--crop-pct', '1',
        '--batch-size', '5', '--channels-last')
    assert (result['img_size'], result['crop_pct']) == (48, 1.0)
    assert result['top1'] in {round(100 * correct / 12, 4) for correct in range(13)}


def test_validate_a_plain_name_with_a_checkpoint(run, validate):
    """The weights of a run, given as a file to the model's name, evaluated on the data set asked for."""
    folder, _ = run
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    by_file = validate(
        '--model', 'test_resnet', '--checkpoint', folder / 'model.safetensors', '--num-classes', '2',
        '--model-kwargs', 'act_layer=brelu', '--data-dir', options['data_dir'], '--img-size', '32')
    assert by_file['top1'] == validate('--model', folder)['top1']


def test_a_run_repeats_from_its_args(run, tmp_path, call_script):
    folder, _ = run
    call_script('train.py', '-c', folder / 'args.yaml', '--output', tmp_path)
    again = load_file(tmp_path / 'shades' / 'model.safetensors')
    for key, value in load_file(folder / 'model.safetensors').items():
        assert torch.equal(value, again[key])


def test_digits_end_to_end(tmp_path, call_script, validate, capsys):
    """Two epochs of the run without arguments, on a variant of the zoo."""
    call_script('train.py', '--epochs', '2', '--output', tmp_path, '--experiment', 'digits')
    assert '1437 training and 360 validation images of 10 classes at 32 pixels' in capsys.readouterr().out
    assert validate('--model', tmp_path / 'digits')['top1'] > 50, 'far above the 10 % of chance'
    assert json.loads((tmp_path / 'digits' / 'config.json').read_text())['label_names'] == list('0123456789')


# Options


def test_command_line_beats_config_beats_recipe_beats_default(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text('epochs: 7\nlr: 0.5\n')

    def parse(*argv):
        return parse_config(argv)

    assert parse('--data-dir', 'x').hflip == 0.5
    assert parse().hflip == 0.0, 'a flipped digit is no digit'
    assert parse('--hflip', '0.3').hflip == 0.3
    assert parse('-c', str(config)).epochs == 7
    assert parse('-c', str(config), '--epochs', '3').epochs == 3
    assert parse('-c', str(config)).lr == 0.5


@pytest.mark.parametrize('argv, dataset, data_dir', [
    ([], 'digits', None),
    (['--data-dir', 'photos'], '', 'photos'),
    (['--dataset', 'torch/cifar10', '--data-dir', 'cifar'], 'torch/cifar10', 'cifar'),
])
def test_default_dataset(argv, dataset, data_dir):
    config = parse_config(argv)
    assert (config.dataset, config.data_dir) == (dataset, data_dir)


@pytest.mark.parametrize('script, options, message', [
    ('train.py', ['--model', 'resnet18_dyrelu'], 'Close names: .*resnet18_dyrelu_'),
    ('train.py', ['--dataset', 'cifar10'], "Unknown data set 'cifar10'"),
    ('train.py', ['--data-dir', 'no/such/folder'], "existing image folder or tar file, got 'no/such/folder'"),
    ('train.py', ['--bach-size', '4'], 'unrecognized arguments: --bach-size'),
    ('train.py', ['-c', 'no_such.yaml'], '--config must be a readable YAML file'),
    ('train.py', ['--clip-grad', '-1'], r'clip_grad \(--clip-grad\) must be a finite number above 0, or None, got -1'),
    ('train.py', ['--lr', 'nan'], r'lr \(--lr\) must be a finite number above 0 and of at most 1000, or None, got nan'),
    ('train.py', ['--mixup', '0.2', '-b', '7'], '--batch-size must be even with --mixup or --cutmix, got 7'),
    ('train.py', ['--device', 'gpu'], "--device must be the name of a device such as cpu or cuda, got 'gpu'"),
    ('predict.py', ['x.png', '-m', 'net', '-b', '0'], r'batch_size \(--batch-size\) must be an integer of at least 1'),
    ('validate.py', ['--model', 'resnet18_dyrelu'], 'Close names: .*resnet18_dyrelu_'),
    ('validate.py', ['--model', 'local-dir:no/such/folder'], 'no/such/folder'),
    ('validate.py', [], 'required: -m/--model'),
    ('predict.py', ['x.png', '-m', 'net', '--results-file', 'no/such/a.csv'],
     "--results-file must be a file in a folder that exists, got 'no/such/a.csv'"),
    ('validate.py', ['-m', 'net', '--results-file', '.'], "--results-file must be a file, got the folder '.'"),
    ('validate.py', ['-m', 'net', '--amp-dtype', 'bfloat16'], '--amp-dtype must be left out without --amp, got bfloat'),
    ('train.py', ['--opt', 'adamv'], "--opt must be one of timm.optim.list_opt.*got 'adamv'.* Close names: adam"),
    ('train.py', ['--opt', 'sgd', '--opt-betas', '0.9', '0.99'], '--opt-betas must be left out without an --opt that'),
    ('train.py', ['--decay-rate', '0.5'], '--decay-rate must be left out without --sched step, multistep, plateau or'),
    ('train.py', ['--experiment', '../x'], "--experiment must be the name of a folder below --output, got '../x'"),
    ('train.py', ['--gp', ''], "--gp must be a pooling such as avg, .* got ''"),
    ('train.py', ['--aa', 'rand-m9-q'], r"aa \(--aa\) must be .* got 'rand-m9-q' \('q' is none of its parts\)"),
    ('train.py', ['--aa', 'augmix-w0'], "got 'augmix-w0'"),
    ('validate.py', ['-m', 'a', 'b', '--checkpoint', 'c'], '--checkpoint holds the weights of one model, and'),
])
def test_bad_input_is_one_clear_line(script, options, message, call_script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        call_script(script, *options)
    # sys.exit prints a text and returns 1; argparse has printed already and returns 2.
    code = exit_info.value.code
    line = capsys.readouterr().err.splitlines()[-1] if code == 2 else code
    assert re.fullmatch(rf'{script}: error: .*{message}.*', line)


@pytest.mark.parametrize('text, message', [
    ('warmup_epoch: 3', "unknown option 'warmup_epoch'. Close names: warmup_epochs"),
    ('sched: cosin', "wsd, plateau, constant, got 'cosin'. Close names: cosine"),
    ('lr: -1', 'lr (--lr) must be a finite number above 0 and of at most 1000, or None, got -1'),
    ('- epochs', 'must hold one "option: value" per line'),
    ('{', '--config must be a readable YAML file'),
])
def test_bad_config(tmp_path, text, message, call_script, capsys):
    config = tmp_path / 'config.yaml'
    config.write_text(text)
    with pytest.raises(SystemExit):
        call_script('train.py', '-c', config)
    assert message in capsys.readouterr().err


def test_validate_refuses_more_classes_than_logits(run, call_script):
    with pytest.raises(SystemExit, match='The data set has 10 classes, more than the 2 of the model'):
        call_script('validate.py', '--model', run[0], '--dataset', 'digits')


@pytest.mark.parametrize('script, options', [('validate.py', []), ('predict.py', ['{shades}'])])
def test_a_classifier_of_random_weights_is_refused(run, shades, script, options, call_script):
    """The number of classes of an option that are not those of the weights: timm makes a new classifier."""
    options = [option.format(shades=shades) for option in options]
    with pytest.raises(SystemExit, match='--num-classes must be left out, or be 2, the classes of the weights of .* 3'):
        call_script(script, *options, '--model', run[0], '--num-classes', '3')


def test_validate_warns_of_other_classes(run, shades, tmp_path, validate, caplog):
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation' / 'bright').symlink_to(shades / 'validation' / 'light')
    (tmp_path / 'validation' / 'dark').symlink_to(shades / 'validation' / 'dark')
    validate('--model', run[0])
    assert not caplog.messages
    validate('--model', run[0], '--data-dir', tmp_path)
    assert "the data set: ['bright', 'dark']" in caplog.text and "the model: ['dark', 'light']" in caplog.text
