"""``create_model('<variant>', transition=True)``: from a checkpoint of the base, exactly, and saved with it."""
import json

import pytest
import timm
import torch
from support.trained_like import output, probe, trained_like
from timm.models import save_for_hf

from timm_dyacts import finish_transition, get_transition, set_transition

BASE = 'mobilenetv3_small_050'


@pytest.fixture(scope='module')
def base():
    return trained_like(BASE)


@pytest.fixture(scope='module')
def file(base, tmp_path_factory):
    path = tmp_path_factory.mktemp('base') / 'base.pt'
    torch.save(base.state_dict(), path)
    return path


def create(operator, file=None, **kwargs):
    overlay = None if file is None else dict(file=str(file))
    return timm.create_model(
        f'{BASE}_{operator}', pretrained=file is not None, pretrained_cfg_overlay=overlay, **kwargs).eval()


def save(model, folder):
    folder.mkdir()
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('operator', ['dyrelu_b', 'softpool', 'brelu', 'belu'])
def test_from_the_checkpoint_of_the_base_to_the_variant(base, file, operator, tmp_path):
    model = create(operator, file, transition=True)
    assert torch.equal(output(model, probe(79)), output(base, probe(79)))
    assert model.conversion.function == 'exact' and get_transition(model) == 0
    assert model.pretrained_cfg['notes'][-1].endswith('warm start exact, by transition')

    set_transition(model, 0.375)
    config = save(model, tmp_path / 'unfinished')
    assert config['model_args']['transition'] is True
    loaded = timm.create_model(f'local-dir:{tmp_path / "unfinished"}', pretrained=True)
    assert get_transition(loaded) == 0.375
    assert torch.equal(output(loaded, probe()), output(model, probe()))

    finish_transition(model)
    config = save(model, tmp_path / 'finished')
    assert 'transition' not in config['model_args']
    assert config['model_args'].get('start') == ('fit' if operator == 'dyrelu_b' else None)
    loaded = timm.create_model(f'local-dir:{tmp_path / "finished"}', pretrained=True)
    assert torch.equal(output(loaded, probe()), output(model, probe()))
    start = dict(start='fit') if operator == 'dyrelu_b' else {}
    direct = create(operator, file, **start)
    assert list(direct.state_dict()) == list(model.state_dict())
    assert torch.equal(output(direct, probe()), output(model, probe()))


def test_the_start_that_was_asked_for_is_kept(file, tmp_path):
    model = create('dyrelu_b', file, transition=True, start='relu')
    assert save(finish_transition(model), tmp_path / 'finished')['model_args']['start'] == 'relu'


def test_where_the_start_is_exact_anyway_nothing_changes():
    model = timm.create_model('mobilenetv2_050_dyrelu_b', transition=True)
    plain = timm.create_model('mobilenetv2_050_dyrelu_b')
    assert get_transition(model) is None
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.conversion.notes[0].startswith('transition=True changes nothing')
    assert model.pretrained_cfg['notes'] == plain.pretrained_cfg['notes']
    assert 'start' not in model._model_args


def test_the_published_stem_is_led_to_from_its_max_pool():
    base = trained_like('resnet18', num_classes=10)
    model = timm.create_model('resnet18_softpool', num_classes=10, transition=True)
    state = model.state_dict() | base.state_dict()
    model.load_state_dict(state)
    assert model.maxpool.new.kernel_size == (2, 2)
    for size in (64, 65, 67):
        assert torch.equal(output(model, probe(size)), output(base, probe(size)))


def test_features(base, file):
    model = create('softpool', file, transition=True, features_only=True)
    plain = timm.create_model(BASE, features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    for ours, theirs in zip(output(model, probe()), output(plain, probe()), strict=True):
        assert ours.shape == theirs.shape
    assert get_transition(model) == 0
    finish_transition(model)
    assert get_transition(model) is None


def test_what_it_is_not_for(file, tmp_path):
    save(create('softpool', file), tmp_path / 'plain')
    with pytest.raises(ValueError, match=f'transition must be left out .* one of {BASE}_softpool itself, got True'):
        timm.create_model(f'local-dir:{tmp_path / "plain"}', pretrained=True, transition=True)
    for value in ('true', 1):
        with pytest.raises(ValueError, match='transition must be True or False, got'):
            create('softpool', transition=value)
    save(create('dyrelu_b', file, transition=True), tmp_path / 'unfinished')
    with pytest.raises(RuntimeError, match='neither one of'):
        timm.create_model(f'local-dir:{tmp_path / "unfinished"}', pretrained=True, transition=False)
    save(create('softpool', file, transition=True), tmp_path / 'unfinished_pool')
    with pytest.raises(RuntimeError, match='neither one of'):
        timm.create_model(f'local-dir:{tmp_path / "unfinished_pool"}', pretrained=True, transition=False)
