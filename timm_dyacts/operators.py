"""The table of operators: one record for each, which everything else that has to know of operators reads.

timm's factories (``layers.factory``), ``convert``, the zoo, model cards, the benchmark, the coverage of timm and
fine-tuning keep no list of their own. A new operator is a record here; what it takes besides, its functions, its
module, its tests, is in CONTRIBUTING.md.
"""
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from timm.layers import create_act_layer
from torch import Tensor, nn

from . import layers
from .layers.forms import PLAIN_ACTIVATIONS, Form, Place
from .ops.bipolar.literal import literal_bipolar
from .ops.dyrelu.literal import literal_dyrelu
from .ops.softpool.literal import literal_global_softpool, literal_softpool

__all__ = [
    'OPERATORS',
    'Benchmark',
    'Operator',
    'Paper',
    'activation_types',
    'benchmarks',
    'is_mirrored',
    'module_types',
    'operator_parameters',
    'papers',
    'zoo_operators',
]


@dataclass(frozen=True)
class Paper:
    """A paper and what model cards say of it.

    Attributes:
        title: What the paper calls its operators.
        tag: Their tag on the Hub.
        change: What they change in a network.
        limit: What not to expect of them.
        citation: BibTeX.
    """
    title: str
    tag: str
    change: str
    limit: str
    citation: str


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark compares an operator with.

    Attributes:
        name: Its name on the command line.
        ours: Makes the module for a number of channels.
        plain: Makes the plain module of PyTorch whose place it takes.
        literal: Its definition in PyTorch operations, a function of the module and of its input (N, C, H, W).
        forward_bytes: Bytes that forward has to move, in multiples of those of the input.
        backward_bytes: Bytes that backward has to move, likewise.
    """
    name: str
    ours: Callable[[int], nn.Module]
    plain: Callable[[], nn.Module]
    literal: Callable[[nn.Module, Tensor], Tensor]
    forward_bytes: float
    backward_bytes: float


@dataclass(frozen=True)
class Operator:
    """One operator.

    Its module may say more, where timm's factory and the defaults below do not do: ``static_form()``, the plain
    function that it computes as it stands (see ``layers.forms``), and ``starting_as(form, place, **kwargs)``, which
    makes the module that starts as another activation; of a pool, ``in_place_of(pool, **kwargs)``.

    Attributes:
        name: Its name for timm's factories, for ``convert`` and in the names of the zoo.
        replaces: What it takes the place of: ``'act'`` or ``'pool'``, the argument of ``convert`` that takes its name.
        module: Its ``nn.Module``.
        paper: Where it comes from.
        function: Its functional form, if timm's factory of functions is to know it.
        parts: Further modules that belong to it, for cards to count.
        plain: timm's name of the activation that it is a form of, if it is.
        exact_for: The activations, by the names that the zoo has for them, that it can start as exactly.
        options: The options of ``convert`` that mean something for it, beside ``act_kwargs`` or ``pool_kwargs``.
        has_width: Whether its parameters are made for a number of channels. It is then kept out of classifier heads
            and, by default, from behind the additions of bottlenecks.
        stem_kwargs: Arguments in the stems whose max pool has a published replacement, for the zoo.
        in_zoo: Whether it makes variants of the zoo.
        in_coverage: Whether the coverage of timm's architectures is measured with it unless told otherwise.
        benchmarks: What is measured of it.
        attributes: What its module holds that tells it from the other operators with the same class of modules.
    """
    name: str
    replaces: str
    module: type[nn.Module]
    paper: Paper
    function: Callable[..., Tensor] | None = None
    parts: tuple[type[nn.Module], ...] = ()
    plain: str | None = None
    exact_for: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    has_width: bool = False
    stem_kwargs: Mapping[str, Any] = field(default_factory=dict)
    in_zoo: bool = False
    in_coverage: bool = False
    benchmarks: tuple[Benchmark, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> dict[str, str]:
        """The argument of ``convert`` that puts it in."""
        return {self.replaces: self.name}

    @property
    def types(self) -> tuple[type[nn.Module], ...]:
        """All of its modules."""
        return (self.module, *self.parts)

    def is_one(self, module: nn.Module) -> bool:
        """Tell whether a module is this operator, whatever it has learned."""
        held = all(getattr(module, name, None) == value for name, value in self.attributes.items())
        return isinstance(module, self.types) and held

    def build_activation(self, form: Form, place: Place, **kwargs: Any) -> nn.Module:
        """Make the module for a place in a network, so that it starts as what is there if it can.

        Args:
            form: What is there.
            place: Where.
            **kwargs: Further arguments of the module.
        """
        if hasattr(self.module, 'starting_as'):
            return self.module.starting_as(form, place, **kwargs)
        return create_act_layer(self.name, inplace=place.inplace, **kwargs)

    def build_pool(self, pool: nn.Module, **kwargs: Any) -> nn.Module:
        """Make the module for the place of a max pool, with its output shape unless ``kwargs`` say otherwise."""
        return self.module.in_place_of(pool, **kwargs)


_DYRELU = Paper(
    'Dynamic ReLU',
    'dynamic-relu',
    'Dynamic ReLU puts the maximum of K lines in the place of an activation. Their slopes and intercepts come from '
    'the input itself, by way of a pooled vector and two small linear layers.',
    'Dynamic ReLU pools over the whole feature map, so the output at one place depends on all others: the features '
    'of a crop are not a crop of the features.',
    '@inproceedings{chen2020dynamic,\n'
    '  title={Dynamic ReLU},\n'
    '  author={Chen, Yinpeng and Dai, Xiyang and Liu, Mengchen and Chen, Dongdong and Yuan, Lu and Liu, Zicheng},\n'
    '  booktitle={European Conference on Computer Vision (ECCV)},\n'
    '  year={2020},\n'
    '  url={https://arxiv.org/abs/2003.10027}\n'
    '}',
)
_SOFTPOOL = Paper(
    'SoftPool',
    'softpool',
    'SoftPool averages each pooling window with the softmax of its values as weights, where max pooling keeps the '
    'largest value and drops the rest. It has no parameters.',
    'SoftPool is not the pooling that a base model was trained with: without training its accuracy is another.',
    '@inproceedings{stergiou2021refining,\n'
    '  title={Refining Activation Downsampling with SoftPool},\n'
    '  author={Stergiou, Alexandros and Poppe, Ronald and Kalliatakis, Grigorios},\n'
    '  booktitle={International Conference on Computer Vision (ICCV)},\n'
    '  year={2021},\n'
    '  url={https://arxiv.org/abs/2101.00440}\n'
    '}',
)
_BIPOLAR = Paper(
    'Bipolar activations',
    'bipolar-activation',
    'A bipolar activation is f(x) on even channels and -f(-x) on odd ones. Its parameters, if any, are those of f.',
    'A BReLU network is a ReLU network with the signs of half its channels flipped. Expect no accuracy from BReLU '
    'that ReLU does not give.',
    '@article{eidnes2017shifting,\n'
    '  title={Shifting Mean Activation Towards Zero with Bipolar Activation Functions},\n'
    '  author={Eidnes, Lars and N{\\o}kland, Arild},\n'
    '  journal={arXiv preprint arXiv:1709.04054},\n'
    '  year={2017},\n'
    '  url={https://arxiv.org/abs/1709.04054}\n'
    '}',
)


def _dyrelu(mode: str, module: type[nn.Module], backward_bytes: float, **kwargs: Any) -> Operator:
    name = f'dyrelu_{mode}'
    # Forward: read for the mean, read, write. Backward: read both for the sums, write; read, write for the mean.
    benchmark = Benchmark(name, module, nn.ReLU, literal_dyrelu, 3, backward_bytes)
    return Operator(
        name, 'act', module, _DYRELU,
        parts=(layers.DyReLU,),
        exact_for=frozenset({'ReLU', 'ReLU6'}),
        options=frozenset({'where', 'start'}),
        has_width=True,
        in_zoo=True,
        benchmarks=(benchmark,),
        attributes=dict(mode=mode),
        **kwargs,
    )


def _bipolar(name: str, module: type[nn.Module], function: Callable | None = None, **kwargs: Any) -> Operator:
    return Operator(
        name, 'act', module, _BIPOLAR,
        function=function,
        plain=getattr(module, 'plain', None),
        options=frozenset({'layout'}),
        **kwargs,
    )


def _softpool_benchmark(name: str, *window: int) -> Benchmark:
    return Benchmark(
        name, lambda channels: layers.SoftPool2d(*window), lambda: nn.MaxPool2d(*window), literal_softpool, 1.25, 2.25)


OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (
    _dyrelu('a', layers.DyReLUA, 5),
    _dyrelu('b', layers.DyReLUB, 5, in_coverage=True),
    _dyrelu('c', layers.DyReLUC, 6),
    Operator(
        'softpool', 'pool', layers.SoftPool2d, _SOFTPOOL,
        parts=(layers.SoftPool1d, layers.SoftPool3d, layers.SoftPool2dSame, layers.GlobalSoftPool2d),
        # The form that Stergiou et al. 2021 put into ResNet and DenseNet. Odd sizes round up as those of the max pool.
        stem_kwargs=dict(kernel_size=2, stride=2, padding=0, ceil_mode=True),
        in_zoo=True,
        in_coverage=True,
        benchmarks=(
            _softpool_benchmark('softpool_2x2', 2),
            _softpool_benchmark('softpool_3x3', 3, 2, 1),
            Benchmark(
                'global_softpool', lambda channels: layers.GlobalSoftPool2d(), lambda: nn.AdaptiveMaxPool2d(1),
                literal_global_softpool, 1, 2),
        ),
    ),
    _bipolar(
        'brelu', layers.BReLU, layers.brelu,
        parts=(layers.BipolarMaxPool2d,),
        exact_for=frozenset({'ReLU', 'ReLU6'}),
        in_zoo=True,
        in_coverage=True,
        benchmarks=(
            Benchmark('brelu', lambda channels: layers.BReLU(), nn.ReLU, literal_bipolar(F.relu), 2, 3),
            Benchmark(
                'bipolar_max_pool', lambda channels: layers.BipolarMaxPool2d(2), lambda: nn.MaxPool2d(2),
                literal_bipolar(lambda x: F.max_pool2d(x, 2)), 1.25, 1.25),
        ),
    ),
    _bipolar(
        'belu', layers.BELU, layers.belu,
        in_zoo=True,
        benchmarks=(Benchmark('belu', lambda channels: layers.BELU(), nn.ELU, literal_bipolar(F.elu), 2, 3),),
    ),
    _bipolar('bselu', layers.BSELU, layers.bselu),
    _bipolar('bleaky_relu', layers.BLeakyReLU, layers.bleaky_relu),
    _bipolar('bprelu', layers.BPReLU),
    _bipolar('bipolar', layers.Bipolar),
)}


def zoo_operators() -> dict[str, Operator]:
    """The operators that make variants of the zoo."""
    return {name: operator for name, operator in OPERATORS.items() if operator.in_zoo}


def benchmarks() -> dict[str, Benchmark]:
    """What can be measured, by name."""
    return {benchmark.name: benchmark for operator in OPERATORS.values() for benchmark in operator.benchmarks}


def papers() -> Iterator[tuple[Paper, tuple[type[nn.Module], ...]]]:
    """The papers in the order of the table, each with the modules of its operators."""
    for paper in dict.fromkeys(operator.paper for operator in OPERATORS.values()):
        types = (t for operator in OPERATORS.values() if operator.paper == paper for t in operator.types)
        yield paper, tuple(dict.fromkeys(types))


def module_types(replaces: str | None = None) -> tuple[type[nn.Module], ...]:
    """The modules of all operators, or of those that replace ``'act'`` or ``'pool'``."""
    chosen = (operator for operator in OPERATORS.values() if replaces in (None, operator.replaces))
    return tuple(dict.fromkeys(t for operator in chosen for t in operator.types))


def activation_types() -> tuple[type[nn.Module], ...]:
    """What counts as an activation: the plain ones of torch and timm, and ours."""
    ours = (t for operator in OPERATORS.values() if operator.replaces == 'act' for t in (operator.module,))
    return (*PLAIN_ACTIVATIONS, layers.DyReLU, *ours)


def is_mirrored(module: nn.Module) -> bool:
    """Whether a module is the bipolar form of something: whether its channels have signs."""
    return getattr(module, 'layout', None) is not None


def operator_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the operators of a model have of their own, by their names in the model.

    The base model does not have them: the hyper functions of Dynamic ReLU, the slopes of BPReLU.
    """
    types = module_types()
    return {
        f'{prefix}.{name}' if prefix else name: parameter
        for prefix, module in model.named_modules() if isinstance(module, types)
        for name, parameter in module.named_parameters(recurse=False)
    }
