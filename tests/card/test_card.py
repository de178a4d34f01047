"""Cards: metadata that the Hub takes, snippets that run, and no figure that nobody measured."""
import ast
import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from support.loopback_hub import check_card
from support.run_folder import ARGS, RESULTS

from timm_dyacts import card

ROOT = Path(__file__).parents[2]
SHA = 'ab' * 32


@pytest.fixture(scope='module')
def model():
    model = timm.create_model('resnet10t_dyrelu_b', num_classes=10)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), label_names=[str(i) for i in range(10)])
    return model


def render(model, architecture='resnet10t_dyrelu_b', tag='c3_in1k', **facts):
    defaults = dict(sha256=SHA, requires={'timm': '>=1.0.31'}, results=RESULTS, args=ARGS, files=['args.yaml'])
    config = dict(architecture=architecture, pretrained_cfg=dict(tag=tag, license='apache-2.0'))
    return card.render_model_card('user/digits', model, config, **defaults | facts)


def metadata(text):
    assert check_card(text) == ([], [])
    return ModelCard(text).data.to_dict()


def started(**changes):
    return dict(RESULTS, start=dict(RESULTS['start'], **changes))


def test_metadata(model):
    assert metadata(render(model)) == dict(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_dyacts', 'dynamic-relu'],
        license='apache-2.0',
        base_model='timm/resnet10t.c3_in1k',
        base_model_relation='finetune',
        datasets=['digits'],
        metrics=['accuracy'],
        **{'model-index': [dict(name='digits', results=[dict(
            task=dict(type='image-classification', name='Image Classification'),
            dataset=dict(name='digits', type='digits', split='validation'),
            metrics=[
                dict(type='accuracy', value=98.6111, name='Top-1 accuracy'),
                dict(type='accuracy', value=99.7222, name='Top-5 accuracy'),
            ],
        )])]},
    )


@pytest.mark.parametrize('name, expected', [
    ('cc-by-nc-4.0', dict(license='cc-by-nc-4.0')),
    ('fastvit-license', dict(license='other', license_name='fastvit-license')),
    (None, {}),
])
def test_the_licence_is_that_of_the_source(model, name, expected):
    data = metadata(render(model, results=started(license=name)))
    assert {k: v for k, v in data.items() if k.startswith('license')} == expected
    assert f'| Licence | {name or "none was given"} |' in render(model, results=started(license=name))


def test_a_licence_is_given_only_to_weights_that_inherit_none(model):
    assert metadata(render(model, results=started(license=None), license='mit'))['license'] == 'mit'
    with pytest.raises(ValueError, match='license .* must be left out.* apache-2.0'):
        render(model, license='mit')


@pytest.mark.parametrize('source, base_model, words', [
    ('timm/resnet10t.c3_in1k', 'timm/resnet10t.c3_in1k', 'https://huggingface.co/timm/resnet10t.c3_in1k'),
    ('hf-hub:me/mine@v1', 'me/mine', 'me/mine@v1'),
    ('https://example.org/w.pth', None, '<https://example.org/w.pth>'),
    ('/home/me/secret-project/w.safetensors', None, 'a file `w.safetensors`'),
    ('weights/w.safetensors', None, 'a file `w.safetensors`'),
])
def test_the_source(model, source, base_model, words):
    text = render(model, results=started(source=source))
    assert metadata(text).get('base_model') == base_model
    assert words in text and 'secret-project' not in text


@pytest.mark.parametrize('start, words, absent', [
    (dict(warm_start='exact'), 'The warm start was exact', 'approximate'),
    (dict(warm_start='approximate'), 'The warm start was approximate', 'exact'),
    (dict(warm_start=None), 'The training started from the weights', 'warm start'),
    (dict(pretrained=False, source=None, license=None), 'The training started from random weights', 'warm start'),
    (dict(pretrained=False, source='w.pth'), 'The training started from the weights of a file `w.pth`', 'random'),
    (dict(kd_model='timm/resnet50.a1_in1k'), 'teacher of its distillation was timm/resnet50.a1_in1k', 'random'),
])
def test_the_warm_start(model, start, words, absent):
    text = render(model, results=started(**start))
    section = text.split('## What the operators change')[1].split('\n## ')[0]
    assert words in section and absent not in section


