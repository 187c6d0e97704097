"""What counts the steps that are captured, and what the tests capture them by."""

from functools import partial

from kvtools.testing import Recorder


def _recorded(run):
    with Recorder() as recorder:
        run()
    return recorder.replay


class Captured:
    """In the place of `kvtools.hf.decode.capturer`: that one, or the recorder for CUDA graphs."""

    def __init__(self, capturer=lambda device: _recorded):
        self.captures = self.replays = 0
        self._capturer = capturer

    def __call__(self, device):
        capture = self._capturer(device)
        return capture and partial(self._capture, capture)

    def _capture(self, capture, run):
        again = capture(run)
        self.captures += 1

        def replay():
            self.replays += 1
            again()

        return replay
