"""The training task for timm before 1.0.27 does what timm's own does."""
import pytest
import timm
import torch
from torch import nn

from timm_dyacts.training import TrainConfig, task, train_one_epoch
from timm_dyacts.training.plain_task import PlainTask


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def trained(build_task, **options):
    """The weights, their average, and the loss, after an epoch."""
    model, generator = build(), torch.Generator().manual_seed(1)
    wrapped = build_task(model, nn.CrossEntropyLoss())
    wrapped.setup_ema(decay=0.5, use_warmup=True)
    data = [
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(5)]
    metrics = train_one_epoch(wrapped, data, torch.optim.SGD(model.parameters(), lr=0.5), 0, **options)
    return *model.parameters(), *wrapped.get_trainable_module(ema=True).module.parameters(), metrics['loss']


@pytest.mark.parametrize('options', [
    {}, dict(clip_grad=0.1), dict(clip_grad=0.1, clip_mode='agc'), dict(grad_accum_steps=2),
], ids=str)
def test_it_trains_like_the_one_of_timm(options):
    tasks = pytest.importorskip('timm.task', reason=f'timm {timm.__version__} has no tasks')
    if not task._TIMM_HAS_TASKS:
        pytest.skip(f'the tasks of timm {timm.__version__} are not those of today')
    ours, theirs = trained(PlainTask, **options), trained(tasks.ClassificationTask, **options)
    assert len(ours) == len(theirs) == 9 and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b))
                                                 for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], next(build().parameters())), 'it does train'


def test_compiled():
    wrapped = PlainTask(build(), nn.CrossEntropyLoss())
    wrapped.compile(backend='eager')
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    result = wrapped(images, labels)
    assert torch.equal(result['output'], build()(images)) and result['loss'].requires_grad
    assert wrapped.eval_model is wrapped.get_trainable_module()


def test_distillation_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(task, '_TIMM_HAS_TASKS', False)
    config = TrainConfig(kd_model='resnet18')
    with pytest.raises(ImportError, match=rf'--kd-model needs timm>=1\.0\.27, got timm {timm.__version__}'):
        task.build_task(config, build(), torch.device('cpu'))
