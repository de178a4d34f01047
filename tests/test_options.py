"""Options: what each accepts, and that Python, the command line and YAML mean the same by them."""
import argparse
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from timm_dyacts.cli import compare as compare_command
from timm_dyacts.cli import predict as predict_command
from timm_dyacts.cli import train as train_command
from timm_dyacts.cli import validate as validate_command
from timm_dyacts.evaluation import PredictConfig, ValidateConfig
from timm_dyacts.options import Options, add_arguments, declarations, option, plain, read_yaml, to_dict
from timm_dyacts.study import CompareConfig
from timm_dyacts.training import TrainConfig

REQUIRED = {
    TrainConfig: {},
    ValidateConfig: dict(model=('net',)),
    PredictConfig: dict(model='net', images=('a.png', 'b.png')),
    CompareConfig: dict(models=('net', 'other')),
}
# What an option means nothing without
NEEDED = dict(
    transition_sched=dict(transition_epochs=1),
    unfreeze_epoch=dict(freeze='backbone'),
    kd_temperature=dict(kd_model='net'),
    distill_loss_weight=dict(kd_model='net'),
    task_loss_weight=dict(kd_model='net'),
    clip_mode=dict(clip_grad=1.0),
    momentum=dict(opt='sgd'),
    lr_noise_pct=dict(lr_noise=0.5),
    lr_noise_std=dict(lr_noise=0.5),
    lr_cycle_mul=dict(lr_cycle_limit=2),
    lr_cycle_decay=dict(lr_cycle_limit=2),
    decay_rate=dict(sched='step'),
    decay_epochs=dict(sched='step'),
    decay_milestones=dict(sched='multistep'),
    patience_epochs=dict(sched='plateau'),
    warmup_prefix=dict(warmup_epochs=1),
    color_jitter_prob=dict(color_jitter=0.4),
    remode=dict(reprob=0.5),
    recount=dict(reprob=0.5),
    layer_decay_min_scale=dict(layer_decay=0.5),
    layer_decay_no_opt_scale=dict(layer_decay=0.5),
    lr_base_size=dict(lr_base=0.1),
    lr_base_scale=dict(lr_base=0.1),
    resplit=dict(reprob=0.5),
    split_bn=dict(aug_splits=2),
    jsd_loss=dict(aug_splits=2),
    bce_sum=dict(bce_loss=True),
    bce_target_thresh=dict(bce_loss=True),
    bce_pos_weight=dict(bce_loss=True),
    mixup_off_epoch=dict(mixup=0.2),
    mixup_prob=dict(mixup=0.2),
    mixup_mode=dict(mixup=0.2),
    mixup_switch_prob=dict(mixup=0.2, cutmix=1.0),
    model_ema_decay=dict(model_ema=True),
    model_ema_warmup=dict(model_ema=True),
    model_ema_force_cpu=dict(model_ema=True),
    wandb_project=dict(log_wandb=True),
    wandb_tags=dict(log_wandb=True),
    wandb_resume_id=dict(log_wandb=True),
    amp_dtype=dict(amp=True),
    cutmix_minmax=dict(cutmix_minmax=(0.2, 0.8)),
    torchcompile_mode=dict(torchcompile='inductor'),
)
PARSERS = {
    TrainConfig: train_command.create_parser,
    ValidateConfig: validate_command.create_parser,
    PredictConfig: predict_command.create_parser,
}
MAINS = {
    TrainConfig: train_command.main,
    ValidateConfig: validate_command.main,
    PredictConfig: predict_command.main,
    CompareConfig: compare_command.main,
}
ARGV = {
    TrainConfig: [],
    ValidateConfig: ['-m', 'net'],
    PredictConfig: ['a.png', 'b.png', '--model', 'net'],
    CompareConfig: ['--models', 'net', 'other'],
}
# Each option once, in the first class that has it
TABLE = {name: (cls, declared) for cls in reversed(REQUIRED) for name, declared in declarations(cls).items()}
NUMBERS = [name for name, (_, declared) in TABLE.items() if declared.types in ((int,), (float,))]
CHOICES = [name for name, (_, declared) in TABLE.items() if declared.option.choices]


def create(name: str, value: Any) -> Options:
    cls, _ = TABLE[name]
    return cls(**REQUIRED[cls] | NEEDED.get(name, {}) | {name: value})


