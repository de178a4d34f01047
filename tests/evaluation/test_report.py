"""The pictures of a run, its log, and what results.json says."""
import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from support.photos import COLORS, write_photos
from support.small_run import train_small

import timm_dyacts
from timm_dyacts.evaluation import evaluate
from timm_dyacts.evaluation.pictures import DyReLUStats, Mistake, plot_mistakes
from timm_dyacts.evaluation.report import _DyReLURecorder, _pool_in_three_ways, write_report
from timm_dyacts.plotting import create_figure
from timm_dyacts.training.log import best_row, write_summary

pytest.importorskip('matplotlib')


@pytest.fixture
def run(tmp_path):
    photos = write_photos(tmp_path / 'photos')

    def call(*options):
        return Path(train_small(photos, tmp_path / 'out', '--epochs', 2, '--experiment', 'run', *options).folder)
    return call


def is_picture(path):
    with Image.open(path) as image:
        colors = image.convert('RGB').getcolors(1 << 22)
        return image.width > 300 and len(colors) > 30


# Pictures


@pytest.mark.parametrize('name, pictures', [
    ('resnet10t_dyrelu_b', {'classes.png', 'confusion.png', 'mistakes.png', 'dyrelu.png'}),
    ('resnet10t_softpool', {'classes.png', 'confusion.png', 'mistakes.png', 'softpool.png'}),
])
def test_pictures_of_a_model(tmp_path, name, pictures):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3)
    loader = [(torch.randn(8, 3, 64, 64), torch.randint(3, (8,))) for _ in range(2)]
    write_report(model, loader, str(tmp_path), dict(mean=(0.5,) * 3, std=(0.2,) * 3), list(COLORS))
    assert {path.name for path in tmp_path.iterdir()} == pictures | {'classes.csv'}
    assert all(map(is_picture, tmp_path.glob('*.png')))


def test_no_mistakes_no_grid(tmp_path):
    (tmp_path / 'mistakes.png').touch()  # of an earlier, worse checkpoint
    model = timm.create_model('test_resnet', num_classes=3)
    images = torch.randn(8, 3, 32, 32)
    labels = model.eval()(images).argmax(1)
    write_report(model, [(images, labels)], str(tmp_path), dict(mean=(0,) * 3, std=(1,) * 3))
    assert {path.name for path in tmp_path.iterdir()} == {'classes.csv', 'classes.png', 'confusion.png'}


