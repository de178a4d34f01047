"""The run folder: what is written is read back, what version 0.1 wrote too, and nothing else is taken for results."""
import copy
import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from support.run_folder import RESULTS, write_run
from support.trained_like import trained_like

from timm_dyacts import run_folder
from timm_dyacts.run_folder import CheckpointFolder, Preprocessing, Results, RunFolder, Start, how_to_finish

# As version 0.1 wrote it, after an epoch of resnet10t_dyrelu_b
RESULTS_0_1 = """{
  "top1": 38.611111111111114,
  "top5": 87.77777777777777,
  "loss": 1.7679585377375284,
  "epoch": 0,
  "dataset": "digits",
  "split": "validation",
  "num_images": 360,
  "preprocessing": {
    "input_size": [
      3,
      32,
      32
    ],
    "interpolation": "bicubic",
    "mean": [
      0.485,
      0.456,
      0.406
    ],
    "std": [
      0.229,
      0.224,
      0.225
    ],
    "crop_pct": 1.0
  },
  "date": "2026-11-24",
  "start": {
    "model": "resnet10t_dyrelu_b",
    "pretrained": false,
    "source": null,
    "license": null,
    "warm_start": null,
    "kd_model": null
  },
  "versions": {
    "timm_dyacts": "0.1.0",
    "timm": "1.0.31",
    "torch": "2.14.1+cu130",
    "python": "3.11.7"
  }
}"""
OPTIONS_0_1 = """aa: null
amp: false
batch_size: 64
checkpoint_interval: 1epoch
crop_pct: 1.0
data_dir: null
dataset: digits
img_size: 32
lr: 0.001
model: resnet10t_dyrelu_b
model_kwargs: {}
pretrained: false
ratio:
- 0.85
- 1.18
scale:
- 0.7
- 1.0
val_split: validation
wandb_tags: []
warmup_lr: 1.0e-05
"""
READ_0_1 = Results(
    top1=38.611111111111114,
    top5=87.77777777777777,
    loss=1.7679585377375284,
    epoch=0,
    dataset='digits',
    split='validation',
    num_images=360,
    preprocessing=Preprocessing((3, 32, 32), 'bicubic', (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0),
    date='2026-11-24',
    start=Start('resnet10t_dyrelu_b', pretrained=False),
    versions=dict(timm_dyacts='0.1.0', timm='1.0.31', torch='2.14.1+cu130', python='3.11.7'),
)
ENTRIES = [
    *RESULTS,
    *(f'preprocessing.{name}' for name in RESULTS['preprocessing']),
    *(f'start.{name}' for name in RESULTS['start']),
]
VALUES = [
    {}, {'a': {'b': []}}, [], [[1]], [None], ['a', 1], '98.6', '', None, True, 1, -1, 0.5, math.nan, math.inf,
    10 ** 400,
]
# Those of them that an entry may hold
ALLOWED = {
    **dict.fromkeys(('top1', 'top5', 'loss', 'preprocessing.crop_pct'), [1, -1, 0.5]),
    **dict.fromkeys(('dataset', 'split', 'date', 'preprocessing.interpolation', 'start.model'), ['98.6', '']),
    **dict.fromkeys((f'start.{name}' for name in ('source', 'license', 'warm_start', 'kd_model')), ['98.6', '', None]),
    'epoch': [1, 10 ** 400, None],
    'num_images': [1, 10 ** 400],
    'start.pretrained': [True],
    'versions': [{}],
}
DEEP = '[' * 100_000


def changed(path, *value):
    """``RESULTS`` with another value for an entry, or without it."""
    values = copy.deepcopy(RESULTS)
    *outer, name = path.split('.')
    part = values[outer[0]] if outer else values
    del part[name]
    if value:
        part[name] = value[0]
    return values


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / 'results.json').write_text(text, encoding='utf-8')
    return CheckpointFolder(folder)


