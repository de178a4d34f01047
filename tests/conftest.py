"""The one option of this test suite."""


def pytest_addoption(parser):
    parser.addoption('--zoo', choices=('sample', 'all'), default='sample',
                     help='variants that tests/test_models.py goes through (default: %(default)s)')