@pytest.mark.parametrize('count', [1, 2, 3, 4, 24])
def test_the_title_of_few_mistakes_is_not_cut_off(tmp_path, monkeypatch, count):
    figures = []

    def remember(*args, **kwargs):
        figures.append(create_figure(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr('timm_dyacts.evaluation.pictures.create_figure', remember)
    mistakes = [Mistake(torch.rand(3, 8, 8), 0, 1, 0.9)] * count
    title = f'{count} of 100000 validation images classified wrongly; the surest mistakes first'
    plot_mistakes(mistakes, ['a class with a long name', 'b'], tmp_path / 'mistakes.png', title)
    [figure] = figures
    figure.draw_without_rendering()
    [text] = figure.texts
    assert text.get_text() == title
    box = text.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert all(box.y0 >= ax.get_tightbbox().y1 for ax in figure.axes[:6]), 'nor over the pictures'


def test_pooled_maps_are_max_average_and_soft():
    torch.manual_seed(0)  # two values that are all but equal would both count in the sharpest softmax
    x = torch.randn(1, 6, 9, 9, dtype=torch.double)
    pool = timm_dyacts.SoftPool2d(3, 2, padding=1, beta=1.5)
    before, most, mean, soft = _pool_in_three_ways(pool, x).values()
    channels = x[0].flatten(1).std(1).topk(4).indices
    assert torch.equal(before, x[0, channels])
    torch.testing.assert_close(most, torch.nn.functional.max_pool2d(before, 3, 2, 1))
    average = torch.nn.functional.avg_pool2d(before, 3, 2, 1, count_include_pad=False)
    torch.testing.assert_close(mean, average)
    torch.testing.assert_close(soft, pool(x)[0, channels])
    assert pool.beta == 1.5


def test_dyrelu_statistics():
    torch.manual_seed(0)
    module = timm_dyacts.DyReLUB(6)
    torch.nn.init.normal_(module.fc2_weight)
    batches = [torch.randn(20, 6, 4, 4) for _ in range(2)]
    with _DyReLURecorder('act', module) as recorder:
        for batch in batches:
            module(batch)
    stats = recorder.stats()
    coefficients = module.coefficients(torch.cat(batches)).detach().double()
    expected = torch.stack([coefficients[..., i].flatten().quantile(0.5) for i in range(4)])
    torch.testing.assert_close(stats.quantiles([0.5])[:, 0], expected, atol=0.01, rtol=0)
    torch.testing.assert_close(
        stats.over_images, coefficients.var(0, correction=0).mean(0).sqrt(), atol=1e-6, rtol=1e-6)
    module(batches[0])
    assert stats.counts.sum() == 40 * 6 * 4, 'nothing is gathered after the end'


def test_a_fresh_dyrelu_shows_as_relu():
    with _DyReLURecorder('act', timm_dyacts.DyReLUB(4)) as recorder:
        recorder.module(torch.randn(8, 4, 3, 3))
    stats: DyReLUStats = recorder.stats()
    torch.testing.assert_close(
        stats.quantiles([0.05, 0.95]), stats.start[:, None].expand(-1, 2), atol=5.1e-3, rtol=0)
    assert stats.over_images.max() == 0


# The log


def test_results_say_what_the_weights_are(run):
    folder = run('--model-ema', '--model-ema-decay', '0.5')
    with open(folder / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    for place, kind in ((folder, 'eval'), (folder / 'ema', 'ema')):
        results = json.loads((place / 'results.json').read_text())
        row = rows[results['epoch']]
        assert [results[k] for k in ('top1', 'top5', 'loss')] == [
            float(row[f'{kind}_{k}']) for k in ('top1', 'top5', 'loss')]
        assert results['top1'] == max(float(row[f'{kind}_top1']) for row in rows)
        assert (results['dataset'], results['split'], results['num_images']) == ('photos', 'validation', 12)
        assert set(results['preprocessing']) == {'input_size', 'interpolation', 'mean', 'std', 'crop_pct'}
        assert results['start'] == dict(
            model='test_resnet', pretrained=False, source=None, license=None, warm_start=None, kd_model=None)
        assert set(results['versions']) == {'timm_dyacts', 'timm', 'torch', 'python'}
        model = timm.create_model(f'local-dir:{place}', pretrained=True)
        assert model.pretrained_cfg['label_names'] == list(COLORS)


def test_the_average_in_the_folder_is_the_one_that_was_evaluated(run, monkeypatch):
    seen = {}

    def remember(model, *args, **kwargs):
        metrics = evaluate(model, *args, **kwargs)
        seen[metrics['loss']] = {key: value.clone() for key, value in model.state_dict().items()}
        return metrics

    monkeypatch.setattr('timm_dyacts.training.trainer.evaluate', remember)
    folder = run('--model-ema', '--model-ema-decay', '0.5', '--eval-metric', 'loss')
    results = json.loads((folder / 'ema' / 'results.json').read_text())
    model = timm.create_model(f'local-dir:{folder / "ema"}', pretrained=True)
    assert all(torch.equal(value, seen[results['loss']][key]) for key, value in model.state_dict().items())


def test_best_row():
    rows = [dict(epoch=i, eval_top1=top1, eval_loss=loss) for i, (top1, loss) in enumerate([(1, 3), (5, 2), (5, 1)])]
    assert best_row(rows, 'eval_top1')['epoch'] == 1, 'the first of equals'
    assert best_row(rows, 'eval_loss')['epoch'] == 2
    assert best_row([dict(eval_loss=float('nan')), dict(eval_loss=7)], 'eval_loss')['eval_loss'] == 7


def test_summary_is_written_in_one_piece(tmp_path, monkeypatch):
    write_summary([dict(epoch=0, lr=1)], tmp_path / 'summary.csv')
    old = (tmp_path / 'summary.csv').read_text()

    def fail(file):
        raise OSError('No space left on device')

    monkeypatch.setattr('os.fsync', fail)
    with pytest.raises(OSError, match='No space left'):
        write_summary([dict(epoch=0, lr=1), dict(epoch=1, lr=1)], tmp_path / 'summary.csv')
    assert (tmp_path / 'summary.csv').read_text() == old == 'epoch,lr\n0,1\n'
