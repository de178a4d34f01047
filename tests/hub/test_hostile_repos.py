"""A fuzzer of repos: whatever is in their files, the model that was published or a clear error, soon and in little
memory; nothing is fetched from elsewhere, nothing is opened that is not of the repo, nothing is run.

What fails says the seed and the number of the try. ``--fuzz 100`` tries harder.
"""
import json
import random
import shutil
import struct

import pytest
from support.hostile import CANARY, corrupt, is_clean
from support.hub_client import read_folder, serve
from support.run_folder import write_checkpoint, write_run
from support.trained_like import trained_like

from timm_dyacts import hub

TRIES = 60
SECONDS, MIB = 30, 2000  # for one try; what the client has in memory at most, of which torch takes a quarter
# Runs in the client: watches what Python opens, connects to and runs.
WATCH = """
import ast, os, pickle, re, sys, time, contextlib, io, warnings, logging
logging.disable(logging.CRITICAL)
warnings.simplefilter('ignore')
seen = []

def watch(event, args):
    if event == 'open' and os.path.basename(str(args[0])) in ('canary.pth', 'passwd'):
        seen.append(repr(args[0]))
    if event == 'socket.connect' and args[1][0] not in ('127.0.0.1', '::1'):
        seen.append(repr(args[1]))
    if event == 'socket.getaddrinfo' and args[0] not in ('127.0.0.1', 'localhost'):
        seen.append(repr(args[0]))
    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'pickle.find_class'):
        seen.append(repr((event, args[:2])))

sys.addaudithook(watch)

def attempt(call):
    seen.clear()
    start, kind, message = time.monotonic(), None, ''
    try:
        call()
    except Exception as e:
        kind, message = type(e).__mro__[:3], str(e)
        kind = [t.__name__ for t in kind]
    # Not ru_maxrss, which a process inherits from the one that started it
    peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
    return dict(kind=kind, message=message, seconds=time.monotonic() - start, peak=peak, seen=list(seen))
"""


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp('client')) as (server, client):
        client(f'exec({WATCH!r}, globals())')
        yield server, client


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """The files of some published models, small enough to be loaded often."""
    found = []
    for name in ('test_resnet_brelu', 'test_resnet_dyrelu_b', 'test_vit'):
        folder = tmp_path_factory.mktemp(name)
        kwargs = dict(img_size=32) if name == 'test_vit' else {}
        write_checkpoint(folder, trained_like(name, num_classes=10, **kwargs))
        files = read_folder(folder)
        config = json.loads(files['config.json'])
        config.setdefault('model_args', kwargs)
        found.append(files | {'config.json': json.dumps(config).encode()})
    return found


