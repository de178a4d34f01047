"""The processes of a run and what they have to agree on, for one process as for many."""
import io
import signal
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device
from torch import Tensor

__all__ = ['StopSignal', 'TrainingInterrupted', 'World']

# What asks a run to stop: Ctrl-C, what ends processes, a terminal that is gone, and what Slurm sends before the time is
# over (``--signal=USR1@60``). Windows has the first two only.
_SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name))


class TrainingInterrupted(RuntimeError):
    """A signal ended the training. The message says what has been saved.

    Attributes:
        signum: The signal.
        is_primary: Whether this process is the one that writes and prints.
    """

    def __init__(self, message: str, signum: int, is_primary: bool = True) -> None:
        super().__init__(message)
        self.signum: int = signum
        self.is_primary = is_primary


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        device: Device of this process.
        rank: Number of this process.
        size: Number of processes.
        control: Group over gloo for everything but gradients, so that no message of it waits for a GPU. ``None`` for a
            single process.
    """
    device: torch.device
    rank: int = 0
    size: int = 1
    control: Any = None

    @classmethod
    def join(cls, device: torch.device) -> 'World':
        """Meet the other processes that torchrun or Slurm started, if they did."""
        info = SimpleNamespace(device=str(device))
        device_of_rank = init_distributed_device(info)
        if not info.distributed:
            return cls(device)
        return cls(device_of_rank, info.rank, info.world_size, dist.new_group(backend='gloo'))

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Give the value of the primary process: tensors and plain values. No pickle of others is run."""
        if self.size == 1:
            return value
        packed = _pack(value) if self.is_primary else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor(len(packed))
        dist.broadcast(size, src=0, group=self.control)
        if not self.is_primary:
            packed = packed.new_empty(int(size))
        dist.broadcast(packed, src=0, group=self.control)
        return value if self.is_primary else _unpack(packed)

    def gather(self, value: Any) -> list[Any] | None:
        """Give the values of all processes by rank to the primary one, ``None`` to the others."""
        if self.size == 1:
            return [value]
        packed = _pack(value)
        sizes = [torch.tensor(0) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor(len(packed)), group=self.control)
        largest = int(max(sizes))
        padded = torch.cat([packed, packed.new_zeros(largest - len(packed))])
        received = [padded.new_empty(largest) for _ in range(self.size)] if self.is_primary else None
        dist.gather(padded, received, dst=0, group=self.control)
        if received is None:
            return None
        return [_unpack(each[:int(size)]) for each, size in zip(received, sizes, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """Add up float64 values on the CPU, of any shape, over all processes."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            dist.destroy_process_group()


class StopSignal:
    """A signal asks to stop, and the training stops where it can be resumed. A second Ctrl-C stops at once.

    The signals are Ctrl-C, SIGTERM, SIGHUP (unless it is ignored, as ``nohup`` has it) and SIGUSR1.

    With several processes a signal reaches them at different times, if it reaches all. They settle after each update
    on whether one has come, so that all stop after the same one. The answer arrives while the next update is computed.

    Args:
        world: The processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signum = 0
        self._previous: dict[int, Any] = {}
        self._pending = None

    def __enter__(self) -> 'StopSignal':
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        self.signum = signum
        # torchrun repeats the Ctrl-C that its children have got already.
        if signum == signal.SIGINT and self.world.size == 1:
            signal.signal(signum, self._previous[signum])

    def agreed(self) -> int:
        """Give the signal that some process got, 0 if none did. With several processes the answer is one call old."""
        if self.world.size == 1:
            return self.signum
        answer = 0
        if self._pending is not None:
            work, answer = self._pending
            work.wait()
            answer = int(answer)
        request = torch.tensor(self.signum)
        self._pending = dist.all_reduce(request, dist.ReduceOp.MAX, self.world.control, async_op=True), request
        return answer


def _pack(value: Any) -> Tensor:
    """Give a value as bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpack(packed: Tensor) -> Any:
    """Undo ``_pack``."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location=None, weights_only=True)
