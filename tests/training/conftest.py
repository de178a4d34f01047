"""What the tests of training share."""
import os
import signal

import pytest
from support.photos import write_photos


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """24 training images, 12 validation images, in folders of three classes."""
    return write_photos(tmp_path_factory.mktemp('photos'))


@pytest.fixture
def interrupt(monkeypatch):
    """Send this process a signal after so many updates."""
    from timm_dyacts.training.trainer import Trainer

    def arm(updates, signum=signal.SIGTERM):
        counted = Trainer._after_update

        def count(self, steps, read_losses):
            nonlocal updates
            updates -= 1
            if updates == 0:
                os.kill(os.getpid(), signum)
            counted(self, steps, read_losses)

        monkeypatch.setattr(Trainer, '_after_update', count)
    return arm