def corrupt_weights(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """Give other weights than those that were published."""
    size = struct.unpack('<Q', content[:8])[0]
    header = json.loads(content[8:8 + size])
    kind = rng.randrange(7)
    if kind == 0:
        return content[:rng.randrange(len(content))]
    if kind == 1:
        at = rng.randrange(8 + size)
        return content[:at] + rng.randbytes(9) + content[at + 9:]
    if kind == 2:
        return struct.pack('<Q', rng.choice((2 ** 63, 2 ** 40, 10 ** 8, 0, size + 1))) + content[8:]
    if kind == 3:
        return other
    if kind == 4:
        return b'<!doctype html><title>404</title>' * rng.randrange(1, 99)
    if kind == 5:  # a header of 20 MB that is one
        padded = json.dumps(header).encode().ljust(20 * 2 ** 20)
        return struct.pack('<Q', len(padded)) + padded + content[8 + size:]
    text = json.dumps(corrupt(header, rng)).encode('utf-8', 'surrogatepass')
    return struct.pack('<Q', len(text)) + text + content[8 + size:]


def hostile_files(checkpoints, rng):
    files, other = rng.sample(checkpoints, 2)
    if rng.random() < 0.25:
        weights = corrupt_weights(files['model.safetensors'], rng, other['model.safetensors'])
        return files | {'model.safetensors': weights}
    config = corrupt(json.loads(files['config.json']), rng)
    return files | {'config.json': json.dumps(config).encode('utf-8', 'surrogatepass')}


def test_loading(served, checkpoints, tries, seed):
    server, client = served
    counts = {}
    for number in range(tries(TRIES)):
        repo_id = f'user/try-{number}'
        server.add_repo(repo_id, hostile_files(checkpoints, random.Random(f'{seed} {number}')))
        outcome = client(f'attempt(lambda: hub.load({repo_id!r}))')
        server.reset()  # it refuses everything once it has answered a thousand requests
        kind = outcome['kind'][0] if outcome['kind'] else 'loaded'
        counts[kind] = counts.get(kind, 0) + 1
        told = (seed, number, outcome)
        assert kind in ('loaded', 'HubError', 'ChecksumError'), told
        assert kind == 'loaded' or is_clean(outcome['message'], lines=2), told
        assert outcome['seconds'] < SECONDS and outcome['peak'] < MIB and not outcome['seen'], told
        if number % 20 == 19:  # none of them spoils the process for the next
            server.add_repo(f'user/whole-{number}', checkpoints[number // 20 % len(checkpoints)])
            outcome = client(f"attempt(lambda: hub.load('user/whole-{number}'))")
            assert outcome['kind'] is None, (seed, number, outcome)
            server.reset()
    print(f'{sum(counts.values())} repos: {counts}')
    assert set(counts) >= {'loaded', 'HubError'}


@pytest.mark.parametrize('args', [
    dict(img_size=10 ** 9), dict(img_size=4097), dict(depth=10 ** 9), dict(depth=60_000), dict(embed_dim=60_000),
    dict(num_classes=10 ** 12), dict(mlp_ratio=60_000), dict(in_chans=60_000),
], ids=str)
def test_absurd_sizes_are_refused_before_they_are_taken(served, checkpoints, args, repo_id):
    server, client = served
    files = checkpoints[2]
    config = json.loads(files['config.json'])
    config['model_args'] |= args
    server.add_repo(repo_id, files | {'config.json': json.dumps(config).encode()})
    outcome = client(f'attempt(lambda: hub.load({repo_id!r}))')
    assert outcome['kind'][0] == 'HubError' and outcome['seconds'] < SECONDS and outcome['peak'] < MIB, outcome


def with_arguments(files, **args):
    config = json.loads(files['config.json'])
    return files | {'config.json': json.dumps(config | dict(model_args=config['model_args'] | args)).encode()}


def with_header(files, size):
    """Fill the header of the weights up with spaces to a size, as the format allows."""
    content = files['model.safetensors']
    before = struct.unpack('<Q', content[:8])[0]
    header = content[8:8 + before].ljust(size)
    return files | {'model.safetensors': struct.pack('<Q', size) + header + content[8 + before:]}


@pytest.mark.parametrize('change, words', [
    (lambda files: files | {'config.json': files['config.json'].ljust(2 ** 24 + 1)},
     ['has 16777217 bytes; at most 16777216 are read']),
    (lambda files: with_header(files, 2 ** 24 + 8), ['has 16777224 bytes; at most 16777216 are read']),
    (lambda files: with_arguments(files, img_size=4097), ["'model_args.img_size' = 4097", 'at most 4096']),
    (lambda files: with_arguments(files, num_classes=2 ** 20 + 1),
     ["'model_args.num_classes' = 1048577", 'at most 1048576']),
    (lambda files: with_arguments(files, mlp_ratio=65537), ["'model_args.mlp_ratio' = 65537", 'at most 65536']),
    (lambda files: with_arguments(files, mlp_ratio=65536), ['parameters, of which the weights hold fewer']),
    (lambda files: with_arguments(files, depth=9000, embed_dim=8, num_heads=1), ['more than 50000 modules']),
], ids=['config', 'header', 'side', 'classes', 'argument', 'parameters', 'modules'])
def test_the_bounds_are_those_that_are_promised(served, checkpoints, repo_id, change, words):
    server, client = served
    server.add_repo(repo_id, change(checkpoints[2]))
    outcome = client(f'attempt(lambda: hub.load({repo_id!r}))')
    assert outcome['kind'][0] == 'HubError' and all(word in outcome['message'] for word in words), outcome
    assert outcome['seconds'] < SECONDS and outcome['peak'] < MIB, outcome


def test_what_is_just_within_them_is_taken(served, checkpoints, repo_id):
    server, client = served
    files = with_header(checkpoints[2], 2 ** 24)
    server.add_repo(repo_id, files | {'config.json': files['config.json'].ljust(2 ** 24)})
    assert client(f'attempt(lambda: hub.load({repo_id!r}))')['kind'] is None


@pytest.mark.parametrize('args', [
    dict(pretrained_cfg_overlay=dict(file=CANARY)), dict(pretrained_cfg=dict(file=CANARY)),
    dict(checkpoint_path=CANARY), dict(pretrained_cfg_overlay=dict(url='http://elsewhere.invalid/x.pth')),
    dict(pretrained_cfg_overlay=dict(hf_hub_id='other/repo', source='hf-hub')), dict(pretrained=False),
], ids=['overlay', 'cfg', 'checkpoint', 'url', 'repo', 'none'])
def test_a_config_does_not_say_where_weights_come_from(served, checkpoints, args, repo_id):
    server, client = served
    for files in checkpoints:
        config = json.loads(files['config.json'])
        config['model_args'] |= args
        server.add_repo(repo_id, files | {'config.json': json.dumps(config).encode()})
        outcome = client(f'attempt(lambda: hub.load({repo_id!r}))')
        assert outcome['kind'][0] == 'HubError' and not outcome['seen'], outcome
        assert 'for the one who loads the model' in outcome['message']


def test_a_version_specifier_is_no_command(served, checkpoints, repo_id):
    """The message is one to paste."""
    server, client = served
    config = json.loads(checkpoints[0]['config.json']) | {
        'timm_dyacts': {'requires': {'timm': "===99'$(reboot)'"}}}
    server.add_repo(repo_id, checkpoints[0] | {'config.json': json.dumps(config).encode()})
    outcome = client(f'attempt(lambda: hub.load({repo_id!r}))')
    assert 'no version specifier' in outcome['message'] and 'pip install' not in outcome['message']


def test_publishing(tmp_path, tries, seed):
    """Run folders that somebody sent: results and config with anything in them."""
    whole = write_run(tmp_path / 'whole', trained_like('test_resnet_brelu', num_classes=10))
    counts = {}
    for number in range(tries(12)):
        rng = random.Random(f'{seed} {number}')
        run = shutil.copytree(whole, tmp_path / 'run')
        path = run / rng.choice(('results.json', 'results.json', 'config.json'))
        text = json.dumps(corrupt(json.loads(path.read_text()), rng))
        path.write_text(text)
        try:
            hub.publish(run, 'user/name', dry_run=True)
            counts['published'] = counts.get('published', 0) + 1
        except (hub.HubError, ValueError) as e:
            assert is_clean(str(e), lines=2), (seed, number, str(e))
            counts['refused'] = counts.get('refused', 0) + 1
            assert not (run / 'publish').exists()
        except Exception as e:
            raise AssertionError(f'seed {seed}, try {number}: {e!r}') from e
        shutil.rmtree(run)
    print(f'run folders: {counts}')
    assert set(counts) == {'published', 'refused'}
