"""``timm-dyacts run``: a script runs as Python itself runs it, except that timm knows the variants."""
import json
import multiprocessing.spawn
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from timm_dyacts.cli.run import main

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# What a script can see of how it was started
MIRROR = """
    import json, os, sys
    print(json.dumps(dict(
        argv=sys.argv,
        name=__name__,
        file=__file__,
        path=sys.path[0],
        is_main=sys.modules['__main__'].__dict__ is globals(),
        spec=getattr(__spec__, 'name', None),
        folder=os.getcwd(),
    )))
"""

# In the form of timm's train.py: options, helpers beside the script, a main function; no word of timm_dyacts
TRAIN = """
    import argparse

    import torch
    from helpers import count
    from timm import create_model, utils
    from timm.optim import create_optimizer_v2

    parser = argparse.ArgumentParser(description='PyTorch ImageNet Training')
    parser.add_argument('data', nargs='?', metavar='DIR')
    parser.add_argument('--model', default='resnet50', type=str, metavar='MODEL')
    parser.add_argument('--num-classes', type=int, default=None, metavar='N')
    parser.add_argument('-b', '--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)


    def main():
        args = parser.parse_args()
        model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
        optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
        loss = model(torch.randn(args.batch_size, 3, 32, 32)).logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        print(args.model, count(model), type(model.layer1[0].act1).__name__)


    if __name__ == '__main__':
        main()
"""


@pytest.fixture
def scripts(tmp_path):
    """Write scripts, and give their folder."""
    def write(**sources):
        for name, source in sources.items():
            (tmp_path / f'{name}.py').write_text(textwrap.dedent(source))
        return tmp_path
    return write


@pytest.fixture
def run(monkeypatch):
    """Run the command within this process, and put back what it changes of it."""
    def call(*argv, cwd=None):
        if cwd:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, 'argv', ['pytest'])
        monkeypatch.setattr(sys, 'path', [os.fspath(BIN), *sys.path])
        monkeypatch.setattr(
            multiprocessing.spawn, 'get_preparation_data', multiprocessing.spawn.get_preparation_data)
        main([str(arg) for arg in argv])
    return call


