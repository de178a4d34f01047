"""What a forward pass calls, seen from outside.

These are names of torch's functions. ``convert``, which finds its candidates in another way, is what is measured.
"""
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ['REPLACED', 'Survey']

RELUS = frozenset({'relu', 'relu_', 'relu6'})
ACTIVATIONS = RELUS | {
    'celu', 'elu', 'gelu', 'hardswish', 'hardtanh', 'leaky_relu', 'mish', 'prelu', 'rrelu', 'selu', 'silu', 'softplus',
}
GATES = frozenset({'HardSigmoid', 'HardSigmoidMe', 'Sigmoid', 'Tanh'})
ATTENTION = frozenset({'__matmul__', 'bmm', 'einsum', 'matmul', 'scaled_dot_product_attention'})

# What has to be called for there to be something to replace, by the argument of ``convert``.
REPLACED = dict(
    act=ACTIVATIONS,
    pool=frozenset(f'max_pool{d}d{form}' for d in (1, 2, 3) for form in ('', '_with_indices')),
    norm=frozenset({'batch_norm'}),
)


class Survey(TorchFunctionMode):
    """Counts torch's functions, and timm's activation modules, that run while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.handles: list[RemovableHandle] = [
            module.register_forward_hook(lambda m, *_: self.calls.update(['timm activation']))
            for module in model.modules()
            if type(module).__module__.startswith('timm.layers.activations') and type(module).__name__ not in GATES
        ]

    def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, '__name__', '')
        if name == 'hardtanh' and args[1:3] == (0, 6):  # torch's ReLU6 is one
            name = 'relu6'
        elif name == 'batch_norm' and args[1] is None:  # without statistics: timm standardises weights with it
            name = 'standardisation'
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*exception)

    def count(self, functions: Collection[str]) -> int:
        """Count the calls of some functions."""
        return sum(self.calls[name] for name in functions)

    def contains(self, replaced: str) -> bool:
        """Say whether there was something that an argument of ``convert`` is to replace.

        Args:
            replaced: ``'act'``, ``'pool'`` or ``'norm'``.
        """
        return self.count(REPLACED[replaced]) > 0 or replaced == 'act' and self.calls['timm activation'] > 0

    def is_relu_cnn(self) -> bool:
        """Say whether ReLU and ReLU6 were the only activations, and convolutions most of the rest."""
        others = self.count(ACTIVATIONS - RELUS) + self.calls['timm activation']
        products = self.calls['linear'] + self.count(ATTENTION)
        return self.count(RELUS) > 0 and not others and self.calls['conv2d'] > products
