"""The options of a comparison, beside those of the trainings."""
import functools
from dataclasses import dataclass

from ..options import Options, option
from ..run_folder import check_folder_name

__all__ = ['CompareConfig']

_compare = functools.partial(option, group='Comparison')


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Options):
    """What is compared, and how often."""
    models: tuple[str, ...] = _compare(
        metavar='MODEL', help='the models, the base first, each as '
                              '[label=]model[:option=value,...], or YAML files of them')
    against: str | None = _compare(
        None, metavar='LABEL', help='the model that the others are compared with', unset='the first')
    seeds: int = _compare(5, minimum=1, metavar='N', help='runs of each model, each with a seed of its own')
    first_seed: int = _compare(0, minimum=0, metavar='S', help='the first seed; the others follow it')
    jobs: int = _compare(
        1, minimum=1, maximum=1024, metavar='N', help='runs at the same time; with several GPUs they take turns')
    metric: str = _compare('top1', choices=('top1', 'top5', 'loss'), help='what is compared')
    at: str = _compare(
        'last', choices=('last', 'best'),
        help='at which epoch; the best one looks better than it is, as it is chosen on the images it is measured on, '
             'unless --val-fraction holds some back to choose it by')
    freeze_coefficients: bool = _compare(
        False, help='also evaluate each model with Dynamic ReLU with its coefficients frozen at their mean over the '
                    'training images, to see what it owes to coefficients that follow the image')
    repeats: int = _compare(10, minimum=1, metavar='N', help='training steps of each model that are timed')
    output: str = _compare('./output/compare', metavar='DIR')
    experiment: str = _compare('compare', metavar='NAME', help='name of the folder of the comparison')

    def check(self) -> None:
        super().check()
        check_folder_name(self.experiment, '--experiment')
