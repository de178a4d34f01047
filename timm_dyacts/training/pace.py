"""How fast a run trains, and how long it still takes."""
import time
from collections.abc import Callable
from dataclasses import dataclass

from .state import EpochMeter

__all__ = ['Pace', 'Reading']


@dataclass(frozen=True)
class Reading:
    """What a run does between two readings.

    Attributes:
        loss: Mean training loss of a sample.
        images_per_second: Speed of all processes together.
        seconds_left_in_epoch: Time that the training of the epoch still takes.
        seconds_left: Time that the run still takes, with the evaluations if one has been timed.
    """
    loss: float
    images_per_second: float
    seconds_left_in_epoch: float
    seconds_left: float


class Pace:
    """Times a run, from the sums of its losses.

    Args:
        images_per_epoch: Number of images of an epoch.
        num_epochs: Number of epochs.
        clock: Gives the time in seconds.
    """

    def __init__(
            self, images_per_epoch: int, num_epochs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.images_per_epoch = images_per_epoch
        self.num_epochs = num_epochs
        self.clock = clock
        # Of this process so far: images and seconds of training, seconds and number of what follows it in an epoch
        self._images = self._num_evaluations = 0
        self._training = self._evaluating = 0.0
        self._mark = 0.0, 0.0, 0  # time, sum of the losses, and number of samples at the last reading

    def start_training(self, meter: EpochMeter) -> None:
        """Note that the training of an epoch, or of what is left of one, begins."""
        self._mark = self.clock(), meter.loss, meter.count

    def read(self, epoch: int, meter: EpochMeter) -> Reading:
        """Read what has been trained on since the last reading.

        Args:
            epoch: The epoch in progress.
            meter: Its sums.
        """
        loss = self._mark[1]
        seconds, images = self._advance(meter)
        per_image = self._training / max(self._images, 1)
        left_in_epoch = max(self.images_per_epoch - meter.count, 0)
        epochs_left = self.num_epochs - epoch - 1
        evaluation = self._evaluating / max(self._num_evaluations, 1)
        left = per_image * (left_in_epoch + epochs_left * self.images_per_epoch) + evaluation * (epochs_left + 1)
        return Reading((meter.loss - loss) / max(images, 1), images / seconds, per_image * left_in_epoch, left)

    def finish_training(self, meter: EpochMeter) -> None:
        """Note that the training of the epoch is done, and its evaluation begins."""
        self._advance(meter)

    def finish_evaluation(self) -> None:
        """Note that what follows the training of an epoch is done, too."""
        self._evaluating += self.clock() - self._mark[0]
        self._num_evaluations += 1

    def _advance(self, meter: EpochMeter) -> tuple[float, int]:
        """Count what was trained since the last reading: seconds and images."""
        then, _, count = self._mark
        self._mark = self.clock(), meter.loss, meter.count
        seconds, images = max(self._mark[0] - then, 1e-9), meter.count - count
        self._training += seconds
        self._images += images
        return seconds, images
