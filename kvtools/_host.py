"""What is imported in place of the C++ module of this name where it was not built."""

from .ops import LACKING

raise ImportError(LACKING["host"], name=__name__)
