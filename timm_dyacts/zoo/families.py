"""The table of the variants that are registered: which of timm's architectures with which operators.

A new family is one row. Names of architectures and operators are separated by spaces.
"""
from collections.abc import Iterator
from dataclasses import dataclass

from ..operators import zoo_operators

__all__ = ['ALIASES', 'ALL', 'FAMILIES', 'Family']

# Every operator of the zoo, those included that are added to the table of operators later.
ALL = 'all'
USUAL = 'dyrelu_b softpool brelu belu'
NO_POOL = 'dyrelu_b brelu belu'


@dataclass(frozen=True)
class Family:
    """Architectures that are converted alike.

    Attributes:
        bases: timm's names of the architectures.
        operators: The operators for which there is something to replace, or ``ALL``.
        activation: The activation of the backbone, by the names that ``Operator.exact_for`` uses.
        nobn: The operators that also come without BatchNorm, or ``ALL``.
        stem: Whether the max pool of the stem has a published replacement (``Operator.stem_kwargs``).
    """
    bases: str
    operators: str = USUAL
    activation: str = 'ReLU'
    nobn: str = ''
    stem: bool = False

    def lists(self, operator: str) -> bool:
        """Tell whether there are variants with an operator."""
        return operator in _operators(self.operators)

    def members(self) -> Iterator[tuple[str, str, bool]]:
        """Give architecture, operator and whether without BatchNorm, for each of the family's variants."""
        nobn = _operators(self.nobn)
        for base in self.bases.split():
            for operator in _operators(self.operators):
                yield base, operator, False
                if operator in nobn:
                    yield base, operator, True


def _operators(names: str) -> tuple[str, ...]:
    return tuple(zoo_operators()) if names == ALL else tuple(names.split())


FAMILIES = (
    Family(
        'resnet18 resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 seresnet50 seresnext50_32x4d',
        ALL, nobn=ALL, stem=True),
    Family(
        'resnet10t resnet14t resnet26 resnet26t resnet152 resnet18d resnet26d resnet34d resnet50c resnet50d '
        'resnet101d resnet152d resnext50d_32x4d resnext101_32x4d resnext101_32x8d resnext101_64x4d wide_resnet101_2 '
        'seresnet152d seresnext26d_32x4d seresnext26t_32x4d seresnext101_32x4d ecaresnet50d ecaresnet101d',
        nobn='brelu', stem=True),
    Family('resnest14d resnest26d resnest50d', stem=True),
    Family('res2net50_26w_4s res2net101_26w_4s res2net50d res2next50', stem=True),
    Family('regnetx_002 regnetx_004 regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_064', NO_POOL),
    Family('regnety_002 regnety_004 regnety_006 regnety_008 regnety_016 regnety_032 regnety_064', NO_POOL),
    Family('repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b2', NO_POOL),
    Family('vgg16_bn', ALL),
    Family('vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg19 vgg19_bn'),
    Family('densenet121', ALL, stem=True),
    Family('densenet161 densenet169 densenet201', stem=True),
    Family('inception_v3', 'dyrelu_b softpool'),  # pools between bipolar activations are function calls there
    Family('inception_v4'),
    Family('hrnet_w18_small hrnet_w18_small_v2 hrnet_w18 hrnet_w32', NO_POOL),
    Family('dla34 dla46_c dla60 dla102 ese_vovnet19b_dw ese_vovnet39b'),
    Family('mobilenetv2_050 mobilenetv2_100 mobilenetv2_140', ALL, activation='ReLU6'),
    Family('mobilenetv1_100 mobilenetv2_110d mobilenetv2_120d', activation='ReLU6'),
    Family('mobilenetv3_small_100 mobilenetv3_large_100', ALL, activation='hard-swish'),
    Family('mobilenetv3_small_050 mobilenetv3_small_075', activation='hard-swish'),
    Family('mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_large'),
    Family('mnasnet_small mnasnet_100 semnasnet_075 semnasnet_100 spnasnet_100'),
    Family('ghostnet_100 ghostnetv2_100 ghostnetv2_130', NO_POOL),
    Family('efficientnet_b0', ALL, activation='SiLU'),
    Family('efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4', activation='SiLU'),
    Family('efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2', activation='ReLU6'),
    Family('efficientnetv2_rw_t efficientnetv2_rw_s tf_efficientnetv2_b0 tf_efficientnetv2_b1', activation='SiLU'),
    Family('convmixer_768_32', NO_POOL),
    Family('convmixer_1024_20_ks9_p14', NO_POOL, activation='GELU'),
)

# Names in use elsewhere, each for one variant of the table.
ALIASES = dict(
    mobilenetv2_softpool='mobilenetv2_100_softpool',
    resnet_brelu_nobn='resnet50_brelu_nobn',
)
