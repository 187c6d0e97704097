"""What can end a call in its middle: interrupts at any line, and the end of memory."""

import contextlib
import sys
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

import kvtools
from kvtools import testing

FILES = str(Path(kvtools.__file__).parent), contextlib.__file__


class Interrupt:
    """Within the block, `KeyboardInterrupt` at the `at`-th line of the package (or of contextlib,
    which it calls). `seen` counts lines."""

    def __init__(self, at=None):
        self.at, self.seen = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        file = frame.f_code.co_filename
        if not file.startswith(FILES) or file == testing.__file__:  # a graph's replay is one call
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self.trace


class Exhausted(TorchDispatchMode):
    """Within the block, the `at`-th operation of torch finds no memory; if `lasting`, all that
    follow neither. `seen` counts operations."""

    def __init__(self, at=None, lasting=False):
        super().__init__()
        self.at, self.lasting, self.seen = at, lasting, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.at is not None and (self.seen > self.at if self.lasting else self.seen == self.at):
            raise MemoryError("no memory is left")
        return func(*args, **(kwargs or {}))