def test_without_results_the_options_tell_the_start_and_nothing_is_claimed(model):
    text = render(model, results=None)
    assert 'no evaluation came with this checkpoint' in text and 'Nobody has measured how good it is' in text
    assert '%' not in text.replace('.1%}', '').split('## Recipe')[0]
    assert metadata(text)['base_model'] == 'timm/resnet10t.c3_in1k'
    assert 'model-index' not in metadata(text) and 'metrics' not in metadata(text)
    text = render(model, results=None, args=dict(ARGS, pretrained_path='/data/w.pth'))
    assert 'base_model' not in metadata(text) and 'a file `w.pth`' in text and 'license' not in metadata(text)
    assert 'started from random weights' in render(model, results=None, args=dict(ARGS, pretrained=False))
    assert 'Nothing is on record' in render(model, results=None, args=None)


def test_results_say_what_was_measured_where_and_when(model):
    results = render(model).split('## Results')[1].split('\n## ')[0]
    for fact in ('2026-11-20', 'best epoch', 'digits', 'validation', '360', '98.61 %', '99.72 %', '0.0456',
                 '3 x 32 x 32', 'bicubic', 'torch 2.15.0', 'timm_dyacts 0.1.0'):
        assert fact in results


@pytest.mark.parametrize('name, shown, known', [
    ('hfds/uoft-cs/cifar10', 'hfds/uoft-cs/cifar10', 'uoft-cs/cifar10'),
    ('torch/cifar10', 'torch/cifar10', 'cifar10'),
    ('/home/me/my flowers/', 'my flowers', 'my-flowers'),
    ('./flowers', 'flowers', 'flowers'),
])
def test_the_data_set(model, name, shown, known):
    text = render(model, results=dict(RESULTS, dataset=name))
    dataset = metadata(text)['model-index'][0]['results'][0]['dataset']
    assert (dataset['name'], dataset['type']) == (shown, known) and metadata(text)['datasets'] == [known]
    assert f'| {shown} | validation |' in text and '/home/me' not in text


def test_pictures_are_shown(model):
    text = render(model, files=['args.yaml', 'confusion.png', 'curves.png'])
    assert '![confusion](confusion.png)' in text and '![curves](curves.png)' in text


def test_the_best_epoch_of_a_split_flatters_that_split(model):
    assert 'expect a little less' in render(model)
    assert 'expect a little less' not in render(model, weights='last')
    assert 'expect a little less' not in render(model, args=dict(ARGS, val_split='train'))


@pytest.mark.parametrize('name, what, cited', [
    ('resnet10t_dyrelu_b', '11 DyReLUB', '2003.10027'),
    ('resnet10t_softpool', 'SoftPool2d', '2101.00440'),
    ('resnet10t_brelu', 'BReLU', '1709.04054'),
])
def test_operators_are_those_that_are_in_the_model(name, what, cited):
    with torch.device('meta'):
        text = render(timm.create_model(name), architecture=name)
    assert what in text and cited in text and 'zenodo.4414861' in text
    assert len(re.findall(r'arxiv.org/abs', text)) == 1


def test_a_plain_model_has_none():
    text = render(timm.create_model('test_resnet'), architecture='test_resnet')
    assert 'None of them is in this model' in text and 'arxiv' not in text


def test_two_classes_have_no_top_5():
    text = render(timm.create_model('test_resnet', num_classes=2), architecture='test_resnet')
    metrics = metadata(text)['model-index'][0]['results'][0]['metrics']
    assert [metric['name'] for metric in metrics] == ['Top-1 accuracy']
    assert 'topk(2)' in text


def test_size_is_counted():
    with torch.device('meta'):
        size = card.measure_size(timm.create_model('resnet50'))
    assert size == card.Size(params=25557032, macs=4089184256, input_size=(3, 224, 224))


def test_counting_changes_nothing():
    model = timm.create_model('test_resnet').train()
    before = copy.deepcopy(model.state_dict())
    card.measure_size(model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_missing_fact_is_an_error_and_no_blank():
    with pytest.raises(Exception, match='undefined'):
        card.render('model_card.md', repo_id='user/name')


def test_every_snippet_begins_with_the_import(model):
    snippets = re.findall(r'```python\n(.*?)```', render(model), re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        assert snippet.startswith('import timm_dyacts')
        compile(snippet, 'card', 'exec')


def test_templates_are_in_the_wheel():
    patterns = re.search(r'^timm_dyacts = (\[.*\])$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    package = ROOT / 'timm_dyacts'
    packaged = {path for pattern in ast.literal_eval(patterns) for path in package.glob(pattern)}
    assert set((package / 'templates').iterdir()) <= packaged