def start(*command, cwd, **env):
    """Run a program in a process of its own."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), PATH=f'{BIN}{os.pathsep}{os.environ["PATH"]}', **env)
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('arguments', [[], ['--help', '-m', '--', '--model', 'a b', '']])
def test_a_script_sees_what_it_sees_without_us(scripts, run, capsys, arguments):
    """All that follows the script is its own, also what looks like an option of ours."""
    path = scripts(mirror=MIRROR) / 'mirror.py'
    by_python = json.loads(start(sys.executable, path, *arguments, cwd=ROOT).stdout)
    run(path, *arguments, cwd=ROOT)
    assert json.loads(capsys.readouterr().out) == by_python
    assert by_python['argv'] == [str(path), *arguments]
    assert by_python['is_main']


def test_a_module_sees_what_it_sees_without_us(scripts, run, capsys):
    folder = scripts(mirror=MIRROR)
    by_python = json.loads(start(sys.executable, '-m', 'mirror', '--help', cwd=folder).stdout)
    run('-m', 'mirror', '--help', cwd=folder)
    assert json.loads(capsys.readouterr().out) == by_python
    assert by_python['spec'] == 'mirror'


def test_packages_and_folders_run_by_their_main_module(scripts, run, capsys, tmp_path):
    (tmp_path / 'package').mkdir()
    scripts(**{'package/__init__': '', 'package/__main__': MIRROR})
    run('-m', 'package', 'x', cwd=tmp_path)
    assert json.loads(capsys.readouterr().out)['spec'] == 'package.__main__'
    run(tmp_path / 'package', 'x')
    assert json.loads(capsys.readouterr().out)['path'] == str(tmp_path / 'package')


def test_a_symbolic_link_finds_what_lies_beside_its_target(scripts, run, capsys, tmp_path):
    (tmp_path / 'there').mkdir()
    scripts(**{'there/main': 'from beside import word\nprint(word)', 'there/beside': 'word = "found"'})
    (tmp_path / 'link.py').symlink_to(tmp_path / 'there' / 'main.py')
    run(tmp_path / 'link.py')
    assert capsys.readouterr().out == 'found\n'


def test_the_folder_of_a_script_is_not_searched_where_python_does_not(scripts, tmp_path):
    """With ``-P`` or ``-I``, or what they stand for in the environment, nothing is put in front of the path."""
    if sys.version_info < (3, 11):
        pytest.skip('Python has PYTHONSAFEPATH since 3.11')
    folder = scripts(main='import json, sys\nprint(json.dumps(sys.path))')
    command = [sys.executable, '-m', 'timm_dyacts', 'run', 'main.py']
    assert str(folder) in json.loads(start(*command, cwd=folder).stdout)
    assert str(folder) not in json.loads(start(*command, cwd=folder, PYTHONSAFEPATH='1').stdout)


def test_a_training_script_of_timm_takes_the_variants(scripts):
    folder = scripts(train=TRAIN, helpers='def count(model):\n    return sum(p.numel() for p in model.parameters())')
    options = ['--model', 'resnet18_dyrelu_b', '--num-classes', '7', '-b', '2', '--model-kwargs', 'where=all']
    assert 'Unknown model (resnet18_dyrelu_b)' in start(sys.executable, 'train.py', *options, cwd=folder).stderr
    done = start('timm-dyacts', 'run', 'train.py', *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    name, parameters, activation = done.stdout.split()
    assert (name, activation) == ('resnet18_dyrelu_b', 'DyReLUB')
    assert int(parameters) > 11.18e6, 'those of ResNet-18 with 7 classes, and the hyper functions'
    assert done.stderr == ''


@pytest.mark.parametrize('source, expected', [
    ('import sys; sys.exit(3)', 3),
    ('import sys; sys.exit()', None),
    ('raise SystemExit("no such data set")', 'no such data set'),
])
def test_exit_statuses_pass_through(scripts, run, source, expected):
    with pytest.raises(SystemExit) as exit_info:
        run(scripts(script=source) / 'script.py')
    assert exit_info.value.code == expected


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, ModuleNotFoundError])
def test_exceptions_pass_through(scripts, run, error):
    folder = scripts(script=f'raise {error.__name__}("of the script")')
    for argv in ([folder / 'script.py'], ['-m', 'script']):
        with pytest.raises(error, match='of the script'):
            run(*argv, cwd=folder)


def test_statuses_of_the_process(scripts):
    folder = scripts(fails='1 / 0', ends='import sys; sys.exit(5)')
    failed = start('timm-dyacts', 'run', 'fails.py', cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.endswith('ZeroDivisionError: division by zero\n')
    ended = start(sys.executable, '-m', 'timm_dyacts', 'run', '-m', 'ends', cwd=folder)
    assert (ended.returncode, ended.stdout, ended.stderr) == (5, '', '')


@pytest.mark.parametrize('argv, message', [
    (['missing.py', '--epochs', '3'], "cannot open script 'missing.py': No such file or directory"),
    (['empty'], "cannot open script 'empty/__main__.py': No such file or directory"),
    (['-m', 'missing_module'], "no module named 'missing_module'"),
    (['-m', 'missing.module'], "no module named 'missing.module'"),
    (['-m', 'json.missing'], "no module named 'json.missing'"),
    (['-m', 'json'], "no module named 'json.__main__'"),
    (['-m', '.relative'], "no module named '.relative'"),
])
def test_what_is_missing_is_one_line(run, capsys, tmp_path, argv, message):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit) as exit_info:
        run(*argv, cwd=tmp_path)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f'timm-dyacts run: error: {message}\n'


@pytest.mark.parametrize('argv, message', [
    ([], 'the following arguments are required: SCRIPT'),
    (['-m'], 'the following arguments are required: SCRIPT'),
    (['--modul', 'train.py'], 'unrecognized arguments: --modul. Close names: --module'),
])
def test_options_of_our_own(run, capsys, argv, message):
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith(f'timm-dyacts run: error: {message}\n')


def test_a_package_that_fails_to_import_is_not_called_missing(scripts, run, tmp_path):
    (tmp_path / 'broken').mkdir()
    scripts(**{'broken/__init__': 'import not_installed_at_all', 'broken/__main__': ''})
    with pytest.raises(ModuleNotFoundError, match='not_installed_at_all'):
        run('-m', 'broken', cwd=tmp_path)


def test_a_timm_beside_the_script_is_spoken_of(scripts, run, capsys, tmp_path):
    """As in a checkout of timm, whose train.py would otherwise run with another timm than one expects."""
    (tmp_path / 'timm').mkdir()
    scripts(**{'timm/__init__': '', 'train': 'import timm\nprint(timm.is_model("resnet18_dyrelu_b"))'})
    run(tmp_path / 'train.py')
    out, err = capsys.readouterr()
    assert out == 'True\n'
    assert err.startswith('timm-dyacts run: warning: timm ') and f'not the one in {tmp_path}' in err
    assert err.count('\n') == 1


def test_processes_that_a_script_starts_know_the_variants(scripts):
    """By whatever method, and those that these start in turn."""
    folder = scripts(main="""
        import multiprocessing

        import timm


        def work(queue, method, depth):
            if depth:
                start(queue, method, depth - 1)
            queue.put([method, timm.is_model('resnet18_dyrelu_b')])


        def start(queue, method, depth):
            process = multiprocessing.get_context(method).Process(target=work, args=(queue, method, depth))
            process.start()
            process.join()


        if __name__ == '__main__':
            for method, depth in (('fork', 0), ('spawn', 1), ('forkserver', 0)):
                queue = multiprocessing.get_context(method).SimpleQueue()
                start(queue, method, depth)
                for _ in range(depth + 1):
                    print(*queue.get())
    """)
    done = start('timm-dyacts', 'run', 'main.py', cwd=folder)
    assert done.stdout.splitlines() == ['fork True', 'spawn True', 'spawn True', 'forkserver True']
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('program, processes', [
    (['--no-python', 'timm-dyacts', 'run'], 2),
    (['-m', 'timm_dyacts', 'run'], 1),
])
def test_under_torchrun(scripts, program, processes):
    folder = scripts(train="""
        import sys

        import timm
        import torch
        import torch.distributed as dist

        dist.init_process_group('gloo')
        model = timm.create_model('test_resnet', act_layer='brelu', num_classes=2)
        size = torch.ones(1)
        dist.all_reduce(size)
        print(f'{dist.get_rank()}: {int(size)} {type(model.layer1[0].act1).__name__} {sys.argv[1:]}\\n', end='')
        dist.destroy_process_group()
        sys.exit(int(sys.argv[1]))
    """)
    command = ['torchrun', '--nproc-per-node', processes, *program, 'train.py']
    done = start(*command, '0', '--epochs', '3', cwd=folder)
    assert done.returncode == 0, done.stderr
    expected = [f"{rank}: {processes} BReLU ['0', '--epochs', '3']" for rank in range(processes)]
    assert sorted(done.stdout.splitlines()) == expected
    if processes == 1:
        failed = start(*command, '7', cwd=folder)
        assert failed.returncode == 1 and 'exitcode  : 7' in failed.stderr
