"""How models are written, and in which order they are trained."""
from pathlib import Path

import pytest

from timm_dyacts.options import declarations
from timm_dyacts.study.plan import Contender, parse_contenders, plan_runs
from timm_dyacts.training import TrainConfig


def parse(*specs):
    return parse_contenders(specs, declarations(TrainConfig))


def test_models_as_on_the_command_line():
    assert parse('resnet18', 'again=resnet18') == [Contender('resnet18', 'resnet18'), Contender('again', 'resnet18')]
    spec = 'resnet18_dyrelu_b:act_kwargs.reduction=32,lr=0.01,act_kwargs.k=3,scale=[0.5, 1.0]'
    assert parse(spec) == [Contender(
        spec, 'resnet18_dyrelu_b', dict(lr=0.01, scale=[0.5, 1.0]), dict(act_kwargs=dict(reduction=32, k=3)))]
    assert parse('x=hf-hub:user/name:epochs=2', 'local-dir:a/b') == [
        Contender('x', 'hf-hub:user/name', dict(epochs=2)), Contender('local-dir:a/b', 'local-dir:a/b')]


def test_models_from_a_file(tmp_path):
    path = tmp_path / 'models.yaml'
    path.write_text('resnet18:\nslow: {model: resnet18_dyrelu_b, lr: 0.1, act_kwargs: {k: 3}}\n')
    assert parse(str(path)) == [
        Contender('resnet18', 'resnet18'),
        Contender('slow', 'resnet18_dyrelu_b', dict(lr=0.1), dict(act_kwargs=dict(k=3)))]


@pytest.mark.parametrize('specs, words', [
    (['a', 'a'], 'different labels, got a more than once'),
    (['a:'], r'must be \[label=\]model'),
    (['a:lr'], r'must be \[label=\]model'),
    (['a:lr=1,x'], "option=value, got 'x'"),
    (['a:seed=3'], 'sets seed itself'),
    (['a:act_kwargs=3,act_kwargs.k=2'], 'cannot be both'),
])
def test_what_is_no_model(specs, words):
    with pytest.raises(ValueError, match=words):
        parse(*specs)


@pytest.mark.parametrize('text, words', [('- a\n', 'one entry per label'), ('a: [1]\n', 'one entry'), ('{', 'YAML')])
def test_files_that_hold_no_models(tmp_path, text, words):
    (tmp_path / 'models.yml').write_text(text)
    with pytest.raises(ValueError, match=words):
        parse(str(tmp_path / 'models.yml'))


def test_seeds_come_one_after_the_other():
    runs = list(plan_runs(parse('a', 'x=b:lr=0.1'), (3, 4), Path('study')))
    assert [(run.contender.label, run.seed) for run in runs] == [('a', 3), ('x', 3), ('a', 4), ('x', 4)]
    assert runs[1].folder == Path('study/runs/x/seed-3')
    assert len({run.folder for run in plan_runs(parse('b:lr=0.1', 'b:lr=0.2'), (0,), Path('study'))}) == 2
