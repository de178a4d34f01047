"""The memory that operators take, without a GPU that counts it."""
import weakref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ['Memory']


class Memory(TorchFunctionMode):
    """Counts the bytes of all tensors that come out of functions, for as long as these exist, and their peak."""

    def __init__(self, *known):
        super().__init__()
        self.held = {t.untyped_storage().data_ptr(): 0 for t in known}
        self.peak = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage.data_ptr() not in self.held:
                    self.held[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, storage.data_ptr())
        self.peak = max(self.peak, sum(self.held.values()))
        return out
