"""The command line as a whole: its commands, their help, its exit statuses, and the scripts that wrap it."""
import inspect
import os
import platform
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch

import timm_dyacts
from timm_dyacts import cli
from timm_dyacts.cli import COMMANDS
from timm_dyacts.cli.parser import ArgumentParser, describe_versions

ROOT = Path(__file__).parents[2]
# What is for those who change the package is no command.
_FOR_DEVELOPERS = ('api.py', 'audit.py', 'launch_cost.py')
SCRIPTS = {
    path.name: path for path in sorted((ROOT / 'scripts').glob('*.py')) if path.name not in _FOR_DEVELOPERS}


def call(capsys, main, *argv, **kwargs):
    """Run the program within this process, and return its exit status and what it printed."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv), **kwargs)
    out, err = capsys.readouterr()
    return exit_info.value.code, out, err


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')


def command_of(script):
    """The command that a script wraps."""
    [command] = re.findall(r'^from timm_dyacts\.cli\.(\w+) import main$', SCRIPTS[script].read_text(), re.MULTILINE)
    return command


# The program


@pytest.mark.parametrize('option', ['-h', '--help'])
def test_help_lists_the_commands(capsys, option):
    code, out, err = call(capsys, cli.main, option)
    assert (code, err) == (0, '')
    for name, text in COMMANDS.items():
        assert re.search(rf'^  {name} +{re.escape(text)}$', out, re.MULTILINE)
    assert '--version' in out


def test_without_arguments_it_prints_help_and_fails(capsys):
    code, out, err = call(capsys, cli.main)
    assert (code, out) == (2, '')
    assert err == call(capsys, cli.main, '--help')[1]


@pytest.mark.parametrize('argument, message', [
    ('trian', "unknown command 'trian'. Close names: train. Known: train, validate, "),
    ('valid', "unknown command 'valid'. Close names: validate. Known: "),
    ('xyzzy', "unknown command 'xyzzy'. Known: "),
    ('', "unknown command ''. Known: "),
    ('--versoin', 'unrecognized arguments: --versoin. Close names: --version'),
])
def test_what_is_unknown_gets_close_names(capsys, argument, message):
    code, out, err = call(capsys, cli.main, argument, '--epochs', '3')
    assert (code, out) == (2, '')
    assert err.splitlines()[-1].startswith(f'timm-dyacts: error: {message}')


def test_version_prints_what_a_report_of_a_bug_needs(capsys):
    code, out, err = call(capsys, cli.main, '--version')
    assert (code, err) == (0, '')
    lines = dict(re.split(' {2,}', line, maxsplit=1) for line in out.splitlines())
    assert lines['timm_dyacts'] == timm_dyacts.__version__
    assert lines['timm'] == timm.__version__ and lines['torch'] == torch.__version__
    assert lines['python'].startswith(platform.python_version())
    assert {'huggingface_hub', 'GPU', 'TIMM_DYACTS_BACKEND', 'back end cpu', 'back end triton'} <= set(lines)
    assert out == f'{describe_versions()}\n'


@pytest.mark.parametrize('program', ['timm-dyacts', 'python -m timm_dyacts'])
def test_the_program_is_installed_under_two_names(program):
    """What it exits with is the exit status of the process."""
    bin_folder = Path(sys.executable).parent
    env = dict(os.environ, PYTHONPATH=str(ROOT), PATH=f'{bin_folder}{os.pathsep}{os.environ["PATH"]}')
    done = subprocess.run([*program.split(), 'run'], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f'{program} run: error: the following arguments are required: SCRIPT'


def test_help_is_light():
    """No help, neither of the program nor of a command, imports what takes long to import and is not always there."""
    code = """
        import sys
        from timm_dyacts import cli

        def check(*argv):
            try:
                cli.main([*argv, '--help'])
            except SystemExit:
                heavy = {name.partition('.')[0] for name in sys.modules} & {'sklearn', 'matplotlib', 'onnx', 'pandas'}
                assert not heavy, (argv, heavy)

        check()
        commands = {f'timm_dyacts.cli.{name}' for name in cli.COMMANDS}
        assert not {*commands, 'timm_dyacts.training', 'timm_dyacts.benchmark'} & set(sys.modules)
        for name in cli.COMMANDS:
            check(name)
    """
    done = subprocess.run(
        [sys.executable, '-c', inspect.cleandoc(code)], env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Its commands


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_is_a_module_of_one_form(command):
    module = import_module(f'timm_dyacts.cli.{command}')
    assert {'create_parser', 'main'} <= set(module.__all__)
    parser = module.create_parser('some program')
    assert isinstance(parser, ArgumentParser)
    assert parser.prog == 'some program'
    assert module.__doc__ and parser.description
    assert list(inspect.signature(module.main).parameters) == ['argv', 'prog']
    defaults = [parameter.default for parameter in inspect.signature(module.main).parameters.values()]
    assert defaults == [None, f'timm-dyacts {command}']


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_has_help(capsys, command):
    code, out, err = call(capsys, cli.main, command, '--help')
    assert (code, err) == (0, '')
    assert out.startswith(f'usage: timm-dyacts {command} ')
    assert '-h, --help' in out


@pytest.mark.parametrize('command', COMMANDS)
def test_each_command_refuses_an_unknown_option(capsys, command):
    code, out, err = call(capsys, cli.main, command, '--no-such-option')
    assert (code, out) == (2, '')
    assert err.splitlines()[-1].startswith(f'timm-dyacts {command}: error: ')


def test_every_module_of_a_command_is_in_the_table():
    modules = {path.stem for path in Path(cli.__file__).parent.glob('*.py')}
    shared = {'__init__', 'parser'}
    offers = {name for name in modules - shared if hasattr(import_module(f'timm_dyacts.cli.{name}'), 'create_parser')}
    assert offers == set(COMMANDS)


# The scripts


def test_which_commands_have_scripts():
    """Those that were scripts before there were commands, and compare."""
    assert {name: command_of(name) for name in SCRIPTS} == {
        'benchmark.py': 'benchmark',
        'compare.py': 'compare',
        'coverage.py': 'coverage',
        'lsuv.py': 'lsuv',
        'model_cards.py': 'cards',
        'predict.py': 'predict',
        'publish.py': 'publish',
        'train.py': 'train',
        'validate.py': 'validate',
        'zoo_table.py': 'zoo',
    }


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_is_a_wrapper_of_its_command(capsys, monkeypatch, script):
    """It has the same help, and so the same options, under its own name."""
    command = command_of(script)
    code, expected, _ = call(capsys, cli.main, command, '--help')
    assert code == 0

    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPTS[script]), run_name='__main__')
    out = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert out.startswith(f'usage: {script} ')
    # Usage is broken into lines by the length of the name.
    out = out.replace(f'usage: {script}', f'usage: timm-dyacts {command}', 1)
    assert ' '.join(out.split()) == ' '.join(expected.split())
    assert len(SCRIPTS[script].read_text().splitlines()) <= 12, 'a wrapper, with nothing of its own'


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_script_fails_under_its_own_name(capsys, monkeypatch, script):
    monkeypatch.setattr(sys, 'argv', [script, '--no-such-option'])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SCRIPTS[script]), run_name='__main__')
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'{script}: error: ')


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_no_option_takes_a_token(name, capsys):
    """A command line can be read by all who use a machine."""
    with pytest.raises(SystemExit):
        cli.main([name, '--help'])
    assert 'token' not in ' '.join(re.findall(r'--[\w-]+', capsys.readouterr().out))
