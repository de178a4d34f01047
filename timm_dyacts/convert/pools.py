"""Max pools: which of a network's are replaced, and by what; and strided convolutions where there is none."""
from timm.layers import MixedConv2d
from torch import nn

from ..operators import OPERATORS, is_mirrored
from .arguments import Request
from .places import MAX_POOLS
from .report import ConversionError
from .step import Step
from .trace import Call
from .transition import as_transition, check_sizes, reason_against_subsampling, subsampling_of

__all__ = ['swap_pools']

_FUNCTIONS = frozenset({'max_pool2d_with_indices', 'max_pool3d_with_indices'})


def swap_pools(step: Step, request: Request) -> None:
    """Replace the max pools of a model.

    In a network without one, whether plain, bipolar or a function call, strided convolutions get stride 1, and the
    new pool goes into the free slot for an anti-aliasing layer behind them.

    Args:
        step: The step to take.
        request: With ``pool``, and the options for it.

    Raises:
        ConversionError: If ``pool_kwargs`` has no effect.
    """
    operator = OPERATORS[request.pool]
    kwargs = request.pool_kwargs or {}
    step.already = any(isinstance(module, operator.types) for module in step.model.modules())
    found = step.find(lambda module: isinstance(module, MAX_POOLS), _FUNCTIONS)
    for old in found:
        if is_mirrored(old):
            step.skip(old, 'bipolar: SoftPool does not commute with the channel signs')
        elif old.return_indices:
            step.skip(old, 'returns indices')
        else:
            new = operator.build_pool(old, **kwargs)
            if request.transition:
                call, = step.trace.calls_of(old)[:1]
                spatial = next(n for n, cls in enumerate(MAX_POOLS[:3], 1) if isinstance(old, cls))
                check_sizes(step, step.trace.name(old), old, new, call.shape[-spatial - 1:])
                new = as_transition(step, old, new)
            step.replace(old, new, False)
    has_function_calls = any(skip.kind in _FUNCTIONS for skip in step.report.skipped)
    if not found and not has_function_calls and not step.already:
        _fill_slots(step, request)
    if kwargs and step.already and not step.report.replaced:
        raise ConversionError(f'pool_kwargs={dict(kwargs)!r} has no effect: {request.pool!r} is there already.')


def _fill_slots(step: Step, request: Request) -> None:
    """Stride 1 and the new pool in the blocks that have a free slot for an anti-aliasing layer."""
    for name, slot in list(step.model.named_modules()):
        calls = step.trace.calls_of(slot)
        if name.rpartition('.')[2] != 'aa' or not isinstance(slot, nn.Identity) or not calls:
            continue
        convs = _convs_before(step, calls[0])
        strides = {tuple(conv.stride) for conv in convs}
        if len(strides) != 1 or strides == {(1, 1)}:
            continue
        if request.transition:
            reason = reason_against_subsampling(step, convs, calls[0])
            if reason is not None:
                step.skip(slot, reason)
                continue
        stride, = strides
        # As many outputs as the strided convolution has, for odd sizes too
        window = dict(kernel_size=stride, stride=stride, ceil_mode=True)
        new = OPERATORS[request.pool].module(**(window | dict(request.pool_kwargs or {})))
        if request.transition:
            old = subsampling_of(convs)
            channels, *size = calls[0].shape[-3:]
            check_sizes(step, name, old, new, (channels, *(n * s for n, s in zip(size, stride, strict=True))))
            new = as_transition(step, old, new)
        for conv in convs:
            step.edits.set_attribute(conv, 'stride', (1, 1))
        step.replace(slot, new, False, old_kind='strided Conv2d')


def _convs_before(step: Step, call: Call) -> list[nn.Module]:
    """The last convolution that ran in the block before a call; several where they share the channels out."""
    block = step.trace.name(call.module).rpartition('.')[0]
    for op in reversed(step.trace.ops[:call.start]):
        conv = step.trace.layer_of(op) if op.name == 'convolution' and op.module.startswith(f'{block}.') else None
        if conv is not None:
            parent = step.model.get_submodule(op.module.rpartition('.')[0])
            return [conv] if not isinstance(parent, MixedConv2d) else list(parent.children())
    return []
