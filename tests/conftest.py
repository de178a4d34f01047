"""What all tests share: the options of this suite, and one thread for each of its processes."""
import os
import random
import re

import pytest

# pytest-xdist runs as many processes as there are cores. Threads on top of that would only get in each other's way,
# also in the scripts that tests start.
os.environ.setdefault('OMP_NUM_THREADS', '1')


def pytest_configure():
    """Triton kernels run on the CPU, step by step, if there is no GPU. Triton has to know before it is imported.

    The first backward pass of a process starts a thread for each device, those that ``torch.compile`` only pretends to
    have too, and a process with such threads cannot be forked, as tests of several processes do. So it is made here.
    """
    import torch

    torch.zeros((), requires_grad=True).backward()

    if not torch.cuda.is_available():
        os.environ.setdefault('TRITON_INTERPRET', '1')


def pytest_addoption(parser):
    parser.addoption('--zoo', choices=('sample', 'all'), default='sample',
                     help='variants that tests/test_models.py goes through (default: %(default)s)')
    parser.addoption('--fuzz', type=int, default=1, metavar='N',
                     help='times as many tries of the tests that draw what they try, with seeds of their own')


@pytest.fixture
def tries(request):
    """How often a test that draws what it tries does so."""
    return lambda number: number * request.config.getoption('--fuzz')


@pytest.fixture
def seed(request):
    """Of what such a test draws: the same each time but in a long run, and printed where the test fails."""
    drawn = random.randrange(2 ** 32) if request.config.getoption('--fuzz') > 1 else 0
    drawn = int(os.environ.get('FUZZ_SEED', drawn))
    print(f'FUZZ_SEED={drawn}')
    return drawn


@pytest.fixture
def without_pictures(monkeypatch):
    """Spare the runs of a test the pictures at their end, which take longer than the training."""
    monkeypatch.setattr('timm_dyacts.training.recorder.write_report', lambda *args: None)
    monkeypatch.setattr('timm_dyacts.training.recorder.plot_curves', lambda *args, **kwargs: None)


# Those of the tests that speak to a Hub. Each of their modules has a fixture `served`: a server and its client.


@pytest.fixture
def server(served):
    yield served[0]
    served[0].reset()


@pytest.fixture
def client(served):
    return served[1]


@pytest.fixture
def repo_id(request):
    """A repo of each test's own, and so an empty cache."""
    return 'user/' + re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')[:90]
