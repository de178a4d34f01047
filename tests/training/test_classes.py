"""Classes of unlike size: weights in the loss, a balanced sampler, and the scores of each class."""
import csv

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.photos import write_photos
from support.small_run import assert_same_end, train_small
from torch import nn

import timm_dyacts  # noqa: F401
from timm_dyacts.data import create_dataset
from timm_dyacts.evaluation.per_class import ClassScores, plot_classes, write_classes
from timm_dyacts.training import TrainConfig, TrainingInterrupted
from timm_dyacts.training.class_weights import WeightedCrossEntropy, resolve_class_weights

NAMES = ['blue', 'green', 'red']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """15 training images: 8 blue, 5 green and 2 red ones."""
    root = write_photos(tmp_path_factory.mktemp('photos'))
    for name, count in (('green', 5), ('red', 2)):
        for i in range(count, 8):
            (root / 'train' / name / f'{i}.png').unlink()
    return root


@pytest.fixture
def run(photos, tmp_path, without_pictures):
    def call(experiment, *options):
        train_small(photos, tmp_path, '-b', 4, '--epochs', 2, '--experiment', experiment, *options)
        return tmp_path / experiment
    return call


# Weights


def weights_of(photos, text, num_classes=3):
    return resolve_class_weights(text, create_dataset('', root=str(photos), split='train'), NAMES, num_classes)


def test_balanced_weights(photos):
    weights = weights_of(photos, 'balanced')
    assert weights == pytest.approx([15 / 24, 15 / 15, 15 / 6])
    assert sum(n * w for n, w in zip((8, 5, 2), weights, strict=True)) == pytest.approx(15), 'one on average'
    assert weights_of(photos, 'balanced', 4) == [*weights, 1.0]


def test_given_weights(photos, tmp_path):
    assert weights_of(photos, '1,2.5, 0') == [1, 2.5, 0]
    file = tmp_path / 'weights.csv'
    file.write_text('weight,class\n3,red\n1,blue\n2,green\n')
    assert weights_of(photos, str(file)) == [1, 2, 3]
    assert resolve_class_weights('1', [], None, 1) == [1]


@pytest.mark.parametrize('text, message', [
    ('1,2', "must have a number for each of the 3 classes, got 2 in '1,2'"),
    ('balancd', "must be 'balanced', a finite number for each class .*, got 'balancd'"),
    ('1,2,x', "got '1,2,x' with 'x'"),
    ('1,2,nan', "got '1,2,nan' with 'nan'"),
    ('1,2,-1', "must be numbers of at least 0, not all 0, got '1,2,-1'"),
    ('0,0,0', 'not all 0'),
    ('class,weight\nred,1\nblue,1\n', 'must have one row for each class: it lacks green'),
    ('class,weight\nred,1\nblue,1\ngreen,1\nbrown,1\n', 'it has brown, of which the data know nothing'),
    ('class,weight\nred,1\nblue,1\ngreen,1\ngreen,1\n', 'it has 4 rows for 3 classes'),
    ('class,weight\nred,1\nblue,much\ngreen,1\n', "with 'much'"),
    ('class,weight\nred,1\nblue\ngreen,1\n', 'with None'),
    ('name,weight\nred,1\n', 'must have the columns class and weight'),
    ('', "got ''"),
])
def test_bad_weights(photos, tmp_path, text, message):
    if '\n' in text:
        (tmp_path / 'weights.csv').write_text(text)
        text = str(tmp_path / 'weights.csv')
    with pytest.raises(ValueError, match=f'^--class-weights .*{message}'):
        weights_of(photos, text)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_weighted_loss(smoothing):
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([1.0, 2.0, 0.5])
    targets = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    expected = -(weights * targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(WeightedCrossEntropy(weights, smoothing)(logits, labels), expected)
    torch.testing.assert_close(WeightedCrossEntropy(weights, smoothing)(logits, targets), expected)
    plain = WeightedCrossEntropy(torch.ones(3), smoothing)(logits, labels)
    torch.testing.assert_close(plain, nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels))
    halves = [WeightedCrossEntropy(weights, smoothing)(logits[i:i + 3], labels[i:i + 3]) for i in (0, 3)]
    torch.testing.assert_close(sum(halves) / 2, expected)


