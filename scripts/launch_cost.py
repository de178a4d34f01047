#!/usr/bin/env python3
"""Measure what it costs the host to launch the Triton kernels, without a GPU; a checkout is needed, with its tests.

Print, as Markdown, the microseconds that each operator takes over PyTorch's own, on tensors that are too small to
matter: without the launches themselves, and with launches of compiled kernels by a driver that does nothing.
"""
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / 'tests')]


def main() -> None:
    os.environ['TRITON_INTERPRET'] = '0'
    from support.launch_cost import measure_all
    print('| operator | launches | inference | forward | step |\n|---|---|---|---|---|')
    for stubbed in (True, False):
        for name, ours, plain in measure_all(stubbed):
            more = (f'{a - b:.1f}' for a, b in zip(ours, plain, strict=True))
            print(f'| {name} | {"left out" if stubbed else "idle"} | {" | ".join(more)} |', flush=True)


if __name__ == '__main__':
    import torch
    torch.set_num_threads(1)
    main()
