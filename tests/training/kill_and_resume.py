"""Kill a training run with SIGKILL at random moments, resume it each time, and compare its end with a run left alone.

    python tests/training/kill_and_resume.py --kills 30 --model test_resnet --epochs 4 --checkpoint-interval 5

Options that this script does not know are those of a training run. Runs that end before they are killed are compared,
and begun anew. Prints one line for each comparison; the exit status is 1 if a byte differs.
"""
import argparse
import hashlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from timm_dyacts.cli.train import parse_config
from timm_dyacts.run_folder import RunFolder
from timm_dyacts.training import train


def run(options: list[str], experiment: str, output: Path) -> None:
    """Train in this process, with its output in a file."""
    sys.stdout = open(output / f'{experiment}.log', 'a')
    train(parse_config([*options, '--output', str(output), '--experiment', experiment, '--resume', 'auto']))


def start(*args) -> multiprocessing.Process:
    # A forked process has everything imported. It is killed without having touched what this one holds.
    process = multiprocessing.get_context('fork').Process(target=run, args=args)
    process.start()
    return process


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights and of the log."""
    files = sorted([*folder.rglob('*.safetensors'), RunFolder(folder).summary])
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=30)
    parser.add_argument('--kill-seed', type=int, default=0)
    args, options = parser.parse_known_args()
    moments = random.Random(args.kill_seed)
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        began = time.monotonic()
        whole = start(options, 'whole', output)
        whole.join()
        if whole.exitcode:
            sys.exit(f'The run itself fails:\n{(output / "whole.log").read_text()}')
        duration = time.monotonic() - began
        expected = digests(output / 'whole')

        kills = since = 0
        while True:
            process = start(options, 'killed', output)
            process.join(moments.uniform(0, duration) if kills < args.kills else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills, since = kills + 1, since + 1
                continue
            if process.exitcode:
                sys.exit(f'A resumed run fails after {kills} kills:\n{(output / "killed.log").read_text()}')
            equal = digests(output / 'killed') == expected
            print(f'killed {since} times, {"all" if equal else "NOT all"} of {len(expected)} files equal', flush=True)
            if not equal:
                sys.exit(1)
            if kills == args.kills:
                return
            shutil.rmtree(output / 'killed')
            since = 0


if __name__ == '__main__':
    main()