class TestResults:
    def test_round_trip(self):
        results = Results.from_dict(RESULTS)
        assert Results.from_dict(json.loads(json.dumps(results.to_dict()))) == results
        assert json.loads(json.dumps(results.to_dict())) == RESULTS
        assert results.preprocessing.input_size == (3, 32, 32)
        assert results.start.warm_start == 'exact' and results.epoch == 8

    def test_what_version_0_1_wrote(self, tmp_path):
        """It is read unchanged, and written to the same bytes."""
        checkpoint = write(tmp_path, RESULTS_0_1)
        assert checkpoint.read_results() == READ_0_1
        assert json.dumps(READ_0_1.to_dict(), indent=2) == RESULTS_0_1

    def test_every_entry_has_a_kind(self):
        """A new field with a type of its own needs a test for it."""
        for record in (Results, Preprocessing, Start):
            for field in fields(record):
                assert field.type in run_folder._KINDS or field.type in (Preprocessing, Start), field

    @pytest.mark.parametrize('name', [name for name in ENTRIES if name != 'epoch'])
    def test_a_missing_entry(self, name):
        parts = {'preprocessing', 'start'}
        with pytest.raises(ValueError, match=f'^lacks {name}$' if name not in parts else f'^lacks {name}') as error:
            Results.from_dict(changed(name))
        assert 'has ' not in str(error.value)

    def test_all_that_is_missing_is_named_at_once(self):
        values = changed('start.license')
        del values['preprocessing']['mean'], values['top1']
        with pytest.raises(ValueError, match='^lacks top1, preprocessing.mean, start.license$'):
            Results.from_dict(values)

    def test_the_epoch_may_be_absent(self):
        assert Results.from_dict(changed('epoch')).epoch is None
        assert Results.from_dict(changed('epoch', None)).epoch is None
        assert replace(READ_0_1, epoch=None).to_dict()['epoch'] is None

    def test_unknown_entries_are_passed_over(self):
        values = changed('start.kd_model', None)
        values |= dict(top10=99.9, notes={'a': [1]})
        values['start']['weather'] = 'fine'
        assert Results.from_dict(values) == Results.from_dict(changed('start.kd_model', None))

    @pytest.mark.parametrize('name', ENTRIES)
    def test_a_wrong_type(self, name):
        """Either the entry holds what it may hold, or the error names it; never another exception."""
        for value in VALUES:
            if repr(value) in map(repr, ALLOWED.get(name, ())):
                Results.from_dict(changed(name, value))
                continue
            with pytest.raises(ValueError) as error:
                Results.from_dict(changed(name, value))
            assert name in str(error.value) and len(str(error.value)) < 300, value

    @pytest.mark.parametrize('name, value, words', [
        ('top1', '98.6', "has top1 = '98.6' instead of a finite number"),
        ('loss', math.nan, 'has loss = nan instead of a finite number'),
        ('epoch', 1.5, 'has epoch = 1.5 instead of a whole number, 0 or more, or null'),
        ('dataset', ['digits'], "has dataset = ['digits'] instead of a text"),
        ('preprocessing', 'none', "has preprocessing = 'none' instead of named entries"),
        ('preprocessing.mean', [0.5, '0.5'], "has preprocessing.mean = [0.5, '0.5'] instead of a list of finite"),
        ('preprocessing.input_size', [3, 32.5, 32], 'instead of a list of whole numbers'),
        ('start.pretrained', 'yes', "has start.pretrained = 'yes' instead of true or false"),
        ('start.license', {}, 'has start.license = {} instead of a text or null'),
        ('versions', {'torch': 2}, "has versions = {'torch': 2} instead of a text for each name"),
    ])
    def test_what_is_wrong_is_said(self, name, value, words):
        with pytest.raises(ValueError) as error:
            Results.from_dict(changed(name, value))
        assert words in str(error.value)

    def test_missing_and_wrong_together(self):
        values = changed('top1', None) | dict(start=dict(model=3))
        with pytest.raises(ValueError, match='lacks start.pretrained, .*; has top1 = None .*, start.model = 3 instead'):
            Results.from_dict(values)

    @pytest.mark.parametrize('values', [None, 'top1', [1], 98.6])
    def test_no_entries_at_all(self, values):
        with pytest.raises(ValueError, match='^lacks top1, top5, loss, dataset'):
            Results.from_dict(values)

    def test_the_versions_may_be_any_mapping(self):
        results = replace(READ_0_1, versions=MappingProxyType(dict(READ_0_1.versions)))
        assert results.to_dict() == READ_0_1.to_dict()