def with_number(name: str, number: float) -> Any:
    """A value of an option with a number in it, as many as it takes."""
    count = TABLE[name][1].count
    return number if count is None else (number,) * (2 if count is ... else count)


# Ranges, by the table itself: a new option is covered as soon as it is declared


def out_of_range(name: str) -> list[float]:
    declared = TABLE[name][1].option
    numbers = [-math.inf, math.nan, math.inf]
    if declared.minimum is not None:
        numbers += [declared.minimum - 1, declared.minimum - 10 ** 6]
    if declared.above is not None:
        numbers += [declared.above, declared.above - 1]
    if declared.maximum is not None:
        numbers += [declared.maximum + 1]
    if declared.below is not None:
        numbers += [declared.below, declared.below + 1]
    return numbers


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_out_of_range_are_refused(name):
    for number in out_of_range(name):
        with pytest.raises(ValueError) as error:
            create(name, with_number(name, number))
        assert str(error.value).startswith(f'{TABLE[name][1].title} must be {TABLE[name][1].accepted}, got ')


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_out_of_range_are_refused_in_files(name, tmp_path):
    cls, declared = TABLE[name]
    for number in out_of_range(name):
        value = with_number(name, number)
        (tmp_path / 'options.yaml').write_text(yaml.safe_dump({name: plain(value)}))
        with pytest.raises(ValueError) as error:
            read_yaml(tmp_path / 'options.yaml', cls)
        assert str(error.value).startswith(
            f'{tmp_path / "options.yaml"}: {declared.title} must be {declared.accepted}, got ')


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_out_of_range_are_refused_on_the_command_line(name, capsys):
    cls, declared = TABLE[name]
    for number in out_of_range(name)[1:]:  # argparse takes -inf for an option
        value = with_number(name, number)
        with pytest.raises(SystemExit) as error:
            MAINS[cls]([*ARGV[cls], declared.flag, *map(str, value if isinstance(value, tuple) else (value,))])
        if error.value.code == 2:  # what is no integer, argparse refuses by itself
            assert not isinstance(number, int) and declared.types == (int,)
            assert f'{declared.flag}: invalid int value: ' in capsys.readouterr().err
        else:
            assert f': error: {declared.title} must be {declared.accepted}, got ' in error.value.code


@pytest.mark.parametrize('name', NUMBERS)
def test_every_number_has_a_least_value(name):
    declared = TABLE[name][1].option
    assert (declared.minimum is None) != (declared.above is None) or name == 'mean'


@pytest.mark.parametrize('name', NUMBERS)
def test_the_ends_of_a_range_are_accepted(name):
    declared = TABLE[name][1].option
    for number in (declared.minimum, declared.maximum):
        if number is not None and name != 'cutmix_minmax':  # whose two ends must differ
            assert getattr(create(name, with_number(name, number)), name) == with_number(name, number)


@pytest.mark.parametrize('name', TABLE)
def test_other_types_are_refused(name):
    declared = TABLE[name][1]
    wrong = [object(), dict(a=1)] if Mapping not in declared.types else ['a=1', 3]
    if bool in declared.types:
        wrong += [1, 'yes', 0.0]
    else:
        wrong += [True]
    if declared.types == (int,):
        wrong += [1.5, '1', 2.0]
    if declared.types == (float,):
        wrong += ['0.5']
    if declared.types == (str,):
        wrong += [3, 0.5]
    if not declared.optional:
        wrong += [None]
    if isinstance(declared.count, int):
        wrong += [(), (1,) * (declared.count + 1)]
    for value in wrong:
        with pytest.raises(ValueError, match='must be'):
            create(name, value)


@pytest.mark.parametrize('name', CHOICES)
def test_choices(name):
    choices = TABLE[name][1].option.choices
    for value in choices:
        assert getattr(create(name, value), name) == value
    with pytest.raises(ValueError) as error:
        create(name, f'{choices[0]}x')
    assert f'must be one of {", ".join(choices)}' in str(error.value)
    assert f"got '{choices[0]}x'. Close names: " in str(error.value) and choices[0] in str(error.value)