@pytest.mark.parametrize('options, message', [
    (dict(class_weights='balanced', bce_loss=True), '--class-weights must be left out with --bce-loss'),
    (dict(class_weights='1,2', jsd_loss=True, aug_splits=3), '--class-weights must be left out with --jsd-loss'),
    (dict(balanced_sampler=True, aug_repeats=3), '--balanced-sampler must be left out with --aug-repeats'),
])
def test_what_does_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


# Runs


@pytest.mark.parametrize('options', [
    ['--balanced-sampler', '--reprob', '0.5', '--aa', 'rand-m5'],
    ['--class-weights', 'balanced', '--mixup', '0.2', '--val-fraction', '0.3'],
], ids=' '.join)
def test_stopped_and_resumed(run, interrupt, options):
    whole = run('whole', *options, '--checkpoint-interval', 1)
    interrupt(2)
    with pytest.raises(TrainingInterrupted):
        run('stopped', *options)
    interrupt(-1)
    assert_same_end(whole, run('stopped', *options, '--resume', 'auto'))


def test_weights_change_the_training_and_must_stay_the_same(run, tmp_path):
    file = tmp_path / 'weights.csv'
    file.write_text('class,weight\nred,3\nblue,1\ngreen,2\n')
    rows = [(run(name, *options) / 'summary.csv').read_text() for name, options in (
        ('plain', []), ('ones', ['--class-weights', '1,1,1']), ('file', ['--class-weights', file]),
        ('list', ['--class-weights', '1,2,3']))]
    losses = [float(next(csv.DictReader(text.splitlines()))['train_loss']) for text in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), 'no weights are weights of 1'
    assert losses[2] == losses[3] != pytest.approx(losses[0], rel=0.1)
    file.write_text('class,weight\nred,4\nblue,1\ngreen,2\n')
    with pytest.raises(ValueError, match=r'weights \[1.0, 2.0, 3.0\], and there are .* weights \[1.0, 2.0, 4.0\]'):
        run('file', '--class-weights', file, '--resume', 'auto')


# Scores


def test_scores_of_each_class(tmp_path):
    metrics = pytest.importorskip('sklearn.metrics')
    matrix = torch.tensor([[5, 1, 0, 0], [2, 3, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    scores = ClassScores.of(matrix)
    pairs = [(i, j) for i in range(4) for j in range(4) for _ in range(matrix[i, j])]
    expected = metrics.precision_recall_fscore_support(*zip(*pairs, strict=True), labels=range(4), zero_division=0)
    for ours, theirs in zip((scores.precision, scores.recall, scores.f1, scores.support), expected, strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist())
    assert scores.macro_f1 == pytest.approx(sum(scores.f1.tolist()[:3]) / 3), 'of the classes that have images'
    write_classes(scores, ['a', 'b, c', 'd', 'e'], tmp_path / 'classes.csv')
    with open(tmp_path / 'classes.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == ['a', 'b, c', 'd', 'e']
    assert [float(row['f1']) for row in rows] == pytest.approx(scores.f1.tolist(), abs=1e-6)
    assert [row['support'] for row in rows] == ['6', '5', '4', '0']


@pytest.mark.parametrize('count', [2, 60])
def test_picture_of_the_classes(tmp_path, count):
    pytest.importorskip('matplotlib')
    matrix = torch.randint(1, 9, (count, count), generator=torch.Generator().manual_seed(0))
    matrix += torch.eye(count, dtype=torch.long) * 8 * count
    path = tmp_path / 'classes.png'
    plot_classes(ClassScores.of(matrix), [f'a class with a very long name, number {i}' for i in range(count)], path)
    with Image.open(path) as image:
        assert image.height > 200 and len(image.convert('RGB').getcolors(1 << 22)) > 30
