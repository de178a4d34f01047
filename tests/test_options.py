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

from timm_dyacts.cli import predict as predict_command
from timm_dyacts.cli import train as train_command
from timm_dyacts.cli import validate as validate_command
from timm_dyacts.evaluation import PredictConfig, ValidateConfig
from timm_dyacts.options import Options, add_arguments, declarations, option, read_yaml, to_dict
from timm_dyacts.training import TrainConfig

REQUIRED = {
    TrainConfig: {},
    ValidateConfig: dict(model=('net',)),
    PredictConfig: dict(model='net', images=('a.png', 'b.png')),
}
# What an option means nothing without
NEEDED = dict(
    transition_sched=dict(transition_epochs=1),
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
    cutmix_minmax=dict(cutmix_minmax=(0.2, 0.8)),
    torchcompile_mode=dict(torchcompile='inductor'),
)
PARSERS = {
    TrainConfig: train_command.create_parser,
    ValidateConfig: validate_command.create_parser,
    PredictConfig: predict_command.create_parser,
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


@pytest.mark.parametrize('name', NUMBERS)
def test_numbers_out_of_range_are_refused(name):
    declared = TABLE[name][1].option
    too_small = [-math.inf]
    if declared.minimum is not None:
        too_small += [declared.minimum - 1, declared.minimum - 10 ** 6]
    if declared.above is not None:
        too_small += [declared.above, declared.above - 1]
    too_large = [math.inf]
    if declared.maximum is not None:
        too_large += [declared.maximum + 1]
    if declared.below is not None:
        too_large += [declared.below, declared.below + 1]
    for number in (*too_small, math.nan, *too_large):
        with pytest.raises(ValueError) as error:
            create(name, with_number(name, number))
        assert str(error.value).startswith(f'{TABLE[name][1].title} must be {TABLE[name][1].accepted}, got ')


@pytest.mark.parametrize('name', NUMBERS)
def test_every_number_has_a_least_value(name):
    declared = TABLE[name][1].option
    assert (declared.minimum is None) != (declared.above is None) or name in ('mean', 'head_init_bias')


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


def test_an_integer_of_more_digits_than_python_writes():
    with pytest.raises(ValueError, match='at most 2147483647, got an integer of thousands of digits'):
        TrainConfig(epochs=10 ** 5000)


def test_values_are_converted_to_the_declared_type():
    config = TrainConfig(lr=1, scale=[0.5, 1], output=Path('out'), wandb_tags='one', model_kwargs={'a': 1})
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
EXCLUSIVE = [
    _NO_SPLITS | _NO_BALANCE,
    _NO_BCE | _NO_BALANCE | dict(
        mixup=0.0, cutmix=0.0, cutmix_minmax=None, mixup_off_epoch=0, no_aug=False, sync_bn=False, freeze='none'),
    _NO_SPLITS | _NO_BCE | dict(aug_repeats=0.0),
]
CASES = [*((TrainConfig, exclusive) for exclusive in EXCLUSIVE), (ValidateConfig, {}), (PredictConfig, {})]


def other_than_default(cls: type[Options], exclusive: Mapping[str, Any]) -> Options:
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
            checkpoint_interval='7epochs', init='default', batch_size=6, sched='poly', torchcompile='inductor',
            dataset='', aa='rand-m9'),  # for the sake of labels
        ValidateConfig: dict(model='some model', torchcompile='inductor', dataset=''),
        PredictConfig: dict(torchcompile='inductor'),
    }
    return cls(**values | fixed[cls] | exclusive)


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


@pytest.mark.parametrize('cls, exclusive', CASES)
def test_every_option_goes_through_the_command_line(cls, exclusive):
    config = other_than_default(cls, exclusive)
    same = {name for name, declared in declarations(cls).items() if getattr(config, name) == declared.default}
    assert same == exclusive.keys() | ({'init'} if cls is TrainConfig else set()), 'all others differ'
    given = vars(PARSERS[cls]().parse_args(argv_of(config)))
    given.pop('verify', None)
    assert cls(**given) == config


@pytest.mark.parametrize('cls', REQUIRED)
def test_the_command_line_gives_what_is_on_it_alone(cls):
    argv = {TrainConfig: [], ValidateConfig: ['-m', 'net'], PredictConfig: ['a.png', 'b.png', '--model', 'net']}
    given = vars(PARSERS[cls]().parse_args(argv[cls]))
    given.pop('verify', None)
    assert given.keys() == REQUIRED[cls].keys()
    assert cls(**given) == cls(**REQUIRED[cls])


def test_every_option_is_in_some_case():
    assert not set.intersection(*(set(exclusive) for exclusive in EXCLUSIVE))


@pytest.mark.parametrize('cls, exclusive', CASES)
def test_every_option_goes_through_yaml(cls, exclusive, tmp_path):
    config = other_than_default(cls, exclusive)
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


@pytest.mark.parametrize('cls', REQUIRED)
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
