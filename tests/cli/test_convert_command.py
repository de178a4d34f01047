"""``timm-dyacts convert``: a checkpoint in, a checkpoint out."""
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from support.trained_like import max_diff, output, probe, trained_like
from timm.models import save_for_hf

from timm_dyacts import BReLU, DyReLUB, SoftPool2d, finish_transition, get_transition, hub, set_transition, zoo
from timm_dyacts.cli import main as timm_dyacts
from timm_dyacts.cli.convert import find_target
from timm_dyacts.hub.errors import HubError

PROG = 'timm-dyacts convert'


def run(*options):
    timm_dyacts(['convert', *map(str, options)])


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def config(folder):
    return json.loads((folder / 'config.json').read_text())


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A trained checkpoint of three named classes: (its folder, the model)."""
    folder = tmp_path_factory.mktemp('source') / 'checkpoint'
    model = trained_like('resnet18', num_classes=3)
    save_for_hf(model, folder, model_config=dict(label_names=['a', 'b', 'c']), safe_serialization=True)
    return folder, model


@pytest.fixture
def fails(capsys):
    """The one line that a command ends with."""
    def call(*options):
        with pytest.raises(SystemExit) as exit_info:
            run(*options)
        code = exit_info.value.code
        line = capsys.readouterr().err.splitlines()[-1] if code == 2 else code
        assert '\n' not in line and line.startswith(f'{PROG}: error: ')
        return line.removeprefix(f'{PROG}: error: ')
    return call


@pytest.mark.parametrize('options, architecture, saved', [
    (['--act', 'brelu'], 'resnet18_brelu', {}),
    (['--act', 'brelu', '--layout', 'halves'], 'resnet18_brelu', dict(layout='halves')),
    (['--act', 'dyrelu_b', '--act-kwargs', 'reduction=16', 'lambda_a=0.5', '--where', 'all'],
     'resnet18_dyrelu_b', dict(where='all', act_kwargs=dict(reduction=16, lambda_a=0.5))),
    (['--act', 'dyrelu_c', '--norm', 'none', '--start', 'fit'], 'resnet18_dyrelu_c_nobn', dict(start='fit')),
    (['--act', 'belu'], 'resnet18_belu', {}),
])
def test_a_folder_becomes_a_folder(source, tmp_path, capsys, options, architecture, saved):
    folder, model = source
    run(folder, *options, '--output', tmp_path / 'new')
    text = capsys.readouterr().out
    report = json.loads((tmp_path / 'new' / 'conversion.json').read_text())
    assert f'17 x ReLU -> {report["replaced"][-1]["new"]}' in text or 'BatchNorm2d -> Identity' in text
    assert f'function: {report["function"]}' in text
    assert report['counts'] and report['max_diff'] is not None
    assert {p.name for p in tmp_path.iterdir()} == {'new'}, 'nothing is left beside'
    assert {p.name for p in (tmp_path / 'new').iterdir()} == {'model.safetensors', 'config.json', 'conversion.json'}

    new = config(tmp_path / 'new')
    assert (new['architecture'], new['num_classes'], new['label_names']) == (architecture, 3, ['a', 'b', 'c'])
    args = new.get('model_args', {})
    assert {key: args[key] for key in args if key in ('where', 'layout', 'start', 'act_kwargs', 'pool_kwargs')} == saved
    difference = max_diff(output(load(tmp_path / 'new'), probe()), output(model, probe()))
    assert difference < 1e-4 if report['function'] == 'exact' else difference > 0


def test_the_published_form_of_softpool_is_the_zoos(source, tmp_path):
    run(source[0], '--pool', 'softpool', '--pool-kwargs', 'beta=2.0', '--output', tmp_path / 'new')
    model = load(tmp_path / 'new')
    assert isinstance(model.maxpool, SoftPool2d)
    assert (model.maxpool.kernel_size, model.maxpool.beta) == ((2, 2), 2.0)


def test_there_and_back(source, tmp_path):
    """From a variant of the zoo; the options of what is replaced are not carried on."""
    folder, model = source
    run(folder, '--act', 'brelu', '--layout', 'halves', '--output', tmp_path / 'brelu')
    run(f'local-dir:{tmp_path}/brelu', '--act', 'relu', '--output', tmp_path / 'back')
    assert config(tmp_path / 'back')['architecture'] == 'resnet18'
    state, expected = load(tmp_path / 'back').state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)

    run(tmp_path / 'brelu', '--act', 'dyrelu_b', '--output', tmp_path / 'dyrelu')
    assert config(tmp_path / 'dyrelu')['architecture'] == 'resnet18_dyrelu_b'
    assert torch.equal(output(load(tmp_path / 'dyrelu'), probe()), output(model, probe()))


def test_what_is_not_replaced_keeps_its_options(source, tmp_path):
    run(source[0], '--act', 'dyrelu_b', '--act-kwargs', 'reduction=16', '--output', tmp_path / 'dyrelu')
    run(tmp_path / 'dyrelu', '--norm', 'none', '--output', tmp_path / 'nobn')
    assert config(tmp_path / 'nobn')['architecture'] == 'resnet18_dyrelu_b_nobn'
    model = load(tmp_path / 'nobn')
    assert {m.reduction for m in model.modules() if isinstance(m, DyReLUB)} == {16}
    assert max_diff(output(model, probe()), output(source[1], probe())) < 1e-4


def test_a_name_with_a_file_of_weights(source, tmp_path):
    model = source[1]
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / 'weights.safetensors')
    run('resnet18', '--checkpoint', tmp_path / 'weights.safetensors', '--num-classes', 3, '--act', 'brelu',
        '--output', tmp_path / 'new')
    loaded = load(tmp_path / 'new')
    assert any(isinstance(m, BReLU) for m in loaded.modules())
    assert torch.equal(output(loaded, probe()), output(model, probe()))
    cfg = config(tmp_path / 'new')['pretrained_cfg']
    assert not {'tag', 'license', 'origin_url'} & cfg.keys(), 'nobody knows where these weights come from'


def test_a_fresh_process_loads_it(source, tmp_path):
    (tmp_path / 'new').mkdir()  # an empty folder will do
    process = subprocess.run(
        [sys.executable, '-m', 'timm_dyacts', 'convert', source[0], '--act', 'brelu', '--output', tmp_path / 'new'],
        env=dict(os.environ, HF_HUB_OFFLINE='1'), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f'Written: {tmp_path / "new"}'
    assert torch.equal(output(load(tmp_path / 'new'), probe()), output(source[1], probe()))


# Transitions


@pytest.fixture(scope='module')
def hard_swish(tmp_path_factory):
    """A trained checkpoint of a network that no operator starts exactly in: (its folder, the model)."""
    folder = tmp_path_factory.mktemp('source') / 'checkpoint'
    model = trained_like('mobilenetv3_small_050', num_classes=3)
    save_for_hf(model, folder, safe_serialization=True)
    return folder, model


@pytest.fixture(scope='module')
def unfinished(hard_swish, tmp_path_factory):
    """The folder of an unfinished transition."""
    folder = tmp_path_factory.mktemp('unfinished') / 'belu'
    run(hard_swish[0], '--act', 'belu', '--transition', '--output', folder)
    return folder


@pytest.mark.parametrize('options, saved', [
    (['--act', 'dyrelu_b', '--where', 'late'], dict(where='late', start='fit')),
    (['--act', 'dyrelu_b', '--start', 'relu', '--act-kwargs', 'reduction=4'],
     dict(start='relu', act_kwargs=dict(reduction=4))),
    (['--act', 'belu', '--layout', 'halves', '--norm', 'none'], dict(layout='halves')),
    (['--pool', 'softpool', '--pool-kwargs', 'beta=2.0'], dict(pool_kwargs=dict(beta=2.0))),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_a_transition_is_written_at_its_start(hard_swish, tmp_path, capsys, options, saved):
    folder, model = hard_swish
    run(folder, *options, '--transition', '--output', tmp_path / 'new')
    out = capsys.readouterr().out
    assert 'exact by transition: ' in out
    assert out.endswith(f"timm-dyacts train --model '{tmp_path}/new' --pretrained --transition-epochs N\n")
    report = json.loads((tmp_path / 'new' / 'conversion.json').read_text())
    assert report['function'] == 'exact' and any(r['transition'] for r in report['replaced'])
    new = config(tmp_path / 'new')
    assert new['transition'] == dict(t=0, finished=False)
    args = new['model_args']
    names = ('where', 'layout', 'start', 'act_kwargs', 'pool_kwargs', 'transition')
    assert {key: args[key] for key in args if key in names} == saved | dict(transition=True)

    loaded = load(tmp_path / 'new')
    assert get_transition(loaded) == 0
    difference = max_diff(output(loaded, probe(79)), output(model, probe(79)))
    assert difference == 0 if '--norm' not in options else difference < 1e-4
    if 'late' in options:
        options = [*options, '--start', 'fit']
    run(folder, *options, '--output', tmp_path / 'plain')
    plain = load(tmp_path / 'plain')
    assert torch.equal(output(finish_transition(loaded), probe()), output(plain, probe()))
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_from_one_member_to_another(hard_swish, tmp_path):
    """A bipolar form is what a transition from the base has before it, too."""
    model = trained_like('resnet10t', num_classes=3)
    save_for_hf(model, tmp_path / 'base', safe_serialization=True)
    run(tmp_path / 'base', '--act', 'brelu', '--output', tmp_path / 'brelu')
    run(tmp_path / 'brelu', '--act', 'belu', '--transition', '--output', tmp_path / 'belu')
    assert get_transition(load(tmp_path / 'belu')) == 0
    assert torch.equal(output(load(tmp_path / 'belu'), probe()), output(model, probe()))


@pytest.mark.parametrize('t', [0, 0.25, 1])
def test_what_is_unfinished_is_neither_converted_nor_published(unfinished, tmp_path, fails, t):
    folder = unfinished
    if t:
        folder = tmp_path / 'folder'
        save_for_hf(set_transition(load(unfinished), t), folder, safe_serialization=True)
    ways = {
        0: rf"Train it: timm-dyacts train --model '\S*{folder.name}' --pretrained --transition-epochs N\. Or load it, ",
        0.25: r'Load it, call finish_transition\(model\), with which it jumps',
        1: r'Load it, call finish_transition\(model\), with which it computes the same, and save that\.$',
    }
    for options in (['--norm', 'none'], ['--act', 'relu'], ['--act', 'brelu', '--transition']):
        message = fails(folder, *options, '--output', tmp_path / 'new')
        assert re.match(rf'MODEL must have no unfinished transition, got \S+ at t = {t}\. {ways[t]}', message)
    with pytest.raises(HubError, match=rf'is not finished \(t = {t}\), .* its name says\. {ways[t]}'):
        hub.publish(folder, 'user/name', dry_run=True)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('options, message', [
    (['--act', 'geluu'], "--act must be an activation of timm or of this package. Unknown activation 'geluu'. Close"),
    (['--act', 'brelu', '--num-classes', '-3'], '--num-classes must be at least 0, got -3'),
    (['--act', 'brelu', '--num-classes', '99999999999'], '--num-classes must be at most 10000000, got 99999999999'),
    (['--norm', 'none'], "The zoo must know .* got 'mobilenetv3_small_050_nobn'"),
    (['--act', 'relu'], "The zoo must know .* got 'mobilenetv3_small_050'"),
    (['--act', 'gelu', '--pool', 'softpool'], 'The checkpoint was not written: '),
])
def test_transitions_that_lead_nowhere(hard_swish, source, tmp_path, fails, options, message):
    assert re.match(message, fails(hard_swish[0], *options, '--transition', '--output', tmp_path / 'new'))


def test_transitions_that_cannot_be_made_again(source, hard_swish, tmp_path, fails):
    new = ('--transition', '--output', tmp_path / 'new')
    exact = fails(source[0], '--act', 'brelu', *new)
    assert exact == '--transition must be left out for resnet18_brelu, which starts exactly without one.'
    run(source[0], '--act', 'dyrelu_b', '--output', tmp_path / 'dyrelu')
    back = fails(tmp_path / 'dyrelu', '--act', 'relu', *new)
    assert back == '--transition must be left out for the way back to resnet18, which takes none.'
    assert fails(tmp_path / 'dyrelu', '--norm', 'none', *new).startswith('transition must be left out without act and')
    model = load(tmp_path / 'dyrelu')
    with torch.no_grad():
        model.act1.fc2_bias.fill_(0.5)
    save_for_hf(model, tmp_path / 'moved', safe_serialization=True)
    message = fails(tmp_path / 'moved', '--act', 'belu', *new)
    assert message.startswith(
        "The checkpoint was not written: it does not load as 'resnet18_belu' (a transition is made anew from the base,")
    run(hard_swish[0], '--act', 'dyrelu_b', '--output', tmp_path / 'relu')
    message = fails(tmp_path / 'relu', '--act', 'belu', *new)
    assert message.startswith("The checkpoint was not written: loaded back as 'mobilenetv3_small_050_belu' it gives")
    assert message.endswith('(a transition is made anew from the base, and has to start from a checkpoint of that)')
    assert not (tmp_path / 'new').exists()


# Mistakes


@pytest.mark.parametrize('options, message', [
    (['--act', 'brelu', '--pool', 'softpool'], "The zoo must know .* got 'resnet18_brelu_softpool'. Close names: "),
    (['--act', 'bipolar'], "The zoo must know .* got 'resnet18_bipolar'"),
    (['--act', 'gelu'], "The zoo must know .* got 'resnet18'"),
    (['--norm', 'none'], "The zoo must know .* got 'resnet18_nobn'"),
    ([], 'One of --act, --pool and --norm must be given'),
    (['--act', 'brelu', '--where', 'all'], "where must be left out for act='brelu'"),
    (['--pool', 'softpool', '--act-kwargs', 'reduction=4'], 'act_kwargs must be left out without act'),
    (['--act', 'dyrelu_b', '--act-kwargs', 'reducton=4'], "act_kwargs must hold .* got 'reducton'; its arguments are"),
    (['--act', 'dyrelu_b', '--act-kwargs', 'reduction'], "argument --act-kwargs: must be KEY=VALUE, got 'reduction'"),
    (['--act', 'dyrelu_b', '--act-kwargs', 'reduction=0'], 'reduction must be at least 1, got 0'),
    (['--pool', 'softpol'], "argument --pool: invalid choice: 'softpol'"),
    (['--act', 'brelu', '--laiout', 'halves'], 'unrecognized arguments: --laiout.* Close names: --layout'),
])
def test_bad_options_are_one_line_and_write_nothing(source, tmp_path, fails, options, message):
    assert re.match(message, fails(source[0], *options, '--output', tmp_path / 'new'))
    assert not list(tmp_path.iterdir())


def test_other_bad_input(source, tmp_path, fails):
    assert 'Close names: resnet18' in fails('resnet81', '--act', 'brelu', '--output', tmp_path / 'new')
    assert 'no/such' in fails('local-dir:no/such', '--act', 'brelu', '--output', tmp_path / 'new')
    missing = fails('resnet18', '--checkpoint', 'no/such.pth', '--act', 'brelu', '--output', tmp_path / 'new')
    assert missing == "--checkpoint must be a checkpoint file, got 'no/such.pth', which is no file."
    assert 'required: --output' in fails('resnet18', '--act', 'brelu')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'file').touch()
    for path in (tmp_path / 'full', tmp_path / 'full' / 'file'):
        message = fails(source[0], '--act', 'brelu', '--output', path)
        assert message == f"--output must be a new or empty folder, got '{path}'"
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'folder' / 'config.json').write_text('{}')
    message = fails(tmp_path / 'folder', '--act', 'brelu', '--output', tmp_path / 'new')
    assert message.endswith("config.json' names no architecture")
    assert not (tmp_path / 'new').exists()


def test_an_unknown_architecture_is_refused_before_the_work(tmp_path, fails, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError('the model was created')

    monkeypatch.setattr(timm, 'create_model', work)
    assert 'The zoo must know' in fails('resnet18', '--act', 'bselu', '--output', tmp_path / 'new')


def test_what_does_not_come_back_is_not_put_in_place(source, tmp_path, fails, monkeypatch):
    """An activation that the base does not have leads to another model under its name."""
    run(source[0], '--act', 'brelu', '--output', tmp_path / 'brelu')
    message = fails(tmp_path / 'brelu', '--act', 'gelu', '--output', tmp_path / 'gelu')
    assert message.startswith("The checkpoint was not written: loaded back as 'resnet18' it gives another model")
    assert {p.name for p in tmp_path.iterdir()} == {'brelu'}


def test_targets():
    assert find_target('resnet18', act='brelu').name == 'resnet18_brelu'
    assert find_target('resnet18', pool='softpool').pool_kwargs['kernel_size'] == 2
    assert find_target('resnet18_dyrelu_b', act='belu').name == 'resnet18_belu'
    assert find_target('resnet18_brelu', norm='none').name == 'resnet18_brelu_nobn'
    assert find_target('resnet_brelu_nobn', act='dyrelu_a').name == 'resnet50_dyrelu_a_nobn'
    assert find_target('resnet18_softpool', norm='none').name == 'resnet18_softpool_nobn'
    assert find_target('mobilenetv2_100_brelu', act='relu').name == 'mobilenetv2_100'
    for kwargs in (dict(act='relu'), dict(act='brelu', pool='softpool'), dict(act='bprelu')):
        with pytest.raises(ValueError, match='The zoo must know'):
            find_target('resnet18', **kwargs)
    with pytest.raises(ValueError, match='resnet18_nobn'):
        find_target('resnet18_brelu_nobn', act='relu')
    for variant in zoo.variants():
        assert find_target(variant.base, **{k: variant.recipe.get(k) for k in ('act', 'pool', 'norm')}).name in (
            variant.name, zoo.ALIASES.get(variant.name))
