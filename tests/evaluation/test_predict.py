"""Prediction, and validation of several models, through the scripts."""
import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.photos import COLORS, write_photos
from timm.data import create_transform, resolve_data_config

import timm_dyacts
from timm_dyacts.evaluation.predict import find_images
from timm_dyacts.training import save_checkpoint, set_pretrained_cfg

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp('photos'), train=1, validation=4)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """The folder of a model that has not learnt anything, which predictions do not need."""
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    net = timm.create_model('test_resnet', num_classes=3)
    config = dict(resolve_data_config({}, model=net), input_size=(3, 32, 32), crop_pct=0.9)
    set_pretrained_cfg(net, config, from_pretrained=False)
    save_checkpoint(net, folder, label_names=list(COLORS))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    def run(script, *options):
        monkeypatch.setattr(sys, 'argv', [script, *map(str, options), '--workers', '0'])
        runpy.run_path(str(ROOT / 'scripts' / script), run_name='__main__')
        return capsys.readouterr()
    return run


def test_predictions_are_those_of_the_model(model, photos, call):
    records = json.loads(call('predict.py', '-m', model, photos, '--topk', '2', '--results-format', 'json').out)
    net = timm.create_model(f'local-dir:{model}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=net))
    assert len(records) == 15
    for record in records:
        image = transform(Image.open(record['path']).convert('RGB'))
        with torch.no_grad():
            values, labels = net(image[None])[0].softmax(0).topk(2)
        assert [p['label'] for p in record['predictions']] == labels.tolist()
        assert [p['class'] for p in record['predictions']] == [list(COLORS)[i] for i in labels]
        assert [p['probability'] for p in record['predictions']] == pytest.approx(values.tolist(), abs=1e-5)


def test_formats_say_the_same(model, photos, call, tmp_path):
    image = photos / 'train' / 'red' / '0.png'
    [record] = json.loads(call('predict.py', '-m', model, image, '--results-format', 'json').out)
    first = record['predictions'][0]
    assert len(record['predictions']) == 3, 'no more than there are classes'
    table = call('predict.py', '-m', model, image).out
    assert table.startswith(f'{image}  {first["class"]} {100 * first["probability"]:.1f} %, ')
    call('predict.py', '-m', model, image, '--results-format', 'csv', '--results-file', tmp_path / 'p.csv')
    with open(tmp_path / 'p.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['rank'] for row in rows] == ['1', '2', '3']
    assert (rows[0]['class'], rows[0]['path']) == (first['class'], str(image))


def test_unreadable_images_are_counted(model, photos, call, tmp_path):
    (tmp_path / 'a.png').write_text('not an image')
    (tmp_path / 'b.png').symlink_to(photos / 'train' / 'red' / '0.png')
    result = call('predict.py', '-m', model, tmp_path)
    assert result.out.splitlines()[0] == f'{tmp_path}/a.png  cannot be read'
    assert result.err == f'1 of 2 images cannot be read: {tmp_path}/a.png\n'
    with pytest.raises(SystemExit, match='predict.py: error: .*a.png cannot be read'):
        call('predict.py', '-m', model, tmp_path, '--on-bad-image', 'error')


def test_names_of_imagenet_where_the_checkpoint_has_none(tmp_path, photos, call):
    save_checkpoint(timm.create_model('test_resnet'), tmp_path)
    out = call('predict.py', '-m', tmp_path, photos / 'train' / 'red', '--topk', '1').out
    label = int(json.loads(call('predict.py', '-m', tmp_path, photos / 'train' / 'red', '--topk', '1',
                                '--results-format', 'json').out)[0]['predictions'][0]['label'])
    assert timm.data.ImageNetInfo().index_to_description(label) in out


def test_find_images(photos, tmp_path):
    files = find_images([str(photos / 'train')])
    assert [Path(file).parent.name for file in files] == ['blue', 'green', 'red']
    with pytest.raises(FileNotFoundError, match="got 'nowhere', which does not exist"):
        find_images(['nowhere'])
    with pytest.raises(ValueError, match=r'no image found in .* \(known endings: .*\.png'):
        find_images([str(tmp_path)])


@pytest.mark.parametrize('options, message', [
    (['--topk', '0'], r'predict.py: error: topk \(--topk\) must be an integer of at least 1, got 0'),
    (['-m', 'resnet5O'], 'Close names: '),
])
def test_predict_refuses(model, photos, call, options, message):
    with pytest.raises(SystemExit, match=message):
        call('predict.py', '-m', model, photos, *options)


def test_validate_several_models(model, photos, call, tmp_path):
    torch.manual_seed(3)
    save_checkpoint(timm.create_model('test_resnet', num_classes=3), tmp_path / 'other')
    file = tmp_path / 'results.csv'
    records = json.loads(call(
        'validate.py', '--model', model, tmp_path / 'other', '--data-dir', photos, '--img-size', '32',
        '--results-file', file).out.split('--result\n')[1])
    assert [record['top1'] for record in records] == sorted((r['top1'] for r in records), reverse=True)
    with open(file, newline='') as f:
        reader = csv.DictReader(f)
        assert reader.fieldnames == [
            'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
        assert [row['model'] for row in reader] == [record['model'] for record in records]


def test_validate_counts_unreadable_images(model, call, tmp_path, caplog):
    folder = write_photos(tmp_path, train=1, validation=2)
    (folder / 'validation' / 'red' / '1.png').write_text('not an image')
    options = ['--model', model, '--data-dir', folder, '--img-size', '32']
    top1 = json.loads(call('validate.py', *options).out.split('--result\n')[1])['top1']
    assert '1 of 6 images cannot be read' in caplog.text
    assert top1 in {round(100 * correct / 5, 4) for correct in range(6)}
    with pytest.raises(SystemExit, match=r'validate.py: error: /.*red/1.png cannot be read'):
        call('validate.py', *options, '--on-bad-image', 'error')


def test_a_model_that_fails_does_not_stop_the_others(model, photos, call, tmp_path, capsys):
    with pytest.raises(SystemExit, match='1 of 2 models failed: resnet5O'):
        call('validate.py', '--model', 'resnet5O', model, '--data-dir', photos, '--results-file', tmp_path / 'r.json',
             '--results-format', 'json')
    assert [record['model'] for record in json.loads((tmp_path / 'r.json').read_text())] == [str(model)]


def test_near_miss_of_an_option(call, capsys):
    with pytest.raises(SystemExit):
        call('train.py', '--bach-size', '4')
    assert 'unrecognized arguments: --bach-size 4. Close names: --batch-size' in capsys.readouterr().err


@pytest.fixture(scope='module')
def unfinished(tmp_path_factory):
    """The folders of a model at t = 0 and at 0.25."""
    folders = {}
    for t in (0, 0.25):
        torch.manual_seed(0)
        net = timm_dyacts.set_transition(timm.create_model('test_resnet_belu', num_classes=3, transition=True), t)
        set_pretrained_cfg(net, dict(resolve_data_config({}, model=net), input_size=(3, 32, 32)), from_pretrained=False)
        folders[t] = tmp_path_factory.mktemp('unfinished')
        save_checkpoint(net, folders[t], label_names=list(COLORS))
    return folders


@pytest.mark.parametrize('t', [0, 0.25])
@pytest.mark.parametrize('script', ['predict.py', 'validate.py'])
def test_an_unfinished_transition_gets_one_remark(script, t, model, unfinished, photos, call, tmp_path, caplog):
    folder = unfinished[t]
    images = {'predict.py': [photos], 'validate.py': ['--data-dir', photos]}[script]
    call(script, '-m', folder, *images)
    remark, = [record.getMessage() for record in caplog.records]
    way = f"Train it: timm-dyacts train --model '{folder}' --pretrained --transition-epochs N. Or load" if t == 0 \
        else 'Load'
    assert remark.startswith(
        f"'{folder}' has an unfinished transition (t = {t}), so it is not yet the model that its name says. {way} it, "
        'call finish_transition(model), with which it jumps') and '\n' not in remark
    caplog.clear()
    weights = tmp_path / 'weights.safetensors'
    weights.symlink_to(folder / 'model.safetensors')
    call(script, '-m', 'test_resnet_belu', '--model-kwargs', 'transition=True', '--num-classes', '3', '--checkpoint',
         weights, *images)
    remark, = [record.getMessage() for record in caplog.records]
    assert remark.startswith(f"'{weights}' has an unfinished transition (t = {t})") and 'says. Load it, ' in remark
    caplog.clear()
    call(script, '-m', model, *images)
    assert not caplog.records


def test_the_remark_names_the_run_that_can_go_on(unfinished, photos, call, tmp_path, caplog):
    last = shutil.copytree(unfinished[0.25], tmp_path / 'run' / 'last')
    (tmp_path / 'run' / 'args.yaml').write_text('dataset: digits\n')
    (tmp_path / 'run' / 'checkpoint').mkdir()
    call('predict.py', '-m', last, photos)
    (tmp_path / 'run' / 'checkpoint' / 'state.pt').touch()
    call('predict.py', '-m', last, photos)
    call('predict.py', '-m', 'test_resnet_belu', '--model-kwargs', 'transition=True', '--num-classes', '3',
         '--checkpoint', last / 'model.safetensors', photos)
    without, of_folder, of_file = [record.getMessage() for record in caplog.records]
    assert '--resume' not in without
    for remark in (of_folder, of_file):
        assert f"Train on: timm-dyacts train --resume '{tmp_path / 'run'}'. Or load it, call" in remark


def test_a_finished_model_gets_no_remark(unfinished, photos, call, tmp_path, caplog):
    net = timm.create_model(f'local-dir:{unfinished[0.25]}', pretrained=True)
    save_checkpoint(timm_dyacts.finish_transition(net), tmp_path, label_names=list(COLORS))
    call('predict.py', '-m', tmp_path, photos)
    call('validate.py', '-m', tmp_path, '--data-dir', photos)
    assert not caplog.records


def test_a_size_that_the_model_cannot_compute(photos, tmp_path, call):
    """Whoever evaluates at an odd size, or a config that asks for one, is told so, and not that this is a bug."""
    net = timm.create_model('test_byobnet', num_classes=3)
    set_pretrained_cfg(net, dict(resolve_data_config({}, model=net), input_size=(3, 32, 32)), from_pretrained=False)
    save_checkpoint(net, tmp_path, label_names=list(COLORS))
    for script, options in (('predict.py', [photos]), ('validate.py', ['--data-dir', photos])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(net), 'forward_features', lambda self, x: x[:, :, :, 99:].reshape(7))
            with pytest.raises(SystemExit, match='error: the model cannot compute images of 3 x 48 x 48: '):
                call(script, '--model', tmp_path, *options, '--img-size', '48')
