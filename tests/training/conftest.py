"""What the tests of training share."""
import os
import signal

import pytest


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
