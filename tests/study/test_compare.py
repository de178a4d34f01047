"""Small comparisons, from the command line to the pictures."""
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.photos import write_photos

from timm_dyacts.options import declarations
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.study import CompareConfig, RunError, compare
from timm_dyacts.study.plan import parse_contenders, plan_runs
from timm_dyacts.study.runs import config_of
from timm_dyacts.training import TrainConfig
from timm_dyacts.training.setup import build_setup
from timm_dyacts.world import World

pytest.importorskip('scipy')
pytest.importorskip('matplotlib')
MODELS = ('test_resnet', 'again=test_resnet', 'other=test_resnet:lr=0.01')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp('photos'))


def options(photos):
    return dict(data_dir=str(photos), img_size=32, epochs=2, workers=0, batch_size=8)


def run_compare(photos, output, **kwargs):
    config = CompareConfig(models=MODELS, seeds=2, repeats=1, output=str(output), **kwargs)
    return compare(config, **options(photos))


@pytest.fixture(scope='module')
def finished(photos, tmp_path_factory):
    return run_compare(photos, tmp_path_factory.mktemp('out'))


def rows(folder):
    with open(folder / 'compare.csv', newline='') as file:
        return list(csv.DictReader(file))


def numbers(folder):
    """What a comparison computes, without what it measures of the machine."""
    measured = ('seconds', 'peak_mib', 'step_seconds')
    return [{name: value for name, value in row.items() if name not in measured} for row in rows(folder)]


def test_what_is_written(finished):
    table = rows(finished.folder)
    assert [(row['model'], row['seed']) for row in table] == [
        (label, seed) for seed in '01' for label in ('test_resnet', 'again', 'other')]
    for row in table:
        summary = RunFolder(finished.folder / 'runs' / row['model'] / f'seed-{row["seed"]}').summary
        last = list(csv.DictReader(summary.open()))[-1]
        assert (row['last_top1'], row['last_loss']) == (last['eval_top1'], last['eval_loss'])
        assert float(row['step_seconds']) > 0 and float(row['seconds']) > 0 and int(row['peak_mib']) > 100
    text = (finished.folder / 'compare.md').read_text()
    assert all(sentence in text for sentence in finished.sentences)
    for name in ('compare.png', 'curves.png'):
        assert Image.open(finished.folder / name).size[0] > 400


def test_a_model_under_another_name_is_identical(finished):
    assert finished.sentences[0] == '`again`: exactly the top1 of `test_resnet` with all 2 seeds.'
    table = {(row['model'], row['seed']): row for row in numbers(finished.folder)}
    for seed in '01':
        assert table['again', seed] == table['test_resnet', seed] | dict(model='again')
        assert table['other', seed]['last_loss'] != table['test_resnet', seed]['last_loss']


def test_finished_runs_are_not_repeated(finished, photos, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / 'compare')
    shutil.rmtree(tmp_path / 'compare' / 'runs' / 'other' / 'seed-1')
    (tmp_path / 'compare' / 'runs' / 'other' / 'seed-1.json').unlink()
    (tmp_path / 'compare' / 'compare.csv').unlink()
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, command, **kwargs):
            started.append(command)
            super().__init__(command, **kwargs)

    monkeypatch.setattr(subprocess, 'Popen', Popen)
    run_compare(photos, tmp_path)
    assert len(started) == 1 and 'seed-1' in started[0]
    assert numbers(tmp_path / 'compare') == numbers(finished.folder)


def test_the_csv_files_alone_are_enough_to_go_on(finished, photos, tmp_path, monkeypatch):
    (tmp_path / 'compare').mkdir()
    for name in ('compare.csv', 'epochs.csv'):
        shutil.copy(finished.folder / name, tmp_path / 'compare')
    monkeypatch.setattr(subprocess, 'Popen', None)
    result = run_compare(photos, tmp_path)
    assert result.sentences == finished.sentences
    assert numbers(tmp_path / 'compare') == numbers(finished.folder)
    assert (tmp_path / 'compare' / 'epochs.csv').read_text() == (finished.folder / 'epochs.csv').read_text()

    # Fewer models and seeds leave the rows of the others where they are.
    config = CompareConfig(models=MODELS[::2], seeds=1, repeats=1, output=str(tmp_path), against='other')
    fewer = compare(config, **options(photos))
    assert [summary.model for summary in fewer.summaries] == ['other', 'test_resnet']
    assert sorted(map(str, numbers(tmp_path / 'compare'))) == sorted(map(str, numbers(finished.folder)))

    (tmp_path / 'compare' / 'compare.csv').write_text('model,seed\ntest_resnet,0\n')
    with pytest.raises(ValueError, match='must be as compare writes them'):
        run_compare(photos, tmp_path)


