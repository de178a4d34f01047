"""Triton kernels in the hands of Triton's compiler and of ptxas, for GPUs that need not be there."""
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from timm_dyacts.ops.triton_tiles import Launch

__all__ = ['Compiled', 'Driver', 'compile_for', 'compile_kernel']

# Where the hardware computes what: the first pattern that fits an instruction names its pipe. After the throughputs of
# arithmetic instructions in the CUDA programming guide; what stands in no line only takes its turn to be issued.
_PIPES = {
    'special': r'MUFU|F2I|I2F|F2F(?!P)|POPC|FRND',
    'fp32': r'FFMA|FMUL|FADD|FSWZ',
    'int32': r'IMAD|IADD|LEA|LOP|SHF|PRMT|ISETP|FSETP|SEL|FSEL|FMNMX|IMNMX|VIMNMX|F2FP|PLOP|BMSK|IABS|I2FP|HADD2|HFMA2',
    'memory': r'LD|ST|RED|ATOM|SHFL',
}


@dataclass(frozen=True)
class Compiled:
    """What the compilers have made of a kernel.

    Attributes:
        name: Its name.
        registers: Registers of a thread.
        stack: Bytes of each thread's stack, to which registers are spilled.
        exchanges: Accesses to shared memory in the code, by which threads exchange what they hold.
        threads: Threads of a program.
        loads: How often each width in bytes of a load from global memory appears in the code.
        stores: Likewise, of stores.
        instructions: Instructions that a thread executes, by pipe; loops count as often as they run.
    """
    name: str
    registers: int
    stack: int
    exchanges: int
    threads: int
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: dict[str, int]


class Driver:
    """As much of a driver as compilation needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it has compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(arch: int) -> None:
    """Have all that is compiled from now on compiled for a GPU, 90 for ``sm_90``."""
    triton.runtime.driver.set_active(Driver(arch))


def compile_kernel(
        planned: Launch,
        tensors: Sequence[Tensor | None],
        known: dict[Any, 'Compiled'] | None = None,
) -> Compiled:
    """Compile a kernel.

    Args:
        planned: The launch that it is compiled for.
        tensors: The tensors of the launch.
        known: Kernels that are known already, by what identifies their code. Instructions are counted only with it:
            that takes as long as compiling.
    """
    compiled = planned.kernel.warmup(
        grid=(planned.programs,), enable_fp_fusion=True, **planned.with_tensors(tensors))
    steps = [planned.arguments.get(name, 1) for name in ('STEPS_C', 'STEPS_P')]
    if known is None:
        return _describe(compiled, steps, False)
    if compiled.hash not in known:
        known[compiled.hash] = _describe(compiled, steps, True)
    return known[compiled.hash]


def _describe(compiled: Any, steps: list[int], disassemble: bool) -> Compiled:
    ptx = compiled.asm['ptx']
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = _cuobjdump('--dump-resource-usage', file.name)
        sass = _cuobjdump('--dump-sass', file.name) if disassemble else ''
    return Compiled(
        compiled.metadata.name,
        *(int(re.search(rf'{what}:(\d+)', usage)[1]) for what in ('REG', 'STACK')),
        len(re.findall(r'(?:ld|st)\.shared|(?:ld|st)matrix|bar\.', ptx)),
        32 * compiled.metadata.num_warps,
        _widths(ptx, 'ld'),
        _widths(ptx, 'st'),
        _executed(sass, steps),
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    return subprocess.run([str(tool), option, path], check=True, capture_output=True, text=True).stdout


def _widths(ptx: str, instruction: str) -> dict[int, int]:
    found = re.findall(rf'{instruction}\.global\S*?(?:\.v(\d))?\.b(\d+)', ptx)
    return dict(sorted(Counter(int(count or 1) * int(bits) // 8 for count, bits in found).items()))


def _executed(sass: str, steps: list[int]) -> dict[str, int]:
    """Count the instructions that a thread executes.

    Args:
        sass: The code.
        steps: How often the loops of the kernel run, from the outer to the inner. The compiler leaves no loop of those
            that run once. Other loops, if there are more, count once.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r'/\*([0-9a-f]{4,})\*/\s+([^;/]+);', sass)]
    loops = []
    for at, text in code:
        jump = re.search(r'\bBRA\b.*?0x([0-9a-f]+)', text)
        if jump and int(jump[1], 16) < at:
            loops.append((int(jump[1], 16), at))
    counts: Counter[str] = Counter()
    trips = [step for step in steps if step > 1]
    for at, text in code:
        depth = sum(first <= at <= last for first, last in loops)
        times = 1
        for step in trips[:depth]:
            times *= step
        opcode = re.sub(r'^@!?U?P\w+\s+', '', text).split()[0]
        if opcode == 'NOP':
            continue
        counts['all'] += times
        pipe = next((pipe for pipe, pattern in _PIPES.items() if re.match(pattern, opcode)), None)
        if pipe:
            counts[pipe] += times
    return dict(counts)