@pytest.mark.parametrize('name, value, message', [
    ('lr', -1, 'lr (--lr) must be a finite number above 0 and of at most 1000, or None, got -1.'),
    ('clip_grad', 0.0, 'clip_grad (--clip-grad) must be a finite number above 0, or None, got 0.0.'),
    ('epochs', 1.5, 'epochs (--epochs) must be an integer of at least 1, got 1.5.'),
    ('epochs', 10 ** 30,
     f'epochs (--epochs) must be an integer of at least 1, and of at most 2147483647, got {10 ** 30}.'),
    ('lr', 10 ** 400, f'lr (--lr) must be a finite number above 0 and of at most 1000, or None, got {10 ** 400}.'),
    ('smoothing', 1, 'smoothing (--smoothing) must be a finite number of at least 0 and below 1, got 1.'),
    ('hflip', 2, 'hflip (--hflip) must be a finite number from 0 to 1, got 2.'),
    ('input_size', (3, 0, 0),
     'input_size (--input-size) must be 3 integers from 1 to 16384, or None, got [3, 0, 0].'),
    ('scale', (0.9, 0.1),
     'scale (--scale) must be 2 finite numbers above 0 and of at most 1, in ascending order, got [0.9, 0.1].'),
    ('amp', 1, 'amp (--amp) must be True or False, got 1.'),
    ('sched', 'cosin', "sched (--sched) must be one of cosine, tanh, poly, step, multistep, wsd, plateau, constant, "
                       "got 'cosin'. Close names: cosine."),
    ('images', (1,), 'images must be texts, got [1].'),
    ('model_kwargs', 'a', "model_kwargs (--model-kwargs) must be a mapping of names to values, got 'a'."),
])
def test_messages(name, value, message):
    with pytest.raises(ValueError) as error:
        create(name, value)
    assert str(error.value) == message


@pytest.mark.parametrize('name', NEEDED)
def test_what_would_do_nothing_is_refused(name):
    cls, declared = TABLE[name]
    if name == 'cutmix_minmax':
        return
    value = declared.default
    if declared.types == (bool,):
        value = True
    elif declared.option.choices:
        value = next(choice for choice in declared.option.choices if choice != declared.default)
    elif declared.types == (str,):
        value = 'some'
    else:
        value = next(
            with_number(name, number) for number in (declared.types[0](1), 0.5, 3)
            if declared.option.accepts_number(number) and with_number(name, number) != declared.default)
    cls(**REQUIRED[cls], **NEEDED[name], **{name: value})
    with pytest.raises(ValueError, match=f'^{declared.flag} must be left out without '):
        cls(**REQUIRED[cls], **{name: value} | dict.fromkeys(['warmup_epochs', 'color_jitter'] if name in (
            'warmup_prefix', 'color_jitter_prob') else [], 0))


def test_an_integer_of_more_digits_than_python_writes():
    with pytest.raises(ValueError, match='at most 2147483647, got an integer of thousands of digits'):
        TrainConfig(epochs=10 ** 5000)


def test_values_are_converted_to_the_declared_type():
    config = TrainConfig(
        lr=1, scale=[0.5, 1], output=Path('out'), log_wandb=True, wandb_tags='one', model_kwargs={'a': 1})
    assert (config.lr, config.scale, config.output, config.wandb_tags) == (1.0, (0.5, 1.0), 'out', ('one',))
    assert isinstance(config.lr, float) and isinstance(config.scale[1], float)