class TestCheckpointFolder:
    def test_files(self, tmp_path):
        checkpoint = CheckpointFolder(str(tmp_path))
        assert checkpoint.missing() == ['config.json', 'model.safetensors'] and checkpoint.read_results() is None
        checkpoint.config.write_text('{}')
        assert checkpoint.missing() == ['model.safetensors']
        checkpoint.weights.mkdir()
        assert checkpoint.missing() == ['model.safetensors'], 'a folder is no file'
        assert os.path.join(checkpoint, 'config.json') == str(checkpoint.config)
        assert str(checkpoint) == str(tmp_path) and checkpoint == CheckpointFolder(tmp_path)
        assert checkpoint != RunFolder(tmp_path)

    @pytest.mark.parametrize('text, words', [
        ('', 'is not JSON (Expecting value'),
        ('{"top1": 1', 'is not JSON'),
        (DEEP, 'is not JSON'),
        ('[1]', 'lacks top1, top5'),
        ('null', 'lacks top1, top5'),
        ('{"top1": NaN}', 'lacks top5'),
        ('{"top1": 1e999}', 'has top1 = inf'),
        ('{"top1": "98.6"}', "has top1 = '98.6'"),
    ], ids=lambda value: value[:20])
    def test_results_that_are_none(self, tmp_path, text, words):
        checkpoint = write(tmp_path, text)
        with pytest.raises(ValueError) as error:
            checkpoint.read_results()
        message = str(error.value)
        assert message.startswith(f"'{tmp_path / 'results.json'}' cannot be read: it ") and words in message
        assert message.endswith('Correct it, or remove it to go on without results.') and '\n' not in message

    def test_results_that_are_no_text(self, tmp_path):
        (tmp_path / 'results.json').write_bytes(b'\xff\xfe\0')
        with pytest.raises(ValueError, match='is not JSON .*utf-8'):
            CheckpointFolder(tmp_path).read_results()


