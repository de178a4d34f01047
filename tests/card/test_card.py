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

from timm_dyacts import SoftPool2d, card
from timm_dyacts.run_folder import Results, Start

ROOT = Path(__file__).parents[2]
SHA = 'ab' * 32


@pytest.fixture(scope='module')
def model():
    model = timm.create_model('resnet10t_dyrelu_b', num_classes=10)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), label_names=[str(i) for i in range(10)])
    return model


def render(model, architecture='resnet10t_dyrelu_b', tag='c3_in1k', results=RESULTS, options=ARGS, **facts):
    config = dict(architecture=architecture, pretrained_cfg=dict(tag=tag, license='apache-2.0'))
    results = Results.from_dict(results) if results else None
    start = card.resolve_start(config, results, options)
    facts = dict(sha256=SHA, requires={'timm': '>=1.0.31'}, files=['args.yaml']) | facts
    return card.render_model_card(
        'user/digits', model, config, results=results, start=start, options=options, **facts)


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
    (dict(warm_start='unchecked'), 'should have been exact, up to rounding, and was not compared', 'approximate'),
    (dict(warm_start=None), 'The training started from the weights', 'warm start'),
    (dict(pretrained=False, source=None, license=None), 'The training started from random weights', 'warm start'),
    (dict(pretrained=False, source='w.pth'), 'The training started from the weights of a file `w.pth`', 'random'),
    (dict(source='w.pth', entries=60, entries_of=75), '`w.pth`, licence apache-2.0. It gave 60 of the 75', 'random'),
    (dict(source='w.pth', entries=75, entries_of=75), 'the weights of a file `w.pth`', 'It gave'),
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
    text = render(model, results=None, options=dict(ARGS, pretrained_path='/data/w.pth'))
    assert 'base_model' not in metadata(text) and 'a file `w.pth`' in text and 'license' not in metadata(text)
    assert 'started from random weights' in render(model, results=None, options=dict(ARGS, pretrained=False))
    assert 'Nothing is on record' in render(model, results=None, options=None)


@pytest.mark.parametrize('architecture, expected', [
    ('test_resnet_dyrelu_b', 'exact'), ('test_vit_dyrelu_b', 'approximate'), ('test_resnet', None),
])
def test_the_warm_start_of_what_is_not_in_the_table_is_worked_out(architecture, expected):
    config = dict(architecture=architecture, pretrained_cfg=dict(tag='r160_in1k'))
    start = card.resolve_start(config, None, dict(model=architecture, pretrained=True))
    assert start.warm_start == expected and start.source == f'timm/{architecture.partition("_dy")[0]}.r160_in1k'
    assert card.resolve_start(config, None, dict(model=architecture, pretrained=False)).warm_start is None
    led = card.resolve_start(config, None, dict(model=architecture, pretrained=True, transition_epochs=1.5))
    assert led.warm_start == 'exact'


def test_the_options_of_the_variant_are_shown():
    model = timm.create_model('test_resnet_dyrelu_b', where='late', act_kwargs=dict(max_hidden=4))
    config = dict(architecture='test_resnet_dyrelu_b', model_args=dict(
        where='late', act_kwargs=dict(max_hidden=4), drop_rate=0.1))
    text = card.render_model_card('user/x', model, config, sha256=SHA, requires={})
    assert "| Options | `where='late'`, `act_kwargs={'max_hidden': 4}` |\n| Classes | " in text
    config['model_args'] = dict(drop_rate=0.1)
    plain = card.render_model_card('user/x', model, config, sha256=SHA, requires={})
    assert '| Options |' not in plain and 'image of 3 x 160 x 160 |\n| Classes | ' in plain


@pytest.mark.parametrize('weights, options, expected', [
    (None, ARGS, Start('resnet10t_dyrelu_b', True, 'timm/resnet10t.c3_in1k', 'apache-2.0', 'exact', None)),
    (None, dict(ARGS, kd_model='resnet50'),
     Start('resnet10t_dyrelu_b', True, 'timm/resnet10t.c3_in1k', 'apache-2.0', 'exact', 'resnet50')),
    (None, dict(ARGS, pretrained_path='/data/w.pth'), Start('resnet10t_dyrelu_b', True, '/data/w.pth', None, 'exact')),
    (None, dict(ARGS, pretrained=False), Start('resnet10t_dyrelu_b', False)),
    (None, {}, Start('resnet10t_dyrelu_b', False)),
    (None, None, None),
    (started(model='mine'), ARGS, Start('mine', *list(RESULTS['start'].values())[1:])),
])
def test_the_start_is_found_out(weights, options, expected):
    config = dict(architecture='resnet10t_dyrelu_b', pretrained_cfg=dict(tag='c3_in1k', license='apache-2.0'))
    assert card.resolve_start(config, weights and Results.from_dict(weights), options) == expected


def test_a_start_that_is_none():
    config = dict(architecture='resnet10t_dyrelu_b', pretrained_cfg=dict(license=['mit']))
    with pytest.raises(ValueError, match=r'model = 3 instead of a text, source = \[1\] .*, kd_model = '):
        card.resolve_start(config, None, dict(model=3, pretrained_path=[1], kd_model={}))
    with pytest.raises(ValueError, match=r"license = \['mit'\] instead of a text or null"):
        card.resolve_start(config, None, dict(pretrained=True))


def test_options_may_lack_the_split(model):
    assert 'expect a little less' not in render(model, options={'model': 'resnet10t_dyrelu_b'})


def test_the_recipe_is_a_command(model):
    recipe = render(model).split('## Recipe')[1].split('\n## ')[0]
    assert 'pip install timm_dyacts\ntimm-dyacts train --config args.yaml\n' in recipe and 'scripts/' not in recipe


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
    assert 'expect a little less' not in render(model, options=dict(ARGS, val_split='train'))


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


@pytest.mark.parametrize('name, kwargs, words', [
    ('test_resnet', dict(act_layer='brelu'), '12 BReLU (own parameters: 0).'),
    ('test_resnet', dict(act_layer='bprelu'), '12 BPReLU (own parameters: 12).'),
    ('test_resnet', dict(aa_layer=SoftPool2d), 'SoftPool2d (own parameters: 0).'),
    ('resnet10t_dyrelu_b', {}, None),
])
def test_the_parameters_of_operators_are_counted(name, kwargs, words):
    model = timm.create_model(name, **kwargs)
    section = render(model, architecture=name).split('## What the operators change')[1].split('\n## ')[0]
    if words is None:
        added = card.measure_size(model).params - card.measure_size(timm.create_model('resnet10t')).params
        words = f'11 DyReLUB (own parameters: {added:,}).'
    assert words in section


def test_parameters_are_those_of_the_paper_beside_them():
    """A model with the operators of two papers, one of which has parameters."""
    model = timm.create_model('test_resnet', act_layer='bprelu', aa_layer=SoftPool2d)
    text = render(model, architecture='test_resnet')
    assert '12 BPReLU (own parameters: 12)' in text and 'SoftPool2d (own parameters: 0)' in text


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
    templates = set((package / 'card' / 'templates').iterdir())
    assert templates <= packaged and package / 'card' / 'templates' / 'model_card.md' in templates
