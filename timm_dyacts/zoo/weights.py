"""Whose checkpoint is it? One of the variant itself loads as it is, one of its base is converted.

A checkpoint is the variant's own if its entries have the names and shapes of the variant's. Whether it has the entries
that the operator adds would tell less: SoftPool adds none. Anything else is given to the base, which knows the formats
of its own checkpoints (torchvision's names, for example), and has to fit it completely. What fits neither is refused.

Where variant and base have the same entries, as with SoftPool, either kind of checkpoint means the same for both.
"""
import textwrap
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint
from timm.models import resolve_pretrained_cfg as resolve_cfg
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..convert import convert
from ..layers.calls import log_completed, update_entries

__all__ = [
    'PretrainedWeightsError',
    'check_source',
    'convert_checkpoint',
    'describe_missing_weights',
    'recorded_mismatch',
]

# The entry of a state dict that says that the weights are those of a bipolar network.
BIPOLAR = 'bipolar'
# Old checkpoints lack it, and PyTorch loads them all the same.
COUNTER = 'num_batches_tracked'


class PretrainedWeightsError(OSError):
    """The pretrained weights could not be had."""


def check_source(variant: str, base: str, kwargs: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for weights that timm would write into the variant past ``convert_checkpoint``.

    Some of timm's vision transformers read files of another kind (NumPy's, from JAX) by themselves.

    Args:
        variant: Name of the variant.
        base: Name of its base.
        kwargs: Arguments that the variant was asked for with.
    """
    cfg = resolve_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.custom_load and not cfg.state_dict and (cfg.file or not cfg.hf_hub_id or cfg.custom_load == 'hf'):
        raise ValueError(
            f'{variant} takes no weights in a format of their own (custom_load={cfg.custom_load!r} in the pretrained '
            f'config): load them into {base}, and give that to timm_dyacts.convert.')


def convert_checkpoint(
        state_dict: dict[str, Any],
        model: nn.Module,
        *,
        base: str,
        recipe: Mapping[str, Any],
        model_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """Give the state dict that a variant is to load, from a checkpoint of its own or of its base.

    Args:
        state_dict: The checkpoint.
        model: The variant as it was built. It gets the report of a conversion that takes place.
        base: timm's name of the base.
        recipe: Arguments of ``convert`` that make the variant from the base.
        model_kwargs: Arguments that the base was built with.

    Raises:
        RuntimeError: It is neither the one nor the other.
    """
    own = dict(state_dict)
    completed = update_entries(model, own)
    mismatch = _compare(own, model)
    if not mismatch:
        if completed:
            log_completed(completed)
        return own
    variant = model.pretrained_cfg['architecture']
    try:
        loaded = _load_base(base, state_dict, PretrainedCfg(**model.pretrained_cfg), model_kwargs)
    except Exception as e:  # a base's filter may stumble in any way over entries that it does not know
        reason = textwrap.shorten(str(e), 1000, placeholder=' ...')  # PyTorch lists every key
        raise RuntimeError(
            f'The checkpoint is neither one of {variant} ({mismatch}) nor one of {base}: {reason}') from e
    model.conversion = convert(loaded, **recipe).conversion
    return loaded.state_dict()


def _compare(state_dict: Mapping[str, Any], model: nn.Module) -> str:
    """Say in what a checkpoint differs from what a model has, empty if in nothing that timm cannot adapt.

    timm adapts the classifier to other classes, and the first convolution to other input channels.
    """
    head = tuple(f'{name}.' for name in _as_names(model.pretrained_cfg.get('classifier')))
    first = {f'{name}.weight' for name in _as_names(model.pretrained_cfg.get('first_conv'))}
    ours = {key: value for key, value in model.state_dict().items() if not _is_optional(key, head)}
    theirs = {key: value for key, value in state_dict.items() if not _is_optional(key, head)}
    problems = {
        'lacks': ours.keys() - theirs.keys(),
        'has besides': theirs.keys() - ours.keys(),
        'has in another shape': {
            key for key in ours.keys() & theirs.keys() - first
            if ours[key].shape != getattr(theirs[key], 'shape', None)
        },
    }
    return ', '.join(f'it {what} {_list(keys)}' for what, keys in problems.items() if keys)


def _as_names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _is_optional(key: str, head: tuple[str, ...]) -> bool:
    return key.startswith(head) or key.rpartition('.')[2] == COUNTER


def _list(keys: Iterable[str], count: int = 3) -> str:
    """Quote the first few keys, and say how many more there are."""
    keys = sorted(keys)
    more = f' and {len(keys) - count} more' if len(keys) > count else ''
    return ', '.join(f'"{key}"' for key in keys[:count]) + more


def _load_base(
        name: str,
        state_dict: dict[str, Any],
        cfg: PretrainedCfg,
        model_kwargs: Mapping[str, Any],
) -> nn.Module:
    """Build the base with a checkpoint of its own, as timm loads it.

    What timm adapts to other classes and input channels is adapted later, in the variant.
    """
    if BIPOLAR in state_dict:
        raise RuntimeError(f'it has an entry "{BIPOLAR}", so it is one of a bipolar network')
    registered = get_arch_pretrained_cfgs(name).get(f'{name}.{cfg.tag}') or get_pretrained_cfg(name)
    cfg = replace(
        registered,
        state_dict=state_dict,
        num_classes=cfg.num_classes + (cfg.label_offset or 0),
        label_offset=None,
        input_size=cfg.input_size,
        custom_load=False,
    )
    adapted = ('num_classes', 'in_chans', 'global_pool')
    kwargs = {k: v for k, v in model_kwargs.items() if k not in adapted}
    with recorded_mismatch() as (missing, unexpected):
        base = model_entrypoint(name)(pretrained=True, pretrained_cfg=cfg.to_dict(), **kwargs)
    # A negative number of classes says that the classifier is not to be taken over; timm drops it then.
    head = tuple(f'{name}.' for name in _as_names(cfg.classifier)) if cfg.num_classes < 0 else ()
    missing = [key for key in missing if not _is_optional(key, head)]
    # Whole modules that this base does not have are left over from training, such as Inception's auxiliary classifier.
    # Another entry of a module that it has is one of an operator, and makes a difference.
    modules = dict(base.named_modules())
    unexpected = [key for key in unexpected if key.rpartition('.')[0] in modules]
    if missing or unexpected:
        parts = [f'{what} key(s) in state_dict: {_list(keys)}.'
                 for what, keys in (('Missing', missing), ('Unexpected', unexpected)) if keys]
        raise RuntimeError(' '.join(parts))
    return base


@contextmanager
def recorded_mismatch() -> Iterator[tuple[list[str], list[str]]]:
    """Record the missing and unexpected keys of the state dicts that are loaded into models built meanwhile.

    timm loads some architectures (DLA, Inception v3) without being strict, and tells it to the log only.
    """
    found: tuple[list[str], list[str]] = [], []
    handles = []
    thread = threading.get_ident()  # another one may build a model of its own

    def record(module: nn.Module, keys: Any) -> None:
        for whole, part in zip(found, keys, strict=True):  # PyTorch calls this for each module, with the keys so far
            whole[:] = dict.fromkeys((*whole, *part))

    def watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            handles.append(parent.register_load_state_dict_post_hook(record))

    building = register_module_module_registration_hook(watch)
    try:
        yield found
    finally:
        for handle in (building, *handles):
            handle.remove()


def describe_missing_weights(variant: str, base: str, kwargs: Mapping[str, Any], error: Exception) -> str:
    """Give the message for weights that could not be had, with the ways out.

    Args:
        variant: Name of the variant.
        base: Name of its base.
        kwargs: Arguments that the variant was asked for with.
        error: What went wrong.
    """
    cfg = resolve_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    repo = f"Hugging Face Hub repo '{cfg.hf_hub_id}'" if cfg.hf_hub_id else f"address '{cfg.url}'"
    where = f"file '{cfg.file}'" if cfg.file else repo
    reason = next(iter(str(error).strip().splitlines()), 'no message')
    return (
        f"Could not get the pretrained weights of '{name}' from the {where}: {type(error).__name__}: {reason}\n"
        f'With a copy of the file at hand, of {base} or of {variant}:\n'
        f"  timm.create_model('{variant}', pretrained=True, "
        f"pretrained_cfg_overlay=dict(file='/path/to/model.safetensors'))\n"
        f'A mirror of the Hub is used if its address stands in the environment variable HF_ENDPOINT.'
    )
