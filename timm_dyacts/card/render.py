"""Cards are rendered from data. The templates in ``templates/`` hold the words."""
from functools import cache
from typing import Any

import jinja2

from ..messages import one_line

__all__ = ['TIMM_CITATION', 'as_text', 'render']

TIMM_CITATION = (
    '@misc{rw2019timm,\n'
    '  author={Wightman, Ross},\n'
    '  title={PyTorch Image Models},\n'
    '  year={2019},\n'
    '  publisher={GitHub},\n'
    '  doi={10.5281/zenodo.4414861},\n'
    '  url={https://github.com/huggingface/pytorch-image-models}\n'
    '}'
)


def render(template: str, **facts: Any) -> str:
    """Fill in a template of this package. A fact that the template needs and is not given is an error."""
    return _environment().get_template(template).render(**facts)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('timm_dyacts.card'),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters['text'] = as_text
    return environment


def as_text(value: Any) -> str:
    """Give a value from a run folder as text within Markdown: one line that is no markup, link, image or cell."""
    text = one_line(value)
    for char, inert in (('<', '&lt;'), ('|', r'\|'), ('`', '&#96;'), ('](', r']\(')):
        text = text.replace(char, inert)
    return text
