"""Freezing, learning rates and weight decay of the operators' parameters; LSUV; distillation."""
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.photos import write_photos
from support.small_run import config_of, train_small
from support.versions import needs_timm

import timm_dyacts  # noqa: F401
from timm_dyacts.operators import operator_parameters
from timm_dyacts.training import TrainConfig, save_checkpoint
from timm_dyacts.training.finetune import build_optimizer, freeze, init_head, unfreeze
from timm_dyacts.training.task import build_task


def parse(*argv):
    return config_of('--data-dir', 'x', *argv)


def dynamic(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3, act_layer='dyrelu_b', **kwargs)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return model


@pytest.fixture
def run(tmp_path, without_pictures):
    photos = write_photos(tmp_path / 'photos')

    def call(*options):
        return Path(train_small(photos, tmp_path / 'out', '--warmup-epochs', 0, *options).folder)
    return call


def group_of(optimizer, parameter):
    [group] = [g for g in optimizer.param_groups if any(p is parameter for p in g['params'])]
    return group


def test_operator_parameters_are_those_that_the_base_has_not():
    base = timm.create_model('resnet18')
    variant = timm.create_model('resnet18_dyrelu_b')
    assert set(operator_parameters(variant)) == set(dict(variant.named_parameters())) - set(
        dict(base.named_parameters()))
    assert operator_parameters(base) == {}
    assert len(operator_parameters(timm.create_model('resnet18', act_layer='bprelu'))) == 17


@pytest.mark.parametrize('options', [[], ['--lr-ops', '5'], ['--lr-ops', '5', '--layer-decay', '0.5']], ids=' '.join)
def test_no_weight_decay_on_biases_of_hyper_functions(options):
    model = dynamic()
    optimizer = build_optimizer(parse(*options), model)
    for name, parameter in operator_parameters(model).items():
        assert (group_of(optimizer, parameter)['weight_decay'] == 0) == name.endswith('_bias'), name


def test_lr_ops_scales_the_operators_alone():
    model = dynamic()
    plain = build_optimizer(parse('--layer-decay', '0.5'), model)
    scaled = build_optimizer(parse('--layer-decay', '0.5', '--lr-ops', '10'), model)
    operators = operator_parameters(model)
    for name, parameter in model.named_parameters():
        ratio = group_of(scaled, parameter)['lr_scale'] / group_of(plain, parameter)['lr_scale']
        assert ratio == pytest.approx(10 if name in operators else 1)
        assert group_of(scaled, parameter)['weight_decay'] == group_of(plain, parameter)['weight_decay']


def test_lr_ops_needs_operators():
    with pytest.raises(ValueError, match='--lr-ops 2 needs a model whose operators have parameters'):
        build_optimizer(parse('--lr-ops', '2'), timm.create_model('test_resnet'))


def test_freeze_backbone_leaves_operators_and_classifier():
    model = dynamic()
    norms = freeze(model, 'backbone')
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {*operator_parameters(model), 'fc.weight', 'fc.bias'}
    assert norms and all(hasattr(norm, 'running_mean') for norm in norms)
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_operators_and_none():
    model = dynamic()
    assert freeze(model, 'none') == [] and all(p.requires_grad for p in model.parameters())
    freeze(model, 'operators')
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(operator_parameters(model))
    with pytest.raises(ValueError, match='--freeze operators needs operators with parameters'):
        freeze(timm.create_model('test_resnet'), 'operators')


def test_a_frozen_backbone_keeps_every_value(run, tmp_path):
    """Parameters and BatchNorm statistics; the operators and the classifier move. After unfreezing all move."""
    model = dynamic()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(start, tmp_path / 'start.pth')
    options = ['--initial-checkpoint', str(tmp_path / 'start.pth'), '--model-kwargs', 'act_layer=dyrelu_b']
    frozen = load_file(run(*options, '--freeze', 'backbone') / 'model.safetensors')
    free = load_file(run(*options, '--freeze', 'backbone', '--unfreeze-epoch', '0') / 'model.safetensors')
    own = set(operator_parameters(model)) | {'fc.weight', 'fc.bias'}
    for name, value in start.items():
        if name not in own:
            assert torch.equal(frozen[name], value), name
    assert not torch.equal(frozen['fc.weight'], start['fc.weight'])
    assert any(not torch.equal(frozen[name], start[name]) for name in own if name.endswith('fc2_bias'))
    assert not torch.equal(free['conv1.0.weight'], start['conv1.0.weight'])


