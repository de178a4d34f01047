"""What a report says."""
import json

import pytest
import timm

from timm_dyacts import ConversionReport, convert
from timm_dyacts.convert import Replacement, Skip
from timm_dyacts.convert.report import OutputsDiffer


def report(**kwargs):
    return ConversionReport(
        replaced=[
            Replacement('a', 'ReLU', 'BReLU', True),
            Replacement('b', 'ReLU', 'BReLU', True),
            Replacement('c', 'MaxPool2d', 'BipolarMaxPool2d', True),
        ],
        skipped=[Skip('se.act', 'ReLU', 'inside a gate')],
        **kwargs,
    )


def test_counts_and_text():
    done = report(max_diff=0.5, scale=2.0, notes=['a remark'])
    assert done.counts == {'ReLU -> BReLU': 2, 'MaxPool2d -> BipolarMaxPool2d': 1}
    assert str(done).splitlines() == [
        '2 x ReLU -> BReLU',
        '1 x MaxPool2d -> BipolarMaxPool2d',
        'function: exact (largest difference 0.5 at outputs up to 2, probe batch)',
        'a remark',
        'left alone: se.act (ReLU): inside a gate',
    ]
    assert str(ConversionReport()).splitlines() == ['nothing replaced', 'function: exact']


def test_the_reports_of_steps_add_up():
    total = report(notes=['a remark'])
    total.add(ConversionReport(
        [Replacement('d', 'MaxPool2d', 'SoftPool2d', False)], [], 'approximate', 3.0, 4.0, True, ['a remark', 'more']))
    assert total.counts['MaxPool2d -> SoftPool2d'] == 1
    assert (total.function, total.flipped_output, total.max_diff) == ('approximate', True, None)
    assert total.notes == ['a remark', 'more']
    total.add(ConversionReport())
    assert (total.function, total.flipped_output) == ('approximate', True)


def test_everything_is_json():
    done = convert(timm.create_model('resnet18'), act='dyrelu_b', norm='none').conversion
    values = json.loads(json.dumps(done.to_dict()))
    assert values['counts'] == done.counts
    assert len(values['replaced']) == len(done.replaced) and values['replaced'][0]['new'] == done.replaced[0].new
    assert values['new_keys'] == list(done.new_keys)
    assert values['function'] == 'exact' and values['max_diff'] == done.max_diff


def test_the_error_of_a_failed_check():
    with pytest.raises(ValueError, match=r'differ by 0.25 .*largest output 2\).*Nothing was changed.*ReLU -> BReLU'):
        raise OutputsDiffer(0.25, 2.0, {'ReLU -> BReLU': 2})
