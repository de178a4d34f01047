"""Data and losses that are not as they should be: one clear error, or a count, and nothing good lost."""
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from support.photos import write_photos
from support.small_run import train_small
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.data import DataError
from timm_dyacts.training import NonFiniteLossError
from timm_dyacts.training.nonfinite import find_nonfinite, first_nonfinite_tensor
from timm_dyacts.training.state import load_state


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / 'photos')


@pytest.fixture
def run(photos, tmp_path, without_pictures):

    def call(*options):
        return train_small(photos, tmp_path / 'out', '--experiment', 'run', *options)
    return call


# Images and labels


def test_empty_folder(run, tmp_path):
    (tmp_path / 'empty' / 'train' / 'cat').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--data-dir\) must hold images in one folder per class, got '.*empty'"):
        run('--data-dir', str(tmp_path / 'empty'))


def test_batches_that_no_memory_holds(run):
    with pytest.raises(ValueError, match=r'8 images of 3 x 16384 x 16384 take 24 GiB .*, and the machine has 16 GiB'):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr('os.sysconf', {'SC_PHYS_PAGES': 2 ** 22, 'SC_PAGE_SIZE': 2 ** 12}.__getitem__)
            run('--img-size', '16384')


def test_one_class(run, photos):
    for split in ('train', 'validation'):
        for name in ('green', 'red'):
            shutil.rmtree(photos / split / name)
    with pytest.raises(ValueError, match=r"one class only \('blue'\): there is nothing to tell apart"):
        run()


@pytest.mark.parametrize('workers', ['0', '1'])
def test_unreadable_images_are_counted(run, photos, capsys, workers):
    (photos / 'train' / 'red' / '0.png').write_text('not an image')
    cut = photos / 'validation' / 'blue' / '2.png'
    cut.write_bytes(cut.read_bytes()[:200])
    result = run('--workers', workers, '--epochs', '2')
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if 'cannot be read' in line] == [
        f'1 of 24 training images cannot be read: {photos}/train/red/0.png',
        f'1 of 12 validation images cannot be read: {cut}']
    correct = result.best['top1'] * 11 / 100
    assert correct == pytest.approx(round(correct), abs=1e-6), 'accuracy over the 11 images that are left'
    assert json.loads(Path(result.folder, 'results.json').read_text())['num_images'] == 11


@pytest.mark.parametrize('workers', ['0', '1'])
def test_unreadable_images_stop_the_run_if_asked(run, photos, workers):
    (photos / 'train' / 'red' / '0.png').write_text('not an image')
    message = r'/.*red/0\.png cannot be read \(cannot identify image file.*\); --on-bad-image skip leaves it out\.'
    with pytest.raises(DataError, match=rf'\A{message}\Z'):  # without the trace of the worker
        run('--on-bad-image', 'error', '--workers', workers)


def test_labels_beyond_the_classes(run, photos):
    """The labels of an unnamed data set are known only when they are loaded."""
    (photos / 'classes.txt').write_text('blue\ngreen\nred\n')

    def hide_names(dataset):
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_dyacts.training.setup.class_names', hide_names)
        with pytest.raises(DataError, match=r'red/\d\.png has label 2, beyond --num-classes 2'):
            run('--num-classes', '2')
        with pytest.raises(ValueError, match='--num-classes is needed'):
            run()


# Losses


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3))


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()


def test_the_module_with_the_first_nan_is_named():
    model = net()
    model[2] = nn.Sequential(Logarithm())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_nonfinite(model, torch.randn(2, 3, 4, 4), nullcontext)
    assert found == 'It first appeared in the output of 2.0 (Logarithm).'
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_gradients_and_parameters_are_told_apart():
    images = torch.randn(2, 3, 4, 4)
    model = net()
    assert find_nonfinite(model, images / 0, nullcontext) == 'The images of the batch hold it already.'
    assert find_nonfinite(model, images, nullcontext) == 'All modules are finite: it is in the loss.'
    with torch.no_grad():
        model[1].bias[0] = math.inf
    assert find_nonfinite(model, images, nullcontext) == '1.bias is not finite any more.'
    assert first_nonfinite_tensor(model) == '1.bias'
    model[0].weight.grad = torch.full_like(model[0].weight, math.nan)
    model[4].bias.grad = torch.full_like(model[4].bias, math.nan)
    assert 'in the gradient of 4.bias, in the backward pass' in find_nonfinite(model, images, nullcontext)


def test_a_diverged_run_keeps_its_last_good_state(run, tmp_path):
    """The learning rate explodes in the second epoch: what the first has left must stay."""
    run('--epochs', '1')
    folder = tmp_path / 'out' / 'run'
    files = [folder / 'model.safetensors', folder / 'last' / 'model.safetensors']
    with pytest.raises(NonFiniteLossError, match=r'(loss is (nan|inf) at epoch|is not finite any more)'):
        run('--experiment', 'diverged', '--epochs', '9', '--lr', '1000', '--opt', 'sgd', '--warmup-epochs', '2',
            '--warmup-lr', '1e-3', '--checkpoint-interval', '1')
    folder = tmp_path / 'out' / 'diverged'
    state = load_state(str(folder / 'checkpoint' / 'state.pt'))
    assert all(value.isfinite().all() for value in state['model'].values())
    assert all(path.is_file() for path in files)


def test_a_model_that_breaks_names_its_module(run, monkeypatch):
    real = timm.create_model

    def create(*args, **kwargs):
        model = real(*args, **kwargs)
        model.layer2[0].bn2.register_forward_hook(lambda module, args, output: output * math.nan)
        return model

    monkeypatch.setattr('timm.create_model', create)
    with pytest.raises(
            NonFiniteLossError, match=r'loss is nan at epoch 0, step 0\. It first appeared in the output of layer2\.0'):
        run()