def test_frozen_operators_are_trained_from_the_unfreeze_epoch_on(run):
    options = ['--model-kwargs', 'act_layer=dyrelu_b', '--freeze', 'operators', '--epochs', '2']
    for unfreeze_options, is_trained in (([], False), (['--unfreeze-epoch', '1'], True)):
        weights = load_file(run(*options, *unfreeze_options) / 'last' / 'model.safetensors')
        hyper = [value for name, value in weights.items() if name.endswith('fc2_weight')]
        assert hyper and any(value.any() for value in hyper) == is_trained, 'they start at zero'


def test_a_backbone_without_statistics_is_trained_from_the_unfreeze_epoch_on(run):
    options = ['--model', 'test_vit', '--img-size', '64', '--freeze', 'backbone']
    frozen = load_file(run(*options) / 'last' / 'model.safetensors')
    free = load_file(run(*options, '--epochs', '2', '--unfreeze-epoch', '1') / 'last' / 'model.safetensors')
    assert not torch.equal(free['patch_embed.proj.weight'], frozen['patch_embed.proj.weight'])


def test_lsuv_starts_a_network_without_norms(run):
    options = ['--model', 'resnet10t_brelu_nobn', '--lr', '1e-30', '--warmup-lr', '0']
    weights = load_file(run(*options, '--init', 'lsuv') / 'model.safetensors')
    default = load_file(run(*options) / 'model.safetensors')
    rows = weights['layer1.0.conv1.weight'].flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)  # orthogonal
    assert not torch.equal(weights['layer1.0.conv1.weight'], default['layer1.0.conv1.weight'])


def test_lsuv_would_overwrite_pretrained_weights(run):
    with pytest.raises(ValueError, match='--init lsuv would overwrite the weights'):
        run('--init', 'lsuv', '--pretrained')


