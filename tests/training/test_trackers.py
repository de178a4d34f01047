"""What trackers are told: with stand-ins for the libraries, and with the libraries where they are installed."""
import json
import sys
import types

import pytest
from support.photos import write_photos
from support.small_run import train_small

import timm_dyacts  # noqa: F401
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import TrainingInterrupted


@pytest.fixture
def run(tmp_path_factory, tmp_path, without_pictures):
    """Train for two epochs of three batches."""
    photos = write_photos(tmp_path_factory.mktemp('photos'))

    def call(*options):
        train_small(photos, tmp_path, '--epochs', 2, '--experiment', 'run', '--log-interval', 2, *options)
        return RunFolder(tmp_path / 'run')
    return call


@pytest.mark.parametrize('option, package', [
    ('--log-wandb', 'wandb'), ('--log-tensorboard', 'tensorboard'), ('--log-mlflow', 'mlflow')])
def test_a_missing_library_is_told_before_anything_is_done(run, monkeypatch, tmp_path, option, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'{option} needs {package}: pip install {package}'):
        run(option)
    assert not (tmp_path / 'run').exists()


def test_epochs_and_readings_reach_the_trackers(run, monkeypatch):
    calls = []

    class Recorder:
        id = 'abc'

        def __init__(self, *args, **kwargs):
            calls.append(('open', args, kwargs))

        def define_metric(self, name, step_metric):
            pass

        def log(self, values, step):
            calls.append(('wandb', step, *values))

        def add_scalar(self, name, value, step):
            calls.append(('tensorboard', step, name))

        def finish(self):
            calls.append(('finish',))

        close = finish

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=Recorder, Error=RuntimeError))
    monkeypatch.setitem(sys.modules, 'tensorboard', types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Recorder))
    folder = run('--log-wandb', '--wandb-project', 'colors', '--log-tensorboard')
    opened = [call[1:] for call in calls if call[0] == 'open']
    assert opened[:2] == [((str(folder),), dict(purge_step=0)), ((str(folder.path / 'step'),), dict(purge_step=1))]
    assert opened[2][1]['project'] == 'colors' and opened[2][1]['config']['model'] == 'test_resnet'
    assert [call[1] for call in calls if call[0] == 'wandb'] == [2, 3, 5, 6], 'batches: a reading, an epoch, and again'
    assert ('wandb', 5, 'step/loss', 'step/lr', 'step/images_per_second', 'step/batches') in calls
    assert ('tensorboard', 1, 'eval/top1') in calls and ('tensorboard', 0, 'train/loss') in calls
    assert [call[1] for call in calls if call[-1] == 'step/lr'] == [2, 5]
    assert calls[-3:] == [('finish',)] * 3


def test_tensorboard_files_hold_each_epoch_once(run, interrupt):
    """Those of an epoch that is done again, too."""
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt(5)
    with pytest.raises(TrainingInterrupted):
        run('--log-tensorboard')
    interrupt(-1)
    folder = run('--log-tensorboard', '--resume', 'auto')
    epochs, readings = (EventAccumulator(str(path)).Reload() for path in (folder.path, folder.path / 'step'))
    for column in ('eval_top1', 'train_loss', 'lr'):
        points = epochs.Scalars(column.replace('_', '/', 1))
        assert [point.step for point in points] == [0, 1]
        assert [point.value for point in points] == pytest.approx([row[column] for row in folder.read_summary()])
    assert [point.step for point in readings.Scalars('step/images_per_second')] == [2, 5]


def test_wandb_has_one_run_however_often_it_is_resumed(run, interrupt, monkeypatch, tmp_path):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('--log-wandb')
    name = json.loads((tmp_path / 'run' / 'trackers.json').read_text())['wandb']
    interrupt(-1)
    folder = run('--log-wandb', '--resume', 'auto')
    assert json.loads(folder.trackers.read_text()) == dict(wandb=name)
    files = list(folder.path.glob(f'wandb/offline-run-*-{name}/*.wandb'))
    assert files and len(list(folder.path.glob('wandb/offline-run-*/*.wandb'))) == len(files)
    assert any(b'eval_top1' in file.read_bytes() for file in files)


def test_mlflow_has_one_run_however_often_it_is_resumed(run, interrupt, monkeypatch, tmp_path):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'mlruns').as_uri())
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # which newer releases ask for
    monkeypatch.setenv('MLFLOW_EXPERIMENT_NAME', 'colors')
    interrupt(4)
    with pytest.raises(TrainingInterrupted):
        run('--log-mlflow')
    interrupt(-1)
    folder = run('--log-mlflow', '--resume', 'auto')
    client = mlflow.MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name('colors').experiment_id])
    assert found.data.params['model'] == 'test_resnet' and found.info.status == 'FINISHED'
    history = client.get_metric_history(found.info.run_id, 'eval_top1')
    assert [metric.value for metric in history] == [row['eval_top1'] for row in folder.read_summary()]
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, 'step/lr')] == [2, 5]
