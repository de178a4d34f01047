"""A roofline: the least time that a launch takes, on GPUs that need not be there. A prediction, not a measurement."""
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ['GPUS', 'LAUNCH', 'GPU']

# Seconds between two launches that wait for each other in a stream: the first runs out, the second starts up. An
# assumption; those who measured it with empty kernels report one to three microseconds.
LAUNCH = 2e-6


@dataclass(frozen=True, eq=False)
class GPU:
    """What bounds a kernel.

    Attributes:
        name: Its name.
        arch: Its compute capability, 90 for ``sm_90``.
        bandwidth: Bytes per second that its memory moves.
        multiprocessors: Their number.
        clock: Their boost clock, in Hz.
        lanes: Results that a multiprocessor computes per clock, by pipe.
        tensor_flops: Operations on bf16 of its tensor cores per second, without sparsity.
    """
    name: str
    arch: int
    bandwidth: float
    multiprocessors: int
    clock: float
    lanes: Mapping[str, int]
    tensor_flops: float

    def seconds(
            self,
            moved: float,
            issued: float = 0,
            instructions: Mapping[str, float] | None = None,
    ) -> tuple[float, str]:
        """Give the time that a launch takes at least, and what bounds it.

        Args:
            moved: Bytes between memory and caches.
            issued: Bytes between caches and registers.
            instructions: Instructions of all threads together, by pipe; ``'all'`` of them take their turn to be issued.
        """
        rate = self.multiprocessors * self.clock
        instructions = instructions or {}
        times = {'bytes': moved / self.bandwidth, 'L1': issued / (_L1 * rate)}
        times |= {pipe: instructions.get(pipe, 0) / (lanes * rate) for pipe, lanes in self.lanes.items()}
        bound = max(times, key=times.get)
        return times[bound], bound


# Bytes that the first-level cache of a multiprocessor moves per clock, after the tuning guides of both architectures.
_L1 = 128
# Four schedulers issue an instruction of 32 lanes each. The other throughputs are those of compute capability 8.0 and
# 9.0 in the table of arithmetic instructions of the CUDA C++ programming guide.
_AMPERE = {'all': 128, 'fp32': 64, 'int32': 64, 'special': 16}
_HOPPER = _AMPERE | {'fp32': 128}
# Bandwidths, multiprocessors, clocks and bf16 rates from NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM.
GPUS = (
    GPU('A100', 80, 2039e9, 108, 1.41e9, _AMPERE, 312e12),
    GPU('H100', 90, 3350e9, 132, 1.98e9, _HOPPER, 989e12),
    GPU('H200', 90, 4800e9, 132, 1.98e9, _HOPPER, 989e12),
)
