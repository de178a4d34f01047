"""``timm-dyacts zoo --find``."""
import csv
import io
import json

import pytest

from timm_dyacts.cli.zoo import main

FIND = ['--find', 'test_resnet', 'test_vit', '--operators', 'dyrelu_b', 'softpool']


def test_the_table(capsys):
    main(FIND)
    lines = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ['name', 'starts', 'replaced', 'base, M', 'variant, M']
    assert [(line[0], line[1]) for line in lines[2:]] == [
        ('`test_resnet_dyrelu_b`', 'exact'), ('`test_resnet_softpool`', 'exact by transition'),
        ('`test_vit_dyrelu_b`', 'exact by transition'), ('`test_vit_softpool`', 'refused')]
    assert lines[2][2].endswith('ReLU -> DyReLUB') and float(lines[2][4]) > float(lines[2][3])
    assert lines[5][2].startswith("Nothing in this model can be replaced for pool='softpool'. It has no max pool")


def test_csv_and_json_say_the_same(capsys):
    main([*FIND, '--format', 'csv'])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    main([*FIND, '--format', 'json'])
    records = json.loads(capsys.readouterr().out)
    assert [row.keys() for row in rows] == [record.keys() for record in records]
    for row, record in zip(rows, records, strict=True):
        replaced = ', '.join(f'{count} {kind}' for kind, count in record.pop('replaced').items())
        assert row == {k: '' if v is None else str(v) for k, v in record.items()} | dict(replaced=replaced)


def test_options_of_the_variants(capsys):
    main(['--find', 'test_resnet', '--operators', 'dyrelu_b_nobn', '--format', 'json', '--model-kwargs', 'where=late',
          "act_kwargs={'max_hidden': 2}"])
    record, = json.loads(capsys.readouterr().out)
    main(['--find', 'test_resnet_softpool', '--format', 'json', '--model-kwargs', 'transition=False'])
    plain, = json.loads(capsys.readouterr().out)
    assert plain['start'] == 'approximate'
    assert record['name'] == 'test_resnet_dyrelu_b_nobn' and record['start'] == 'exact'
    assert 'ReLU -> DyReLUB' in record['replaced']


@pytest.mark.parametrize('argv, message', [
    (['--find', 'convnextt_tiny'], "No architecture of timm matches 'convnextt_tiny'. Close names: convnext_tiny"),
    (['--find', 'test_resnet', ''], "--find must be names or wildcards, such as *, got ['test_resnet', '']"),
    (['--format', 'csv'], '--format is for what --find finds'),
    (['--operators', 'brelu'], '--operators is for what --find finds'),
    (['--model-kwargs', 'where=all'], '--model-kwargs is for what --find finds'),
    (['--find', 'test_resnet', '--operators', 'softpool', '--model-kwargs', 'where=all'],
     'test_resnet_softpool takes no where'),
    (['--find', 'test_resnet', '--model-kwargs', 'where=nonsense'], 'where must be one of'),
    (['--find', 'test_resnet', '--model-kwargs', 'nonsense=1'], "unexpected keyword argument 'nonsense'"),
])
def test_mistakes_end_with_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    text = str(exit_info.value)
    assert text.startswith('timm-dyacts zoo: error: ') and message in text and '\n' not in text
    assert capsys.readouterr().out == ''