class TestRunFolder:
    def test_where_everything_lies(self):
        run = RunFolder('out/run')
        names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
        assert {name: str(getattr(run, name)) for name in names} == dict(
            options='out/run/args.yaml',
            summary='out/run/summary.csv',
            curves='out/run/curves.png',
            classes='out/run/classes.csv',
            classes_picture='out/run/classes.png',
            confusion='out/run/confusion.png',
            mistakes='out/run/mistakes.png',
            dyrelu='out/run/dyrelu.png',
            softpool='out/run/softpool.png',
            state='out/run/checkpoint/state.pt',
            previous_state='out/run/checkpoint/previous.pt',
            trackers='out/run/trackers.json',
            profile='out/run/profile',
            publish='out/run/publish',
        )
        assert {which: str(run.checkpoint(which)) for which in run_folder.CHECKPOINTS} == dict(
            best='out/run', ema='out/run/ema', last='out/run/last')
        assert str(run) == os.fspath(run) == 'out/run' and repr(run) == "RunFolder('out/run')"
        assert run == RunFolder(Path('out/run')) and hash(run) == hash(RunFolder(Path('out/run')))
        assert run.checkpoints() == [] and run.find_state() is None and run.read_options() is None

    def test_images_of_the_data_are_not_published(self):
        assert not {'mistakes.png', 'softpool.png'} & {*run_folder.PUBLISHED_EXTRAS}

    def test_checkpoints(self, tmp_path):
        run = RunFolder(write_run(tmp_path, trained_like('test_resnet', num_classes=10)))
        assert run.checkpoints() == ['best', 'ema', 'last']
        assert run.checkpoint('ema').read_results().top1 == run.checkpoint('best').read_results().top1 - 1
        run.checkpoint('best').weights.unlink()
        run.checkpoint('last').config.unlink()
        assert run.checkpoints() == ['ema']
        with pytest.raises(KeyError, match='worst'):
            run.checkpoint('worst')

    def test_find_state(self, tmp_path):
        run = RunFolder(tmp_path)
        run.state.parent.mkdir()
        run.previous_state.write_bytes(b'')
        assert run.find_state() == run.previous_state
        run.state.write_bytes(b'')
        assert run.find_state() == run.state

    def test_of_state(self, tmp_path, monkeypatch):
        assert RunFolder.of_state(RunFolder(tmp_path).state) == RunFolder(tmp_path)
        (tmp_path / 'checkpoint').mkdir()
        monkeypatch.chdir(tmp_path / 'checkpoint')
        for state in ('state.pt', './state.pt', '../checkpoint/state.pt'):
            assert RunFolder.of_state(state) == RunFolder(tmp_path)
        assert str(RunFolder.of_state('/state.pt')) == '/', 'wherever it lies'

    def test_containing(self, tmp_path, monkeypatch):
        run = RunFolder(tmp_path / 'run')
        for which in run_folder.CHECKPOINTS:
            run.checkpoint(which).path.mkdir(exist_ok=True)
        assert RunFolder.containing(run) is None
        run.write_options({})
        for which in run_folder.CHECKPOINTS:
            assert RunFolder.containing(run.checkpoint(which)) == run
            assert RunFolder.containing(str(run.checkpoint(which))) == run
        (tmp_path / 'elsewhere').symlink_to(run.checkpoint('last'))
        assert RunFolder.containing(tmp_path / 'elsewhere') == run
        assert RunFolder.containing(tmp_path) is None
        monkeypatch.chdir(run)
        assert RunFolder.containing('.').path.samefile(run.path) and RunFolder.containing('last') == run
        assert RunFolder.containing('resnet18') is None, 'a name of a model, and no folder here'

    def test_options_round_trip(self, tmp_path):
        run = RunFolder(tmp_path)
        options = dict(model='resnet18', lr=1e-05, scale=[0.7, 1.0], data_dir='/Größe', aa=None, model_kwargs={'a': 1})
        run.write_options(MappingProxyType(options))
        assert run.read_options() == options
        assert [path.name for path in tmp_path.iterdir()] == ['args.yaml']

    def test_options_as_version_0_1_wrote_them(self, tmp_path):
        """They are read unchanged, and written to the same bytes."""
        run = RunFolder(tmp_path)
        run.options.write_text(OPTIONS_0_1)
        options = run.read_options()
        assert options == yaml.safe_load(OPTIONS_0_1)
        assert options['warmup_lr'] == 1e-05 and options['ratio'] == [0.85, 1.18] and options['aa'] is None
        run.write_options(options)
        assert run.options.read_text() == OPTIONS_0_1

    @pytest.mark.parametrize('text, words', [
        ('{', 'is not YAML'),
        ('a: !!python/object:os.system {}', 'is not YAML'),
        ('a: 2026-13-45', 'is not YAML'),
        (DEEP[:5000], 'is not YAML'),
        ('', 'does not hold the options of a run'),
        ('- 1', 'does not hold the options of a run'),
        ('model', 'does not hold the options of a run'),
        ('1: 2', 'does not hold the options of a run'),
    ], ids=lambda value: value[:20])
    def test_options_that_are_none(self, tmp_path, text, words):
        run = RunFolder(tmp_path)
        run.options.write_text(text)
        with pytest.raises(ValueError) as error:
            run.read_options()
        message = str(error.value)
        assert message.startswith(f"'{run.options}' {words}") and '\n' not in message
        assert message.endswith('Correct it, or remove it to go on without the options.')


@pytest.mark.parametrize('t', [0, 0.25, 1])
@pytest.mark.parametrize('which', ['.', 'ema', 'last'])
def test_how_a_transition_is_finished(tmp_path, which, t):
    folder = tmp_path / which
    folder.mkdir(exist_ok=True)
    by_hand = 'Load it, call finish_transition(model), with which it '
    for model in (str(folder), f'local-dir:{folder}', 'hf-hub:user/name', None):
        words = how_to_finish(model, t)
        start = f"Train it: timm-dyacts train --model '{model}' --pretrained --transition-epochs N. Or load it, "
        assert words.startswith(start if t == 0 and model else by_hand) and '--resume' not in words
    (tmp_path / 'args.yaml').touch()
    (tmp_path / 'checkpoint').mkdir()
    (tmp_path / 'checkpoint' / 'previous.pt').touch()
    words = how_to_finish(f'local-dir:{folder}', t)
    assert words.startswith(
        by_hand + 'computes the same' if t == 1 else f"Train on: timm-dyacts train --resume '{tmp_path}'. Or load it, ")
