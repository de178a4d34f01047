"""The options of a training run, under the names that timm's train.py gave them."""
import functools
import re
from dataclasses import dataclass
from typing import Any

from ..evaluation.config import INTERPOLATIONS, DeviceOptions, InputOptions, LoaderOptions, PreprocessingOptions
from ..options import option

__all__ = ['CheckpointInterval', 'TrainConfig']

# One heading of the help each
_data = functools.partial(option, group='Data')
_model = functools.partial(option, group='Model')
_finetuning = functools.partial(option, group='Fine-tuning')
_optimizer = functools.partial(option, group='Optimizer and schedule')
_augmentation = functools.partial(option, group='Augmentation and regularization')
_average = functools.partial(option, group='Exponential moving average of the model')
_processes = functools.partial(option, group='Distributed training (start with torchrun)')
_run = functools.partial(option, group='Run')

# What suits the digits better than the defaults: small pictures, short training, and no flip, as a flipped digit is
# another shape.
_DIGITS_RECIPE = dict(
    img_size=32,
    crop_pct=1.0,
    epochs=10,
    batch_size=64,
    warmup_epochs=1,
    scale=(0.7, 1.0),
    ratio=(0.85, 1.18),
    hflip=0.0,
    color_jitter=0.0,
    workers=0,
)


