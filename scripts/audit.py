#!/usr/bin/env python3
"""Audit the Triton kernels on a machine without a GPU, for whoever changes them; a checkout is needed, with its tests.

Print, as Markdown: the bytes that Triton's interpreter sees each operator move, against those that it has to; what the
compilers make of each kernel for sm_80, sm_90 and sm_100; and what a roofline of both predicts for the aims of
``timm-dyacts benchmark aims`` on A100, H100 and H200. That is a prediction: nothing is timed.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / 'tests')]

ARCHS = (80, 90, 100)


def count(names: list[str]) -> tuple[dict, dict]:
    from support import audit
    return dict(audit.count_cases(names)), {case: audit.peak_bytes(case) for case in audit.cases(names)}


def compile_for(names: list[str], arch: int) -> dict:
    from support import audit
    return {(case, shape): passes for case, shape, passes in audit.compile_cases(names, arch)}


def main() -> None:
    from timm_dyacts.operators import benchmarks
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--ops', nargs='+', choices=benchmarks(), default=list(benchmarks()), help='operators (default: all)')
    names = parser.parse_args().ops
    # Whether Triton interprets or compiles, it decides when it is imported: each takes a process of its own.
    compiled = {}
    context = get_context('spawn')
    os.environ['TRITON_INTERPRET'] = '1'
    with ProcessPoolExecutor(1, context) as pool:
        counted, memory = pool.submit(count, names).result()
    os.environ['TRITON_INTERPRET'] = '0'
    for arch in ARCHS:
        with ProcessPoolExecutor(1, context) as pool:
            compiled[arch] = pool.submit(compile_for, names, arch).result()

    from support import audit_report
    audit_report.print_report(counted, memory, compiled)


if __name__ == '__main__':
    main()
