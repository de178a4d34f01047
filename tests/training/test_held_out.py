"""Held-out training images tell which epoch is the best."""
import json

import pytest

from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainConfig, train
from timm_dyacts.training.log import best_row

OPTIONS = dict(model='test_resnet', epochs=3, batch_size=16, images_per_class=12, lr=0.01, model_ema=True,
               model_ema_decay=0.5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    output = str(tmp_path_factory.mktemp('runs'))
    result = train(TrainConfig(**OPTIONS, val_fraction=0.25, output=output, experiment='a'))
    return RunFolder(result.folder), result


def test_the_best_epoch_is_that_of_the_held_out_images(run):
    folder, result = run
    rows = folder.read_summary()
    best = best_row(rows, 'eval_holdout_top1')
    assert result.best_epoch == best['epoch'] and result.best['top1'] == best['eval_top1']
    results = json.loads(folder.checkpoint('best').results.read_text())
    assert results['epoch'] == best['epoch'] and results['top1'] == best['eval_top1']
    ema = json.loads(folder.checkpoint('ema').results.read_text())
    assert ema['top1'] == best_row(rows, 'ema_holdout_top1')['ema_top1']
    for name in ('eval_holdout_top1', 'ema_holdout_top1'):  # counted over 30 of them: a quarter of 12 for each class
        assert all(round(row[name] * 30 / 100, 6).is_integer() for row in rows)


def test_a_run_without_them_sees_more_images_and_has_no_such_columns(run, tmp_path, capsys):
    result = train(TrainConfig(**OPTIONS | dict(epochs=1), output=str(tmp_path)))
    assert '120 training and 360 validation images' in capsys.readouterr().out
    [row] = RunFolder(result.folder).read_summary()
    assert not any('holdout' in name for name in row)


def test_resuming_is_exact(run, tmp_path):
    folder, _ = run
    options = dict(OPTIONS, val_fraction=0.25, output=str(tmp_path), experiment='b')
    whole = folder.read_summary()
    train(TrainConfig(**options))
    assert RunFolder(tmp_path / 'b').read_summary() == whole
    (tmp_path / 'b' / 'checkpoint' / 'previous.pt').replace(tmp_path / 'b' / 'checkpoint' / 'state.pt')
    train(TrainConfig(**options, resume='auto'))
    assert RunFolder(tmp_path / 'b').read_summary() == whole


@pytest.mark.parametrize('options, words', [
    (dict(val_fraction=1.0), r'val_fraction .* at least 0 and below 1'),
    (dict(val_fraction=-0.1), r'val_fraction .* at least 0 and below 1'),
    (dict(images_per_class=0), r'images_per_class .* at least 1'),
    (dict(images_per_class=1, val_fraction=0.5), '--images-per-class must be 2 or more with --val-fraction'),
])
def test_ranges(options, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**options)


def test_other_choices_are_another_run(run):
    folder, _ = run
    options = dict(OPTIONS, output=str(folder.path.parent), experiment='a', resume='auto')
    with pytest.raises(ValueError, match=r'--val-fraction 0\.25 \(now 0\.5\)|data set is another one'):
        train(TrainConfig(**options, val_fraction=0.5))