@dataclass(frozen=True)
class CheckpointInterval:
    """How often a state is written.

    Attributes:
        every: Number of updates or epochs.
        in_epochs: Which of the two.
    """
    every: int
    in_epochs: bool

    @classmethod
    def parse(cls, text: int | str) -> 'CheckpointInterval':
        """Read ``'500'`` or ``'500steps'`` (updates), ``'2epochs'``, or ``'2e'`` for short.

        Raises:
            ValueError: Anything else.
        """
        match = re.fullmatch(r'([1-9]\d*) ?(s|steps?|e|epochs?)?', str(text))
        if match is None:
            raise ValueError(
                f"--checkpoint-interval must be a number of updates such as 500 or '500steps', or of epochs such as "
                f"'1epoch', got {text!r}.")
        return cls(int(match[1]), (match[2] or 's').startswith('e'))

    def is_due(self, updates: int) -> bool:
        """Say whether a state is due after that many updates of the run."""
        return not self.in_epochs and updates % self.every == 0

    def is_due_after_epoch(self, epochs: int) -> bool:
        """Say whether a state is due after that many epochs."""
        return self.in_epochs and epochs % self.every == 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoaderOptions, DeviceOptions, PreprocessingOptions, InputOptions):
    """How to train. What was not given and depends on the data set alone is filled in as the object is made.

    With neither ``dataset`` nor ``data_dir`` the data set is the digits, which have a recipe of their own.
    """
    train_split: str = _data('train', metavar='NAME', help='split to train on')
    val_split: str = _data('validation', metavar='NAME', help='split to evaluate on')
    val_fraction: float = _data(
        0.0, minimum=0, below=1, metavar='F',
        help='hold out this share of the training images, drawn with the seed, and let them tell which epoch is the '
             'best; what it is worth is still measured on the split to evaluate on')
    images_per_class: int | None = _data(
        None, minimum=1, metavar='N', help='train on as many images of each class, drawn with the seed', unset='all')

    model: str = _model('resnet18_dyrelu_b', metavar='NAME', help="name, 'hf-hub:<id>', or folder of a checkpoint")
    pretrained: bool = _model(False, help='start from the pretrained weights')
    pretrained_path: str | None = _model(
        None, metavar='FILE', help='start from this checkpoint file as if it held the pretrained weights')
    initial_checkpoint: str | None = _model(
        None, metavar='FILE', help='load this checkpoint file into the model as it is')
    init: str = _model(
        'default', choices=('default', 'lsuv'),
        help='initialisation of the weights; lsuv for models without normalisation')
    drop: float = _model(0.0, minimum=0, below=1, metavar='PCT', help='dropout rate')
    drop_path: float | None = _model(None, minimum=0, below=1, metavar='PCT', help='stochastic depth rate')
    grad_checkpointing: bool = _model(False, help='recompute activations in the backward pass')

    freeze: str = _finetuning(
        'none', choices=('backbone', 'operators', 'none'),
        help="do not train this part; 'backbone' trains the operators' parameters and the classifier alone")
    unfreeze_epoch: int | None = _finetuning(
        None, minimum=0, metavar='N', help='train all from this epoch on', unset='never')
    lr_ops: float = _finetuning(
        1.0, minimum=0, metavar='SCALE', help="learning rate of the operators' parameters, as a multiple")
    kd_model: str | None = _finetuning(
        None, flags=('--kd-model-name',), metavar='NAME',
        help='teacher to distil from: name, Hub id or folder of a model with the same classes, such as the base of a '
             'variant')
    transition_epochs: float = _finetuning(
        0.0, minimum=0, metavar='N',
        help='lead a variant that does not start exactly as its base from the one to the other over so many epochs, '
             'which may be a fraction; only an epoch that ends after them can be the best')
    transition_sched: str = _finetuning('linear', choices=('linear', 'cosine'), help='how, from update to update')
    kd_temperature: float = _finetuning(4.0, above=0, metavar='T')
    distill_loss_weight: float | None = _finetuning(None, minimum=0, metavar='W', unset='1, or 1 - --task-loss-weight')
    task_loss_weight: float | None = _finetuning(None, minimum=0, metavar='W', unset='1')

    batch_size: int = _optimizer(128, flags=('-b',), minimum=1, metavar='N')
    validation_batch_size: int | None = _optimizer(None, flags=('-vb',), minimum=1, metavar='N', unset='--batch-size')
    epochs: int = _optimizer(30, minimum=1, metavar='N')
    opt: str = _optimizer('adamw', metavar='NAME', help='any of timm.optim')
    opt_eps: float | None = _optimizer(None, minimum=0, metavar='EPS', unset='of the optimizer')
    opt_betas: tuple[float, ...] | None = _optimizer(None, minimum=0, below=1, metavar='BETA', unset='of the optimizer')
    momentum: float = _optimizer(0.9, minimum=0, below=1, metavar='M')
    weight_decay: float = _optimizer(0.05, minimum=0, metavar='WD')
    clip_grad: float | None = _optimizer(None, above=0, metavar='NORM', help='largest gradient norm', unset='no limit')
    clip_mode: str = _optimizer('norm', choices=('norm', 'value', 'agc'), help='what --clip-grad bounds')
    grad_accum_steps: int = _optimizer(1, minimum=1, metavar='N', help='batches whose gradients make one update')
    layer_decay: float | None = _optimizer(
        None, above=0, maximum=1, metavar='RATE', help='layer-wise learning rate decay')
    lr: float = _optimizer(1e-3, above=0, metavar='LR', help='learning rate')
    sched: str = _optimizer(
        'cosine', choices=('cosine', 'tanh', 'poly', 'step', 'wsd', 'constant'),
        help='learning rate schedule, moved by every update')
    warmup_epochs: int = _optimizer(3, minimum=0, metavar='N')
    warmup_lr: float = _optimizer(1e-5, minimum=0, metavar='LR')
    min_lr: float = _optimizer(0.0, minimum=0, metavar='LR')
    decay_epochs: float = _optimizer(
        10.0, above=0, metavar='N', help='epochs between the steps of --sched step, of the decay of --sched wsd')
    decay_rate: float = _optimizer(0.1, above=0, metavar='RATE', help='factor of --sched step, power of --sched poly')

    no_aug: bool = _augmentation(False, help='no augmentation at all')
    scale: tuple[float, float] = _augmentation(
        (0.08, 1.0), above=0, maximum=1, ascending=True, metavar='PCT', help='area of the random crop')
    ratio: tuple[float, float] = _augmentation(
        (3 / 4, 4 / 3), above=0, ascending=True, metavar='RATIO', help='aspect ratio of the random crop')
    hflip: float = _augmentation(0.5, minimum=0, maximum=1, metavar='P')
    vflip: float = _augmentation(0.0, minimum=0, maximum=1, metavar='P')
    color_jitter: float = _augmentation(0.4, minimum=0, metavar='PCT')
    aa: str | None = _augmentation(None, metavar='NAME', help="AutoAugment policy, e.g. 'rand-m9-mstd0.5'")
    train_interpolation: str = _augmentation(
        'random', choices=('random', *INTERPOLATIONS), help='interpolation of the random crop')
    reprob: float = _augmentation(0.0, minimum=0, maximum=1, metavar='P', help='random erasing probability')
    remode: str = _augmentation('pixel', choices=('pixel', 'rand', 'const'), help='random erasing mode')
    recount: int = _augmentation(1, minimum=1, metavar='N', help='random erasing count')
    mixup: float = _augmentation(0.0, minimum=0, metavar='ALPHA', help='mixup if above 0')
    cutmix: float = _augmentation(0.0, minimum=0, metavar='ALPHA', help='cutmix if above 0')
    mixup_prob: float = _augmentation(1.0, minimum=0, maximum=1, metavar='P', help='probability of either, where on')
    mixup_switch_prob: float = _augmentation(
        0.5, minimum=0, maximum=1, metavar='P', help='probability of cutmix where both are on')
    mixup_mode: str = _augmentation(
        'batch', choices=('batch', 'pair', 'elem'), help='what shares the parameters of mixup')
    smoothing: float = _augmentation(0.1, minimum=0, below=1, metavar='EPS')

    model_ema: bool = _average(False, help='keep it, evaluate it, and save the best in ema/')
    model_ema_decay: float = _average(0.9998, minimum=0, below=1, metavar='D')
    model_ema_warmup: bool = _average(False, help='let the decay grow from 0')
    model_ema_force_cpu: bool = _average(False, help='keep it in the memory of the host')

    sync_bn: bool = _processes(False, help='synchronised BatchNorm')
    dist_bn: str = _processes(
        'reduce', choices=('reduce', 'broadcast', 'none'),
        help='what becomes of BatchNorm statistics before an evaluation: the mean of all processes, those of the '
             'first, or each its own')

    seed: int = _run(42, minimum=0, below=2 ** 32, metavar='S')
    output: str = _run('./output/train', metavar='DIR')
    experiment: str | None = _run(None, metavar='NAME', help='name of the run folder', unset='<time>-<model>-<size>')
    eval_metric: str = _run('top1', choices=('top1', 'top5', 'loss'), help='what makes a checkpoint the best')
    val_interval: int = _run(1, minimum=1, metavar='N', help='epochs from one evaluation to the next; the last epoch '
                                                             'always has one')
    early_stopping: int | None = _run(
        None, minimum=1, metavar='N', help='stop after so many epochs without a better value of --eval-metric',
        unset='train all epochs')
    checkpoint_hist: int = _run(
        1, minimum=1, metavar='N',
        help='best checkpoints to keep; with more than 1 each of them has a folder in history/, beside the best one')
    log_interval: int = _run(
        50, minimum=1, metavar='N',
        help='batches between two readings of loss, learning rate, images per second and time left: a line each where '
             'the output is no terminal, and a point for the trackers')
    resume: str | None = _run(
        None, metavar='auto|PATH',
        help="'auto': go on with the run of the same --output and --experiment (without --experiment: of the same "
             'options), or start it; or the folder of a run, or a state file in it. A path alone is enough: the other '
             'options are those of the run')
    checkpoint_interval: int | str = _run(
        '1epoch', metavar='N[epochs]', help='updates, or epochs, from one state that can be resumed to the next')
    log_tensorboard: bool = _run(False, help='log to TensorBoard files in the run folder')
    log_mlflow: bool = _run(False, help='log to MLflow, where its environment variables say')
    log_wandb: bool = _run(False, help='log to Weights & Biases')
    wandb_project: str | None = _run(None, metavar='NAME', help='project there')
    wandb_tags: tuple[str, ...] = _run((), metavar='TAG', help='tags there')
    wandb_resume_id: str | None = _run(None, metavar='ID', help='id of the run there to go on with')

    def implied(self) -> dict[str, Any]:
        values = super().implied()
        if self.dataset is None:
            values['dataset'] = 'digits' if self.data_dir is None else ''
        if values.get('dataset', self.dataset) == 'digits':
            values.update({name: value for name, value in _DIGITS_RECIPE.items() if not self.is_given(name)})
        return values

    def check(self) -> None:
        super().check()
        CheckpointInterval.parse(self.checkpoint_interval)
        if self.images_per_class is not None and self.val_fraction and self.images_per_class < 2:
            raise ValueError(
                f'--images-per-class must be 2 or more with --val-fraction, which holds one of them out, got '
                f'{self.images_per_class}.')
        if self.mixes and self.batch_size % 2:
            raise ValueError(f'--batch-size must be even with --mixup or --cutmix, got {self.batch_size}.')
        if self.transition_epochs > self.epochs:
            raise ValueError(
                f'--transition-epochs must be at most --epochs, {self.epochs}, got {self.transition_epochs:g}.')
        if self.transition_sched != 'linear' and not self.transition_epochs:
            raise ValueError(
                f'--transition-sched must be left out without --transition-epochs, got {self.transition_sched}.')
        if self.init != 'default' and (self.pretrained or self.pretrained_path or self.initial_checkpoint):
            raise ValueError(f'--init {self.init} would overwrite the weights that the run is to start from.')
        if self.distill_loss_weight is None and self.kd_model and (self.task_loss_weight or 0) > 1:
            raise ValueError(
                f'--task-loss-weight must be at most 1 without --distill-loss-weight, which is then 1 minus it, got '
                f'{self.task_loss_weight:g}.')

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and their labels with them."""
        return self.mixup > 0 or self.cutmix > 0

    def best_column(self, kind: str = 'eval') -> str:
        """Give the column of the log that tells which epoch is the best.

        Args:
            kind: ``'eval'`` for the model, ``'ema'`` for its moving average.
        """
        return f'{kind}_holdout_{self.eval_metric}' if self.val_fraction else f'{kind}_{self.eval_metric}'

    @property
    def interval(self) -> CheckpointInterval:
        """How often a state is written."""
        return CheckpointInterval.parse(self.checkpoint_interval)