def test_options_do_not_change():
    kwargs = dict(a=1)
    config = TrainConfig(model_kwargs=kwargs)
    kwargs['a'] = 2
    assert config.model_kwargs == dict(a=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0


def test_unknown_names_are_close_names():
    with pytest.raises(TypeError, match="unknown option 'bach_size'. Close names: batch_size"):
        TrainConfig(bach_size=4)


# The command line and YAML


# Options of training that exclude each other, so that it takes several configurations to have them all
_NO_SPLITS = dict(aug_splits=0, jsd_loss=False, split_bn=False, layer_decay_no_opt_scale=None)
_NO_BCE = dict(bce_loss=False, bce_sum=False, bce_target_thresh=None, bce_pos_weight=None)
_NO_BALANCE = dict(class_weights=None, balanced_sampler=False)
_NO_MIXING = dict(
    mixup=0.0, cutmix=0.0, cutmix_minmax=None, mixup_off_epoch=0, mixup_prob=1.0, mixup_mode='batch',
    mixup_switch_prob=0.5)
_NO_CYCLES = dict(lr_cycle_limit=1, lr_cycle_mul=1.0, lr_cycle_decay=0.5, cooldown_epochs=0, lr_k_decay=1.0)
_NO_MOMENTUM, _MOMENTUM_ALONE = dict(momentum=0.9), dict(opt_eps=None, opt_betas=None)
_NO_MILESTONES, _NO_PATIENCE, _NO_DECAY = dict(decay_milestones=None), dict(patience_epochs=10), dict(decay_epochs=10.0)
# Each with what is chosen for its sake
EXCLUSIVE = [
    (_NO_SPLITS | _NO_BALANCE | _MOMENTUM_ALONE | _NO_MILESTONES | _NO_PATIENCE | _NO_DECAY,
     dict(sched='poly', opt='sgd')),
    (_NO_BCE | _NO_BALANCE | _NO_MIXING | _NO_MOMENTUM | _NO_CYCLES | _NO_MILESTONES | _NO_DECAY | dict(
        no_aug=False, sync_bn=False, freeze='none', unfreeze_epoch=None), dict(sched='plateau', opt='nadam')),
    (_NO_SPLITS | _NO_BCE | _NO_MOMENTUM | _NO_CYCLES | _NO_PATIENCE | _NO_DECAY | dict(aug_repeats=0.0, min_lr=0.0),
     dict(sched='multistep', opt='lamb')),
    (_NO_SPLITS | _NO_BALANCE | _MOMENTUM_ALONE | _NO_CYCLES | _NO_PATIENCE | _NO_MILESTONES | dict(decay_rate=0.1),
     dict(sched='wsd', opt='sgdw')),
]
CASES = [
    *((TrainConfig, exclusive, chosen) for exclusive, chosen in EXCLUSIVE),
    (ValidateConfig, {}, {}),
    (PredictConfig, {}, {}),
]


def other_than_default(cls: type[Options], exclusive: Mapping[str, Any], chosen: Mapping[str, Any]) -> Options:
    """All options of a class with another value than their default, but for some that exclude others."""
    values: dict[str, Any] = dict(REQUIRED[cls])
    for name, declared in declarations(cls).items():
        types, limits = declared.types, declared.option
        if types == (bool,):
            value: Any = True
        elif declared.option.choices:
            value = next(choice for choice in limits.choices[::-1] if choice != declared.default)
        elif types in ((int,), (float,)):
            low = next((x for x in (limits.minimum, limits.above) if x is not None), 0)
            high = next((x for x in (limits.maximum, limits.below) if x is not None), low + 20)
            numbers = [low + (high - low) * share for share in (0.25, 0.5, 0.75)]
            numbers = [types[0](number) for number in numbers if number != declared.default]
            value = numbers[0] if declared.count is None else numbers[:2 if declared.count is ... else declared.count]
        elif Mapping in types:
            value = dict(act_layer='relu', depth=(2, 2), flag=True, rate=0.5)
        else:
            value = f'some {name}' if declared.count is None else [f'some {name}', 'other']
        values[name] = value
    fixed = {
        TrainConfig: dict(
            checkpoint_interval='7epochs', init='default', batch_size=6, torchcompile='inductor',
            dataset='', aa='rand-m9'),  # for the sake of labels
        ValidateConfig: dict(model='some model', torchcompile='inductor', dataset=''),
        PredictConfig: dict(torchcompile='inductor'),
    }
    return cls(**values | fixed[cls] | exclusive | chosen)


def argv_of(config: Options) -> list[str]:
    """The command line that gives some options."""
    argv = []
    for name, declared in declarations(type(config)).items():
        value = getattr(config, name)
        if value is None or value is False or value in ((), {}):
            continue
        flag = [] if declared.option.positional else [declared.flag]
        if value is True:
            argv += flag
        elif isinstance(value, dict):
            argv += [*flag, *(f'{key}={item}' for key, item in value.items())]
        elif isinstance(value, tuple):
            argv = [*map(str, value), *argv] if not flag else [*argv, *flag, *map(str, value)]
        else:
            argv += [*flag, str(value)]
    return argv


@pytest.mark.parametrize('cls, exclusive, chosen', CASES)
def test_every_option_goes_through_the_command_line(cls, exclusive, chosen):
    config = other_than_default(cls, exclusive, chosen)
    same = {name for name, declared in declarations(cls).items() if getattr(config, name) == declared.default}
    assert same == exclusive.keys() | ({'init'} if cls is TrainConfig else set()), 'all others differ'
    given = vars(PARSERS[cls]().parse_args(argv_of(config)))
    given.pop('verify', None)
    assert cls(**given) == config


@pytest.mark.parametrize('cls', PARSERS)
def test_the_command_line_gives_what_is_on_it_alone(cls):
    given = vars(PARSERS[cls]().parse_args(ARGV[cls]))
    given.pop('verify', None)
    assert given.keys() == REQUIRED[cls].keys()
    assert cls(**given) == cls(**REQUIRED[cls])


def test_every_option_is_in_some_case():
    assert not set.intersection(*(set(exclusive) for exclusive, _ in EXCLUSIVE))


@pytest.mark.parametrize('cls, exclusive, chosen', CASES)
def test_every_option_goes_through_yaml(cls, exclusive, chosen, tmp_path):
    config = other_than_default(cls, exclusive, chosen)
    (tmp_path / 'options.yaml').write_text(yaml.safe_dump(to_dict(config)))
    again = cls(**read_yaml(tmp_path / 'options.yaml', cls))
    assert to_dict(again) == to_dict(config)
    default = cls(**REQUIRED[cls])
    (tmp_path / 'default.yaml').write_text(yaml.safe_dump(to_dict(default)))
    assert cls(**read_yaml(tmp_path / 'default.yaml', cls)) == default


def test_yaml_reads_numbers_and_names_as_the_command_line_does(tmp_path):
    file = tmp_path / 'options.yaml'
    file.write_text('lr: 1e-3\nexperiment: 2026\nepochs: "4"\nscale: [5e-1, 1]\ncheckpoint_interval: 50\n')
    values = read_yaml(file, TrainConfig)
    assert values == dict(lr=1e-3, experiment='2026', epochs=4, scale=(0.5, 1.0), checkpoint_interval=50)


@pytest.mark.parametrize('text, message', [
    ('lr: -1', r'options.yaml: lr \(--lr\) must be a finite number above 0 and of at most 1000, or None, got -1'),
    ('lr: fast', r"options.yaml: lr \(--lr\) must be a finite number above 0 and of at most 1000, or None, got 'fast'"),
    ('epochs: 1.5', r'options.yaml: epochs \(--epochs\) must be an integer of at least 1, got 1.5'),
    ('epochs: null', r'options.yaml: epochs \(--epochs\) must be an integer'),
    ('amp: 1', r'options.yaml: amp \(--amp\) must be True or False'),
    ('bach_size: 1', "options.yaml: unknown option 'bach_size'. Close names: batch_size"),
    ('5: 1', 'options.yaml: unknown option 5'),
    ('config: x', "options.yaml: unknown option 'config'"),
])
def test_yaml_refuses(tmp_path, text, message):
    (tmp_path / 'options.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(tmp_path / 'options.yaml', TrainConfig)


@pytest.mark.parametrize('cls', PARSERS)
def test_help_says_every_default(cls):
    text = ' '.join(PARSERS[cls]('prog').format_help().split())
    for name, declared in declarations(cls).items():
        assert declared.option.positional or declared.flag in text
        if isinstance(declared.default, (int, float)) and declared.default is not False:
            assert f'default: {declared.default}' in text, name


def test_declarations_of_a_class_of_its_own():
    @dataclass(frozen=True, kw_only=True)
    class Base(Options):
        size: int = option(flags=('-s',), minimum=1)

    @dataclass(frozen=True, kw_only=True)
    class Config(Base):
        rates: tuple[float, ...] | None = option(None, below=1, help='100 % of them', unset='none')
        double: int | None = option(None)

        def implied(self):
            return dict(double=2 * self.size) if not self.is_given('double') else {}

        def check(self):
            if self.double < self.size:
                raise ValueError('double is too small')

    assert list(declarations(Config)) == ['size', 'rates', 'double']
    assert declarations(Config)['size'].default is MISSING
    assert Config(size=2) == Config(size=2, double=4) != Config(size=2, double=5)
    assert dataclasses.replace(Config(size=2), size=3).double == 4, 'what was filled in stays'
    with pytest.raises(ValueError, match='double is too small'):
        Config(size=2, double=1)
    parser = argparse.ArgumentParser()
    add_arguments(parser, Config)
    assert '100 % of them (default: none)' in parser.format_help()
    assert vars(parser.parse_args(['-s', '3', '--rates', '0.5', '-1'])) == dict(size=3, rates=[0.5, -1.0])
    with pytest.raises(SystemExit):
        parser.parse_args([])
