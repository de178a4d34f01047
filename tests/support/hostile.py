"""What an attacker, or a bug elsewhere, puts into JSON."""
import copy
import math
import random
from typing import Any

__all__ = ['HOSTILE', 'corrupt', 'is_clean']

# A network that nobody may ask, and a file that nobody may open
ELSEWHERE = 'http://elsewhere.invalid/weights.pth'
CANARY = 'canary.pth'
HOSTILE = (
    10 ** 9, 10 ** 12, 10 ** 400, -1, 0, 1.5, 1e308, -math.inf, math.inf, math.nan, True, None, '', 'a\nb',
    '\x1b[31mred\x1b[0m\a', '<script>alert(1)</script>', '../../../etc/passwd', ELSEWHERE, f'file:///{CANARY}', CANARY,
    'hf-hub:other/repo', 'other/repo', '\u202eevil', '\ud800', '\x00', '{{ 7 * 7 }}', '%s%n', 'x' * 100_000, [], {},
    [[]], [10 ** 9] * 3, ['a', None, {}], {'file': CANARY}, {'url': ELSEWHERE, 'custom_load': True},
    {'__class__': 'os.system'}, [1] * 100_000,
)
# Entries that such files do not have, and that timm knows
EXTRA = (
    'file', 'url', 'custom_load', 'hf_hub_id', 'hf_hub_filename', 'state_dict', 'source', 'pretrained_cfg',
    'pretrained_cfg_overlay', 'pretrained_custom_load', 'checkpoint_path', 'cache_dir', 'img_size', 'num_classes',
    'in_chans', 'embed_dim', 'depth', 'layers', 'channels', 'global_pool', 'act_layer', 'norm_layer', 'block', 'kwargs',
    'features_only', 'patch_size', 'stem_width', 'width', 'base_width', 'cardinality', 'drop_rate', 'label_names',
    'classifier', 'first_conv', 'transition', 'a\n\x1b[2Jb',
)


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def corrupt(value: Any, rng: random.Random) -> Any:
    """Give a copy of JSON with one to three entries, anywhere, that are hostile, missing or new."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        holder, key = rng.choice(places)
        hostile = copy.deepcopy(rng.choice((*HOSTILE, _deep(200))))
        how = rng.random()
        if how < 0.1 and isinstance(holder, dict):
            del holder[key]
        elif how < 0.6 and isinstance(holder, dict):
            target = holder[key] if isinstance(holder[key], dict) else holder
            target[rng.choice(EXTRA)] = hostile
        else:
            holder[key] = hostile
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)) and len(item) < 100:
            yield from _places(item)


def is_clean(message: str, lines: int) -> bool:
    """Say whether a message is short and has nothing in it that a terminal would obey."""
    return 0 < len(message) < 4000 and message.count('\n') < lines and \
        all(char.isprintable() for char in message.replace('\n', ''))
