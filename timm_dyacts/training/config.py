"""The options of a training run, under the names that timm's train.py gave them."""
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.optim import OptimInfo, get_optimizer_info, list_optimizers

from ..data.augment import check_auto_augment
from ..evaluation.config import INTERPOLATIONS, DeviceOptions, InputOptions, LoaderOptions, PreprocessingOptions
from ..options import declarations, option, plain
from ..run_folder import check_folder_name
from ..suggest import close_names
from . import timm_args

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


# The learning rate where neither --lr nor --lr-base is given
_LR = 1e-3
# Shares of the epochs at which --sched multistep steps by itself, those of timm's defaults
_MILESTONES = (0.3, 0.6, 0.9)
_WITH_CYCLES = ('cosine', 'tanh', 'poly')
_STEPPED = ('step', 'multistep', 'plateau', 'poly')
# What options mean nothing without: a test of the other options, what it tests in words, and the options
_NEEDED = (
    (lambda c: c.transition_epochs, '--transition-epochs', ('transition_sched',)),
    (lambda c: c.freeze != 'none', '--freeze', ('unfreeze_epoch',)),
    (lambda c: c.kd_model, '--kd-model', ('kd_temperature', 'distill_loss_weight', 'task_loss_weight')),
    (lambda c: c.clip_grad, '--clip-grad', ('clip_mode',)),
    (lambda c: c.layer_decay, '--layer-decay', ('layer_decay_min_scale', 'layer_decay_no_opt_scale')),
    (lambda c: c.lr_base, '--lr-base', ('lr_base_size', 'lr_base_scale')),
    (lambda c: c.lr_noise, '--lr-noise', ('lr_noise_pct', 'lr_noise_std')),
    (lambda c: c.lr_cycle_limit > 1, '--lr-cycle-limit above 1', ('lr_cycle_mul', 'lr_cycle_decay')),
    (lambda c: c.sched in _WITH_CYCLES, '--sched cosine, tanh or poly', ('lr_cycle_limit', 'cooldown_epochs')),
    (lambda c: c.sched in ('cosine', 'poly'), '--sched cosine or poly', ('lr_k_decay',)),
    (lambda c: c.sched in (*_WITH_CYCLES, 'wsd', 'plateau'), '--sched cosine, tanh, poly, wsd or plateau', ('min_lr',)),
    (lambda c: c.sched in _STEPPED, '--sched step, multistep, plateau or poly', ('decay_rate',)),
    (lambda c: c.sched in ('step', 'wsd'), '--sched step or wsd', ('decay_epochs',)),
    (lambda c: c.sched == 'multistep', '--sched multistep', ('decay_milestones',)),
    (lambda c: c.sched == 'plateau', '--sched plateau', ('patience_epochs',)),
    (lambda c: c.warmup_epochs, '--warmup-epochs', ('warmup_prefix',)),
    (lambda c: c.color_jitter, '--color-jitter', ('color_jitter_prob',)),
    (lambda c: c.reprob, '--reprob', ('remode', 'recount', 'resplit')),
    (lambda c: c.aug_splits or c.resplit, '--aug-splits or --resplit', ('split_bn',)),
    (lambda c: c.aug_splits, '--aug-splits', ('jsd_loss',)),
    (lambda c: c.bce_loss, '--bce-loss', ('bce_sum', 'bce_target_thresh', 'bce_pos_weight')),
    (lambda c: c.mixes, '--mixup, --cutmix or --cutmix-minmax', ('mixup_off_epoch', 'mixup_prob', 'mixup_mode')),
    (lambda c: c.mixup and (c.cutmix or c.cutmix_minmax), '--mixup and --cutmix', ('mixup_switch_prob',)),
    (lambda c: c.model_ema, '--model-ema', ('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu')),
    (lambda c: c.log_wandb, '--log-wandb', ('wandb_project', 'wandb_tags', 'wandb_resume_id')),
    (lambda c: c.optimizer_info.has_momentum, 'an --opt that has a momentum, such as sgd', ('momentum',)),
    (lambda c: c.optimizer_info.has_eps, 'an --opt that has an epsilon, such as adamw', ('opt_eps',)),
    (lambda c: c.optimizer_info.has_betas, 'an --opt that has betas, such as adamw', ('opt_betas',)),
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
    balanced_sampler: bool = _data(
        False, help='draw each class equally often: images of small classes come up several times in an epoch, each '
                    'time augmented otherwise, and of large ones some are left out')
    class_weights: str | None = _data(
        None, metavar='balanced|W,W,...|FILE',
        help='weigh the loss of each class: so that all classes weigh the same, by a number for each class, or by a '
             'CSV file with the columns class and weight', unset='all images weigh the same')
    train_num_samples: int | None = _data(
        None, minimum=1, metavar='N', help='images of the split to train on, for a stream that does not know',
        unset='as the data set says')
    val_num_samples: int | None = _data(
        None, minimum=1, metavar='N', help='images of the split to evaluate on, for a stream that does not know',
        unset='as the data set says')

    model: str = _model('resnet18_dyrelu_b', metavar='NAME', help="name, 'hf-hub:<id>', or folder of a checkpoint")
    pretrained: bool = _model(False, help='start from the pretrained weights')
    pretrained_path: str | None = _model(
        None, metavar='FILE', help='start from this checkpoint file as if it held the pretrained weights')
    initial_checkpoint: str | None = _model(
        None, metavar='FILE', help='load this checkpoint file into the model as it is')
    init: str = _model(
        'default', choices=('default', 'lsuv'),
        help='initialisation of the weights; lsuv for models without normalisation')
    gp: str | None = _model(
        None, metavar='POOL', help='global pooling, such as avg, max, avgmax, catavgmax or fast', unset='of the model')
    head_init_scale: float | None = _model(
        None, minimum=0, metavar='SCALE', help='multiply the weights of the classifier by this before training')
    head_init_bias: float | None = _model(
        None, minimum=-1000, maximum=1000, metavar='BIAS',
        help='set the biases of the classifier to this before training')
    bn_momentum: float | None = _model(
        None, above=0, maximum=1, metavar='M', help='momentum of BatchNorm, for EfficientNets and their kin',
        unset='of the model')
    bn_eps: float | None = _model(
        None, above=0, metavar='EPS', help='epsilon of BatchNorm, for EfficientNets and their kin',
        unset='of the model')
    drop: float = _model(0.0, minimum=0, below=1, metavar='PCT', help='dropout rate')
    drop_path: float | None = _model(None, minimum=0, below=1, metavar='PCT', help='stochastic depth rate')
    drop_block: float | None = _model(
        None, minimum=0, below=1, metavar='PCT', help='DropBlock rate, for ResNets and their kin')
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
    kd_temperature: float = _finetuning(4.0, above=0, maximum=1000, metavar='T')
    distill_loss_weight: float | None = _finetuning(None, minimum=0, metavar='W', unset='1, or 1 - --task-loss-weight')
    task_loss_weight: float | None = _finetuning(None, minimum=0, metavar='W', unset='1')

    batch_size: int = _optimizer(128, flags=('-b',), minimum=1, metavar='N')
    validation_batch_size: int | None = _optimizer(None, flags=('-vb',), minimum=1, metavar='N', unset='--batch-size')
    epochs: int = _optimizer(
        30, minimum=1, metavar='N',
        help='epochs of the schedule; a run that is resumed with more of them is extended, and has from there on the '
             'learning rate of a run that was started with so many')
    opt: str = _optimizer('adamw', metavar='NAME', help='any of timm.optim')
    opt_eps: float | None = _optimizer(None, minimum=0, metavar='EPS', unset='of the optimizer')
    opt_betas: tuple[float, ...] | None = _optimizer(
        None, minimum=0, below=1, metavar='BETA', help='two of them, or three', unset='of the optimizer')
    opt_kwargs: Mapping[str, Any] = _optimizer(
        {}, metavar='KEY=VALUE', help='further arguments of the optimizer')
    momentum: float = _optimizer(0.9, minimum=0, below=1, metavar='M')
    weight_decay: float = _optimizer(0.05, minimum=0, metavar='WD')
    clip_grad: float | None = _optimizer(None, above=0, metavar='NORM', help='largest gradient norm', unset='no limit')
    clip_mode: str = _optimizer('norm', choices=('norm', 'value', 'agc'), help='what --clip-grad bounds')
    grad_accum_steps: int = _optimizer(1, minimum=1, metavar='N', help='batches whose gradients make one update')
    layer_decay: float | None = _optimizer(
        None, above=0, maximum=1, metavar='RATE', help='layer-wise learning rate decay')
    layer_decay_min_scale: float = _optimizer(
        0.0, minimum=0, maximum=1, metavar='SCALE', help='no layer has less than this share of the learning rate')
    layer_decay_no_opt_scale: float | None = _optimizer(
        None, above=0, maximum=1, metavar='SCALE', help='do not train layers with less than this share')
    lr: float | None = _optimizer(
        None, above=0, maximum=1000, metavar='LR', help='learning rate; wins over --lr-base',
        unset='0.001, or by --lr-base')
    lr_base: float | None = _optimizer(
        None, above=0, maximum=1000, metavar='LR',
        help='learning rate for --lr-base-size images; it grows with the images of an update, those of all processes '
             'and --grad-accum-steps', unset='not used')
    lr_base_size: int = _optimizer(256, minimum=1, metavar='N', help='images of an update that --lr-base is meant for')
    lr_base_scale: str | None = _optimizer(
        None, choices=('linear', 'sqrt'), help='how it grows',
        unset="sqrt where the name of the optimizer has 'ada' or 'lamb', else linear")
    sched: str = _optimizer(
        'cosine', choices=('cosine', 'tanh', 'poly', 'step', 'multistep', 'wsd', 'plateau', 'constant'),
        help='learning rate schedule, moved by every update; plateau is moved by what chooses the best epoch')
    sched_on_epochs: bool = _optimizer(
        False, help="move the schedule once an epoch, as timm's train.py does without --sched-on-updates")
    lr_noise: tuple[float, ...] | None = _optimizer(
        None, minimum=0, maximum=1, ascending=True, metavar='PCT',
        help='noise on the learning rate from this share of the schedule on, or between these two', unset='none')
    lr_noise_pct: float = _optimizer(0.67, minimum=0.01, metavar='PCT', help='largest noise, a share of the rate')
    lr_noise_std: float = _optimizer(1.0, above=0, maximum=10, metavar='STD', help='standard deviation of the noise')
    lr_cycle_mul: float = _optimizer(
        1.0, minimum=1, maximum=100, metavar='MULT', help='how much longer each cycle is')
    lr_cycle_decay: float = _optimizer(0.5, above=0, maximum=1, metavar='MULT', help='how much lower each cycle is')
    lr_cycle_limit: int = _optimizer(
        1, minimum=1, metavar='N', help='cycles of --sched cosine, tanh or poly, the first of --epochs')
    lr_k_decay: float = _optimizer(
        1.0, above=0, maximum=100, metavar='K', help='exponent of the time in --sched cosine or poly')
    warmup_epochs: int = _optimizer(3, minimum=0, metavar='N')
    warmup_lr: float = _optimizer(1e-5, minimum=0, metavar='LR')
    warmup_prefix: bool = _optimizer(False, help='warm up before --epochs, not within them')
    cooldown_epochs: int = _optimizer(
        0, minimum=0, metavar='N', help='epochs at --min-lr after those of --sched cosine, tanh or poly')
    patience_epochs: int = _optimizer(
        10, minimum=0, metavar='N', help='epochs without an improvement before a step of --sched plateau')
    decay_milestones: tuple[int, ...] | None = _optimizer(
        None, minimum=1, ascending=True, metavar='EPOCH', help='epochs of the steps of --sched multistep',
        unset='at 30, 60 and 90 % of --epochs')
    min_lr: float = _optimizer(0.0, minimum=0, metavar='LR')
    decay_epochs: float = _optimizer(
        10.0, above=0, maximum=10 ** 6, metavar='N',
        help='epochs between the steps of --sched step, of the decay of --sched wsd')
    decay_rate: float = _optimizer(
        0.1, above=0, metavar='RATE', flags=('--dr',),
        help='factor of --sched step, multistep and plateau, power of poly')

    no_aug: bool = _augmentation(False, help='no augmentation at all')
    train_crop_mode: str | None = _augmentation(
        None, choices=('rrc', 'rkrc', 'rkrr'),
        help='random crop: resized (rrc), or resized with its ratio kept and the centre or a random part taken',
        unset='rrc')
    scale: tuple[float, float] = _augmentation(
        (0.08, 1.0), above=0, maximum=1, ascending=True, metavar='PCT', help='area of the random crop')
    ratio: tuple[float, float] = _augmentation(
        (3 / 4, 4 / 3), minimum=0.01, maximum=100, ascending=True, metavar='RATIO',
        help='aspect ratio of the random crop')
    hflip: float = _augmentation(0.5, minimum=0, maximum=1, metavar='P')
    vflip: float = _augmentation(0.0, minimum=0, maximum=1, metavar='P')
    color_jitter: float = _augmentation(0.4, minimum=0, maximum=100, metavar='PCT')
    color_jitter_prob: float | None = _augmentation(
        None, minimum=0, maximum=1, metavar='P', help='probability of --color-jitter', unset='always')
    grayscale_prob: float | None = _augmentation(
        None, minimum=0, maximum=1, metavar='P', help='probability of a picture in grey', unset='never')
    gaussian_blur_prob: float | None = _augmentation(
        None, minimum=0, maximum=1, metavar='P', help='probability of a blurred picture', unset='never')
    aa: str | None = _augmentation(None, metavar='NAME', help="AutoAugment policy, e.g. 'rand-m9-mstd0.5'")
    train_interpolation: str = _augmentation(
        'random', choices=('random', *INTERPOLATIONS), help='interpolation of the random crop')
    reprob: float = _augmentation(0.0, minimum=0, maximum=1, metavar='P', help='random erasing probability')
    remode: str = _augmentation('pixel', choices=('pixel', 'rand', 'const'), help='random erasing mode')
    recount: int = _augmentation(1, minimum=1, maximum=1000, metavar='N', help='random erasing count')
    resplit: bool = _augmentation(
        False, help='no random erasing in the first of --aug-splits, or in the first half of a batch')
    aug_repeats: float = _augmentation(
        0.0, minimum=0, maximum=1000, metavar='N',
        help='repeated augmentation: show so many views of an image at once, and accordingly fewer images an epoch')
    aug_splits: int = _augmentation(
        0, minimum=0, maximum=64, metavar='N',
        help='show each image so many times in a batch, the first time hardly augmented')
    split_bn: bool = _augmentation(
        False, help='a BatchNorm for each of --aug-splits while training; the first is kept')
    jsd_loss: bool = _augmentation(
        False, help='cross entropy of the first of --aug-splits, and divergence of the others from it')
    bce_loss: bool = _augmentation(False, help='binary cross entropy of each class')
    bce_sum: bool = _augmentation(False, help='sum it over the classes; their mean otherwise')
    bce_target_thresh: float | None = _augmentation(
        None, minimum=0, below=1, metavar='T', help='take mixed or smoothed targets above this for 1, others for 0')
    bce_pos_weight: float | None = _augmentation(
        None, above=0, metavar='W', help='weight of the classes that are there', unset='1')
    mixup: float = _augmentation(0.0, minimum=0, metavar='ALPHA', help='mixup if above 0')
    cutmix: float = _augmentation(0.0, minimum=0, metavar='ALPHA', help='cutmix if above 0')
    cutmix_minmax: tuple[float, float] | None = _augmentation(
        None, minimum=0, maximum=1, ascending=True, metavar='RATIO',
        help='cutmix with a part whose sides are between these shares of those of the image, in place of --cutmix')
    mixup_off_epoch: int = _augmentation(
        0, minimum=0, metavar='N', help='no mixup or cutmix from this epoch on; 0: to the end')
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

    dist_strategy: str = _processes(
        'ddp', choices=('ddp', 'fsdp'),
        help='what each process keeps: the whole model (DistributedDataParallel), or a share of its parameters, '
             'gradients, moving average and optimizer state (fully_shard), for models that do not fit one GPU')
    sync_bn: bool = _processes(False, help='synchronised BatchNorm')
    dist_bn: str = _processes(
        'reduce', choices=('reduce', 'broadcast', 'none'), aliases={'': 'none'},
        help='what becomes of BatchNorm statistics before an evaluation: the mean of all processes, those of the '
             'first, or each its own')

    seed: int = _run(42, minimum=0, below=2 ** 32, metavar='S')
    output: str = _run('./output/train', metavar='DIR', private=True)
    experiment: str | None = _run(
        None, metavar='NAME', private=True, help='name of the run folder', unset='<time>-<model>-<size>')
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
        None, metavar='auto|PATH', private=True,
        help="'auto': go on with the run of the same --output and --experiment (without --experiment: of the same "
             'options), or start it; or the folder of a run, or a state file in it. A path alone is enough: the other '
             'options are those of the run, of which --epochs (more) and --early-stopping may be changed')
    checkpoint_interval: int | str = _run(
        '1epoch', metavar='N[epochs]', help='updates, or epochs, from one state that can be resumed to the next')
    profile: int | None = _run(
        None, minimum=1, metavar='N',
        help="record so many updates, after some that warm up, with PyTorch's profiler, in profile/ of the run folder: "
             'a trace for chrome://tracing or Perfetto, and a table', unset='nothing is recorded')
    log_tensorboard: bool = _run(False, private=True, help='log to TensorBoard files in the run folder')
    log_mlflow: bool = _run(False, private=True, help='log to MLflow, where its environment variables say')
    log_wandb: bool = _run(False, private=True, help='log to Weights & Biases')
    wandb_project: str | None = _run(None, metavar='NAME', private=True, help='project there')
    wandb_tags: tuple[str, ...] = _run((), metavar='TAG', private=True, help='tags there')
    wandb_resume_id: str | None = _run(
        None, metavar='ID', private=True, help='id of the run there to go on with')

    def implied(self) -> dict[str, Any]:
        values = super().implied()
        if self.dataset is None:
            values['dataset'] = 'digits' if self.data_dir is None else ''
        if values.get('dataset', self.dataset) == 'digits':
            values.update({name: value for name, value in _DIGITS_RECIPE.items() if not self.is_given(name)})
        if self.lr is None and self.lr_base is None:
            values['lr'] = _LR
        if self.decay_milestones is None and self.sched == 'multistep':
            epochs = values.get('epochs', self.epochs)
            values['decay_milestones'] = tuple(max(round(share * epochs), 1) for share in _MILESTONES)
        return values

    @classmethod
    def translate(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return timm_args.translate(values, declarations(cls))

    def check(self) -> None:
        super().check()
        CheckpointInterval.parse(self.checkpoint_interval)
        check_auto_augment(self.aa)
        self._check_optimizer()
        for is_met, needed, names in _NEEDED:
            for name in names:
                value, declared = getattr(self, name), declarations(type(self))[name]
                if value not in (declared.default, timm_args.UNASKED.get(name)) and not is_met(self):
                    raise ValueError(f'{declared.flag} must be left out without {needed}, got {plain(value)}.')
        self._check_data_and_start()
        self._check_batches()
        self._check_training()

    def _check_optimizer(self) -> None:
        names = list_optimizers()
        if self._plain_opt not in names:
            raise ValueError(
                f'--opt must be one of timm.optim.list_optimizers(), got {self.opt!r}.{close_names(self.opt, names)}')

    def _check_data_and_start(self) -> None:
        check_folder_name(self.experiment, '--experiment')
        if self.gp == '':
            raise ValueError("--gp must be a pooling such as avg, a classifier takes one vector of an image, got ''.")
        if self.images_per_class is not None and self.val_fraction and self.images_per_class < 2:
            raise ValueError(
                f'--images-per-class must be 2 or more with --val-fraction, which holds one of them out, got '
                f'{self.images_per_class}.')
        if self.init != 'default':
            if self.pretrained or self.pretrained_path or self.initial_checkpoint:
                raise ValueError(f'--init {self.init} would overwrite the weights that the run is to start from.')
            if self.head_init_scale is not None or self.head_init_bias is not None:
                raise ValueError(f'--init {self.init} would overwrite --head-init-scale and --head-init-bias.')
        for name in self._own_model_kwargs.keys() & self.model_kwargs.keys():
            raise ValueError(f'--model-kwargs must not hold {name}, which an option of its own gives.')

    def _check_batches(self) -> None:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f'--batch-size must be even with --mixup or --cutmix, got {self.batch_size}.')
        if self.split_bn and not self.aug_splits and self.batch_size % 2:
            raise ValueError(f'--batch-size must be even with --split-bn and --resplit, got {self.batch_size}.')
        if self.cutmix_minmax is not None and self.cutmix_minmax[0] == self.cutmix_minmax[1]:
            raise ValueError(f'--cutmix-minmax must be two different numbers, got {list(self.cutmix_minmax)}.')
        if 0 < self.aug_repeats < 1:
            raise ValueError(f'--aug-repeats must be 0, or 1 or more, got {self.aug_repeats:g}.')
        if self.aug_splits == 1:
            raise ValueError('--aug-splits must be 0, or 2 or more, got 1.')
        if self.aug_splits and self.mixes:
            raise ValueError('--aug-splits must be left out with --mixup or --cutmix, which would mix the splits.')
        if self.aug_splits and self.no_aug:
            raise ValueError('--aug-splits must be left out with --no-aug, which leaves nothing to split.')
        if self.split_bn and self.sync_bn:
            raise ValueError('--split-bn must be left out with --sync-bn: a BatchNorm is the one or the other.')
        for name in ('jsd_loss', 'bce_loss'):
            if self.class_weights is not None and getattr(self, name):
                raise ValueError(
                    f'--class-weights must be left out with --{name.replace("_", "-")}, which has no weights of '
                    f'classes, got {self.class_weights!r}.')
        if self.balanced_sampler and self.aug_repeats:
            raise ValueError('--balanced-sampler must be left out with --aug-repeats: each says what comes up again.')
        if self.jsd_loss and self.bce_loss:
            raise ValueError('--jsd-loss must be left out with --bce-loss: there is one loss.')

    def _check_training(self) -> None:
        if self.transition_epochs > self.epochs:
            raise ValueError(
                f'--transition-epochs must be at most --epochs, {self.epochs}, got {self.transition_epochs:g}.')
        if self.distill_loss_weight is None and self.kd_model and (self.task_loss_weight or 0) > 1:
            raise ValueError(
                f'--task-loss-weight must be at most 1 without --distill-loss-weight, which is then 1 minus it, got '
                f'{self.task_loss_weight:g}.')
        if self.layer_decay_no_opt_scale is not None and self.freeze != 'none':
            raise ValueError(
                '--layer-decay-no-opt-scale must be left out with --freeze: both say what is not trained.')
        if self.opt_betas is not None and len(self.opt_betas) not in (2, 3):
            raise ValueError(f'--opt-betas must be two or three numbers, got {list(self.opt_betas)}.')
        # The defaults of --warmup-epochs and --warmup-lr may exceed --epochs and --lr, as they may in timm's train.py.
        default = {name: declared.default for name, declared in declarations(type(self)).items()}
        if self.warmup_epochs > max(self.epochs, default['warmup_epochs']) and not self.warmup_prefix:
            raise ValueError(
                f'--warmup-epochs must be at most --epochs, {self.epochs}, or --warmup-prefix given, got '
                f'{self.warmup_epochs}.')
        if self.lr is not None and self.min_lr > self.lr:
            raise ValueError(f'--min-lr must be at most --lr, {self.lr:g}, got {self.min_lr:g}.')
        if self.lr is not None and self.warmup_lr > max(self.lr, default['warmup_lr']):
            raise ValueError(f'--warmup-lr must be at most --lr, {self.lr:g}, got {self.warmup_lr:g}.')
        if self.lr_noise is not None and len(self.lr_noise) > 2:
            raise ValueError(f'--lr-noise must be one or two numbers, got {list(self.lr_noise)}.')

    @property
    def _own_model_kwargs(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` that have options of their own and belong to the architecture."""
        values = dict(global_pool=self.gp, bn_momentum=self.bn_momentum, bn_eps=self.bn_eps)
        return {name: value for name, value in values.items() if value is not None}

    @property
    def architecture_kwargs(self) -> dict[str, Any]:
        """What ``timm.create_model`` needs beside the name to build the same architecture again."""
        return {**self.model_kwargs, **self._own_model_kwargs}

    @property
    def optimizer_info(self) -> OptimInfo:
        """What timm knows of the optimizer."""
        return get_optimizer_info(self._plain_opt)

    @property
    def _plain_opt(self) -> str:
        """The name of the optimizer without what timm wraps any in."""
        return self.opt.lower().removeprefix('lookahead_')

    @property
    def images_per_update(self) -> int:
        """Number of images that one process gives to an update of the weights."""
        return self.batch_size * self.grad_accum_steps

    def effective_lr(self, world_size: int) -> float:
        """Give the learning rate: ``lr``, or what ``lr_base`` comes to, as timm's train.py has it.

        Args:
            world_size: Number of processes.
        """
        if self.lr is not None:
            return self.lr
        scale = self.lr_base_scale
        if scale is None:
            scale = 'sqrt' if any(name in self.opt.lower() for name in ('ada', 'lamb')) else 'linear'
        ratio = self.images_per_update * world_size / self.lr_base_size
        return self.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and their labels with them."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

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
