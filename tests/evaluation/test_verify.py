"""What is on record of a run can be measured again, to the last digit."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.photos import write_photos
from support.small_run import train_small

from timm_dyacts.cli.validate import main
from timm_dyacts.evaluation import ValidateConfig
from timm_dyacts.evaluation.verify import ResultsError, verify_results


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_dyacts.training.recorder.write_report', lambda *args: None)
        patch.setattr('timm_dyacts.training.recorder.plot_curves', lambda *args, **kwargs: None)
        folder = tmp_path_factory.mktemp('verify')
        photos = write_photos(folder / 'photos')
        train_small(photos, folder, '--epochs', 2, '--validation-batch-size', 5, '--model-ema', '--channels-last',
                    '--experiment', 'run', '--model-ema-decay', 0.5)
    return folder / 'run'


def config_of(path):
    return ValidateConfig(model=str(path), workers=0)


@pytest.mark.parametrize('which', ['.', 'ema'])
def test_a_run_gives_its_results_to_the_last_digit(run, which):
    folder = run / which
    assert verify_results(config_of(folder), str(folder)).endswith('are those on record, to the last digit.')


def test_what_it_takes_is_on_record(run):
    environment = json.loads((run / 'results.json').read_text())['environment']
    assert environment['threads'] == str(torch.get_num_threads()) and environment['batch_size'] == '5'
    assert environment['memory_format'] == 'channels_last' and environment['seed'] == '42'
    assert all(isinstance(value, str) for value in environment.values())


@pytest.fixture
def changed(run):
    """Lets a test change the results, and puts them back."""
    path = run / 'results.json'
    before = path.read_text()

    def change(**entries):
        path.write_text(json.dumps({**json.loads(before), **entries}))
    yield change
    path.write_text(before)


def test_another_stack_may_round_otherwise(run, changed):
    results = json.loads((run / 'results.json').read_text())
    other = dict(results['environment'], processor='x86_64 AVX2')
    changed(environment=other, loss=results['loss'] * 1.00001)
    assert 'within rounding: the stack is another one (processor x86_64' in verify_results(config_of(run), str(run))
    changed(environment=other, loss=results['loss'] * 1.1)
    with pytest.raises(ResultsError, match=r'loss is [\d.]+ where [\d.]+ is on record \(processor'):
        verify_results(config_of(run), str(run))
    changed(loss=results['loss'] * 1.00001)  # on the same one, nothing may
    with pytest.raises(ResultsError, match='does not give its results: loss is'):
        verify_results(config_of(run), str(run))


def test_results_without_an_environment_are_of_another_stack(run, changed):
    changed(environment={})
    assert 'within rounding' in verify_results(config_of(run), str(run))


def test_other_weights_are_noticed(run, capsys):
    weights = load_file(run / 'model.safetensors')
    before = (run / 'model.safetensors').read_bytes()
    try:
        save_file({key: value * 1.01 if key == 'fc.weight' else value for key, value in weights.items()},
                  run / 'model.safetensors')
        with pytest.raises(SystemExit, match=r'^[^\n]*: error: [^\n]*/run does not give its results: [^\n]*$'):
            main(['--model', str(run), '--verify', '-j', '0'])
    finally:
        (run / 'model.safetensors').write_bytes(before)
    main(['--model', str(run), '--verify', '-j', '0'])
    assert 'to the last digit' in capsys.readouterr().err


def test_where_there_is_nothing_on_record(tmp_path):
    assert verify_results(config_of(tmp_path), str(tmp_path)) is None