def test_no_state_is_left_of_a_finished_run(finished):
    assert not list(finished.folder.rglob('*.pt')) and list(finished.folder.rglob('model.safetensors'))


def test_frozen_coefficients(photos, tmp_path):
    """A control of the control: fresh coefficients do not depend on the image, so freezing them changes nothing."""
    fixed = 'mobilenetv2_050_dyrelu_b:lr_ops=0'
    models = ('mobilenetv2_050', f'fixed={fixed}', f'slow={fixed},lr=0.0005')
    config = CompareConfig(
        models=models, seeds=1, repeats=1, freeze_coefficients=True, output=str(tmp_path), at='best')
    result = compare(config, **options(photos) | dict(epochs=1, val_fraction=0.3))
    table = rows(result.folder)
    assert [row['frozen_at'] for row in table] == ['', 'best', 'best']
    for row in table[1:]:
        assert float(row['frozen_loss']) == pytest.approx(float(row['best_loss']), rel=1e-4)
    text = (result.folder / 'compare.md').read_text()
    assert '`slow` with frozen coefficients: exactly the top1 of `as trained` with its only seed.' in text


def test_other_options_are_another_comparison(finished, photos):
    config = CompareConfig(models=MODELS, seeds=2, output=str(finished.folder.parent))
    words = r'finished run with other options: --epochs 2 \(now 3\). Choose another --experiment'
    with pytest.raises(RunError, match=words):
        compare(config, **options(photos) | dict(epochs=3))


def test_a_stopped_comparison_goes_on_to_the_same_table(finished, photos, tmp_path):
    command = [sys.executable, '-m', 'timm_dyacts', 'compare', '--models', *MODELS, '--seeds', '2', '--repeats', '1']
    command += ['--output', str(tmp_path), '--jobs', '2', '--data-dir', str(photos), '--img-size', '32']
    command += ['--epochs', '2', '--workers', '0', '--batch-size', '8']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob('compare/runs/*/seed-*/summary.csv')) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / 'compare') == numbers(finished.folder)
    assert '| `again` | 2 |' in done.stdout


def test_a_run_that_fails_is_named(photos, tmp_path):
    config = CompareConfig(models=('test_resnet', 'test_resnet:lr=0.1'), seeds=1, output=str(tmp_path))
    with pytest.raises(RunError, match='test_resnet with seed 0 ended with exit status 1: .*must be a checkpoint file'):
        compare(config, **options(photos) | dict(initial_checkpoint='missing.pt'))


@pytest.mark.parametrize('models, kwargs, error, words', [
    (('test_resnet',), {}, ValueError, 'must be at least two'),
    (('test_resnet', 'b=test_resnet:lr=-1'), {}, ValueError, 'lr .--lr. must be'),
    (('test_resnet', 'b=test_resnet'), dict(seeds=0), ValueError, 'seeds .--seeds. must be an integer of at least 1'),
    (('test_resnet', 'b=test_resnet'), dict(against='c'), ValueError, 'label of a model, one of test_resnet, b, got'),
    (('test_resnet', 'b=test_resnet'), dict(metric='top3'), ValueError, 'one of top1, top5, loss'),
])
def test_bad_input(models, kwargs, error, words, photos, tmp_path):
    with pytest.raises(error, match=words):
        compare(CompareConfig(models=models, output=str(tmp_path), **kwargs), **options(photos))
    assert not any(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_start_and_the_same_batches(photos):
    """Of a base and its variants: the weights that they share, the classifier, and what they are shown."""
    contenders = parse_contenders(
        ('resnet10t', 'resnet10t_dyrelu_b', 'resnet10t_softpool', 'resnet10t_brelu'), declarations(TrainConfig))
    setups = [
        build_setup(config_of(run, options(photos)), World(torch.device('cpu')), initialize=True)
        for run in plan_runs(contenders, (5,), Path('unused'))]
    base = setups[0].model.state_dict()
    batches = [next(iter(setup.loader)) for setup in setups]
    for setup, (images, labels) in zip(setups, batches, strict=True):
        assert torch.equal(images, batches[0][0]) and torch.equal(labels, batches[0][1])
        for name, value in setup.model.state_dict().items():
            if name in base:
                assert torch.equal(value.abs(), base[name].abs()), name  # BReLU's are flipped
        assert torch.equal(setup.model.get_classifier().bias, setups[0].model.get_classifier().bias)
