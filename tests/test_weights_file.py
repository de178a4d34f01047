"""Weights in a file: those of the model, or a line that says what the file is."""
import contextlib
import io
import os
import pickle
import random

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from support.photos import write_photos
from support.small_run import train_small

from timm_dyacts.cli import main
from timm_dyacts.loading import build_from_file
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.weights_file import read_weights


class Evil:
    """What runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope='module')
def weights():
    return {key: value.contiguous() for key, value in timm.create_model('test_resnet').state_dict().items()}


def torch_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def bad_files(weights, evil):
    nan = dict(weights, **{'bn1.weight': weights['bn1.weight'] * float('nan')})
    return {
        'random.pth': (random.Random(0).randbytes(3000), 'it is none'),
        'page.safetensors': (b'<!DOCTYPE html><html>404</html>', 'it looks like a web page'),
        'page.pth': (b'\n <html>404</html>', 'it looks like a web page'),
        'empty.pth': (b'', 'it is empty'),
        'pointer.safetensors': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', "run 'git lfs pull'"),
        'cut.safetensors': (save(weights)[:50_000], 'is a safetensors file that is cut off or damaged'),
        'cut.pth': (torch_bytes(weights)[:50_000], 'it is cut off, damaged, or no file of torch.save'),
        'code.pth': (torch_bytes(dict(state_dict=weights, other=Evil(evil))), 'Python objects beside tensors, which'),
        'code.bin': (pickle.dumps(Evil(evil)), 'Python objects beside tensors, which may run code'),
        'list.pth': (torch_bytes([1, 2]), 'no file of torch.save'),
        'numbers.pth': (torch_bytes(dict(a=1)), 'it holds no tensors by name'),
        'nan.safetensors': (save(nan), "'bn1.weight' has NaN or infinity in it"),
        'complex.pth': (torch_bytes(dict(a=torch.ones(2, dtype=torch.complex64))), "'a' is torch.complex64"),
        'fp8.pth': (torch_bytes(dict(a=torch.ones(2).to(torch.float8_e4m3fn))), "'a' is torch.float8_e4m3fn"),
        'sparse.pth': (torch_bytes(dict(a=torch.eye(3).to_sparse())), "'a' is torch.sparse_coo"),
        'meta.pth': (torch_bytes(dict(a=torch.ones(2, device='meta'))), "'a' is without values"),
        'lines.pth': (torch_bytes({'a\n\x1b[31m': torch.ones(2, device='meta')}), r"'a\n\x1b[31m' is without"),
        'absent.pth': (None, 'which is no file'),
    }


def test_files_that_are_no_checkpoint(weights, tmp_path):
    files = bad_files(weights, tmp_path / 'made by a pickle')
    for name, (content, words) in files.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((FileNotFoundError, ValueError)) as error:
            read_weights(path, '--checkpoint')
        assert words in str(error.value) and f"'{path}'" in str(error.value) and str(error.value).isprintable()
    assert not (tmp_path / 'made by a pickle').exists()


@pytest.mark.parametrize('command', [
    ['train', '--model', 'test_resnet', '-j', '0', '--pretrained-path'],
    ['train', '--model', 'test_resnet', '-j', '0', '--initial-checkpoint'],
    ['validate', '--model', 'test_resnet', '-j', '0', '--checkpoint'],
    ['validate', '--model', 'test_resnet_dyrelu_b', '-j', '0', '--pretrained-path'],
    ['predict', '--model', 'test_resnet', '-j', '0', '.', '--checkpoint'],
    ['convert', 'test_resnet', '--act', 'brelu', '--output', 'converted', '--checkpoint'],
], ids=lambda command: f'{command[0]} {command[-1]}')
def test_commands_refuse_them_in_a_line(command, weights, tmp_path, monkeypatch):
    (tmp_path / 'page.png').write_bytes(b'<html>')
    monkeypatch.chdir(tmp_path)
    save_file({k: v.contiguous() for k, v in timm.create_model('test_vit').state_dict().items()}, 'vit.safetensors')
    with pytest.raises(SystemExit, match=r'^[^\n]*page.png\S* ?: it looks like a web page\. Accepted are [^\n]*$'):
        main([*command, 'page.png'])
    with pytest.raises(SystemExit, match=r'^[^\n]*vit.safetensors[^\n]*lacks [^\n]* more[^\n]*$'):
        main([*command, 'vit.safetensors'])


def test_forms_of_a_checkpoint(weights, tmp_path):
    for name, value in {
            'plain': weights,
            'wrapped': dict(state_dict={f'module.{k}': v for k, v in weights.items()}, epoch=3, arch='test_resnet'),
            'compiled': dict(model={f'_orig_mod.{k}': v for k, v in weights.items()}),
    }.items():
        torch.save(value, tmp_path / name)
        found = read_weights(tmp_path / name, '--checkpoint')
        assert found.keys() == weights.keys() and all(torch.equal(found[k], v) for k, v in weights.items())


def test_weights_of_the_base_fit_a_variant(weights, tmp_path):
    path = str(tmp_path / 'base.safetensors')
    save_file(weights, path)
    variant = build_from_file('test_resnet_dyrelu_b', path, '--checkpoint', {}, {})
    base = build_from_file('test_resnet', path, '--checkpoint', {}, {})
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(variant.eval()(x), base.eval()(x)) and variant.conversion.function == 'exact'
    save_file({k: v.contiguous() for k, v in variant.state_dict().items()}, path)
    assert torch.equal(build_from_file('test_resnet_dyrelu_b', path, '--checkpoint', {}, {}).eval()(x), base(x))


def test_another_number_of_classes(weights, tmp_path):
    path = str(tmp_path / 'base.safetensors')
    save_file(weights, path)
    with pytest.raises(ValueError, match='It has 1000 classes, the model 10: set --num-classes 1000'):
        build_from_file('test_resnet', path, '--checkpoint', {}, {}, num_classes=10)


@pytest.mark.parametrize('dtype', [torch.int8, torch.bool])
def test_integers_in_the_place_of_weights(weights, tmp_path, dtype):
    path = str(tmp_path / 'integers.safetensors')
    save_file(dict(weights, **{'conv1.0.weight': weights['conv1.0.weight'].to(dtype)}), path)
    with pytest.raises(ValueError, match='it has as integers conv1.0.weight'):
        build_from_file('test_resnet', path, '--checkpoint', {}, {})
    with pytest.raises(ValueError, match=rf"--pretrained-path must hold floating-point .*'conv1.0.weight' is {dtype}"):
        train_small(write_photos(tmp_path / 'photos'), tmp_path, '--pretrained-path', path)


def test_what_was_loaded_is_on_record(weights, tmp_path, without_pictures, caplog):
    """No licence of the name that a file was given to, and no word that all came from it."""
    photos = write_photos(tmp_path / 'photos')
    path = tmp_path / 'half.safetensors'
    some = {key: value for key, value in weights.items() if not key.startswith('layer4')}
    assert len(some) < len(weights)
    save_file(some, path)
    train_small(photos, tmp_path, '--pretrained-path', path, '--experiment', 'run')
    start = RunFolder(tmp_path / 'run').checkpoint('best').read_results().start
    assert start.license is None and start.source == str(path) and len(start.sha256) == 64
    assert 0 < start.entries < start.entries_of
    lacking = start.entries_of - start.entries
    assert f'{lacking} of {start.entries_of} entries are not in it and start anew' in caplog.text
    save_file({key: weights[key] for key in list(weights)[:8]}, path)
    with pytest.raises(ValueError, match=r'must hold weights of the architecture, got .*, which has \d+ of its'):
        train_small(photos, tmp_path, '--pretrained-path', path)


@pytest.mark.parametrize('file_format', ['safetensors', 'pth'])
def test_damaged_files(file_format, weights, tmp_path, tries, seed):
    """The right tensors, other finite ones, or one line; never another exception."""
    draw = random.Random(seed)
    some = {key: value for key, value in weights.items() if value.numel() < 200}
    whole = save(some) if file_format == 'safetensors' else torch_bytes(dict(state_dict=some, epoch=1))
    path = tmp_path / f'weights.{file_format}'
    outcomes = {True: 0, False: 0}
    for _ in range(tries(150)):
        content = bytearray(whole)
        for _ in range(draw.choice((0, 1, 1, 5))):
            content[draw.randrange(draw.choice((20, len(content))))] = draw.randrange(256)
        content = content[:draw.choice((len(content), len(content), draw.randrange(len(content))))]
        path.write_bytes(content)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                found = read_weights(path, '--checkpoint')
        except ValueError as e:
            assert str(e).isprintable() and '--checkpoint must' in str(e)
            outcomes[False] += 1
        else:
            assert all(value.isfinite().all() for value in found.values())
            outcomes[True] += 1
    assert all(outcomes.values()), outcomes