def test_initial_checkpoint_is_the_start(run, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    folder = run('--initial-checkpoint', str(tmp_path / 'start.pth'), '--lr', '1e-30', '--warmup-lr', '0')
    assert torch.equal(load_file(folder / 'model.safetensors')['fc.weight'], model.fc.weight)
    with pytest.raises(FileNotFoundError, match="--initial-checkpoint must be a checkpoint file, got 'nowhere'"):
        run('--initial-checkpoint', 'nowhere')


@needs_timm('1.0.27')
def test_distillation_is_from_the_teacher_in_eval_mode(tmp_path):
    """Labels weigh 0.3, the teacher's answers at temperature 2 the rest; the teacher normalises in its own way."""
    config = TrainConfig(
        kd_model=tmp_path / 'teacher', kd_temperature=2, task_loss_weight=0.3, num_classes=3, in_chans=3)
    torch.manual_seed(0)
    teacher, student = (timm.create_model('test_resnet', num_classes=3).eval() for _ in range(2))
    teacher.pretrained_cfg.update(mean=(0.5,) * 3, std=(0.5,) * 3)
    save_checkpoint(teacher, tmp_path / 'teacher')
    task = build_task(config, student, torch.device('cpu'))
    task.get_trainable_module().eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        mean, std = (torch.tensor(student.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
        target = (teacher((images * std + mean - 0.5) / 0.5) / 2).softmax(1)
        logits = student(images)
        divergence = (target * (target.log() - (logits / 2).log_softmax(1))).sum(1).mean() * 4
        smoothed = 0.9 * F.cross_entropy(logits, labels) - 0.1 * logits.log_softmax(1).mean()
        torch.testing.assert_close(task(images, labels)['loss'], 0.3 * smoothed + 0.7 * divergence)


@needs_timm('1.0.27')
def test_distillation_trains(run):
    assert (run('--kd-model', str(run())) / 'model.safetensors').is_file()


@needs_timm('1.0.27')
def test_a_teacher_must_have_the_classes(run, tmp_path):
    save_checkpoint(timm.create_model('test_resnet', num_classes=5), tmp_path / 'five')
    with pytest.raises(ValueError, match='--kd-model must have the 3 classes and 3 input channels .* with 5 and 3'):
        run('--kd-model', str(tmp_path / 'five'))
    with pytest.raises(ValueError, match="--kd-model 'resnet5O' is neither .* Close names: .*resnet50"):
        run('--kd-model', 'resnet5O')


# The optimizer's other options


@pytest.mark.parametrize('options', [[], ['--lr-ops', '5']], ids=' '.join)
def test_arguments_of_the_optimizer(options):
    optimizer = build_optimizer(parse('--opt', 'sgd', '--opt-kwargs', 'nesterov=False', *options), dynamic())
    assert not optimizer.defaults['nesterov']
    assert build_optimizer(parse('--opt', 'sgd', *options), dynamic()).defaults['nesterov']
    with pytest.raises(ValueError, match=r"--opt-kwargs must be arguments of --opt sgd, got \{'amsgrad': True\}"):
        build_optimizer(parse('--opt', 'sgd', '--opt-kwargs', 'amsgrad=True', *options), dynamic())
    with pytest.raises(ValueError, match='--opt-kwargs must not hold lr, which an option of its own gives'):
        build_optimizer(parse('--opt-kwargs', 'lr=1', *options), dynamic())


@needs_timm('1.0.17')
@pytest.mark.parametrize('options', [[], ['--lr-ops', '5']], ids=' '.join)
def test_weight_decay_of_all(options):
    groups = build_optimizer(parse('--opt-kwargs', 'filter_bias_and_bn=False', *options), dynamic()).param_groups
    assert {group['weight_decay'] for group in groups} == {0.05}, 'biases and all'


@needs_timm('1.0.17')
@pytest.mark.parametrize('options, share', [([], 1), (['--lr-ops', '2'], 2)], ids=str)
def test_bounds_of_layer_decay(options, share):
    def scales(*bounds):
        model = dynamic()
        config = parse('--layer-decay', '0.5', *bounds, *options)
        return {group['lr_scale'] for group in build_optimizer(config, model).param_groups}, model

    free, _ = scales()
    assert min(free) < 0.1 < 1 <= max(free)
    bounded, _ = scales('--layer-decay-min-scale', '0.3')
    assert min(bounded) == 0.3 and max(bounded) == max(free) == share
    some, model = scales('--layer-decay-no-opt-scale', '0.3')
    assert min(some) == 0.5
    assert not all(p.requires_grad for p in model.parameters())


def test_an_old_timm_has_no_bounds(monkeypatch):
    monkeypatch.setattr('timm_dyacts.training.finetune.create_optimizer_v2', lambda model, **kwargs: None)
    with pytest.raises(ImportError, match=r'--layer-decay-min-scale and .* needs timm>=1\.0\.17'):
        build_optimizer(parse('--layer-decay', '0.5', '--layer-decay-min-scale', '0.1'), dynamic())


def test_the_start_of_the_classifier():
    model = dynamic()
    before = model.fc.weight.detach().clone()
    init_head(model, 0.5, None)
    assert torch.equal(model.fc.weight, before / 2)
    init_head(model, None, -3.0)
    assert torch.equal(model.fc.weight, before / 2) and model.fc.bias.tolist() == [-3.0] * 3
    for headless in (timm.create_model('test_resnet', num_classes=0), torch.nn.ReLU()):
        with pytest.raises(ValueError, match='--head-init-scale and --head-init-bias need a classifier'):
            init_head(headless, 0.5, None)


@pytest.mark.parametrize('options, message', [
    (['--bn-eps', '0.1'], '--bn-eps needs a model that takes it, such as an EfficientNet .* got --model .test_resnet'),
    (['--model', 'test_vit', '--drop-block', '0.1'], '--drop-block needs a model that takes it'),
    (['--gp', 'median'], "--gp 'median' is no global pooling of this model"),
    (['--input-img-mode', 'L'], "--input-img-mode must have the 3 channels of the model, got 'L', which has 1"),
    (['--input-key', 'image'], 'input_key must be left out but for a data set hfds/..., hfids/..., tfds/..., wds/...'),
    (['--val-num-samples', '3'], 'num_samples must be left out but for a data set hfids/..., tfds/..., wds/...'),
    (['--cutmix-minmax', '0.5', '0.501'], '--cutmix-minmax must leave a choice of sides .* images of 32 pixels'),
], ids=str)
def test_what_does_not_fit_model_or_data(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(*options)
