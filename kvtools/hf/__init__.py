"""The door to transformers: the only files that know it.

`plug`: what a model sees of kvtools during a forward: a cache, an attention function, a mask
function. `door`: whether a model can be right, decided by what its code does; `probe`: by comparing
it with itself. `session`: a model over a cache. `prefixes`: what prompts begin with in common.
`heads`: a model's head by itself. `generate`: the loop, and `patch`. `likelihood`: how likely given
texts are. `saved`: caches in files.
"""

from .decode import Decoder, Flight, Graph, usable
from .door import Unsupported
from .generate import generate, patch
from .likelihood import Likelihood, logprobs
from .plug import CACHE, PagedCache, plugged
from .prefixes import branches
from .saved import load_cache, save_cache
from .session import Session, check_model, config_of

__all__ = [
    "CACHE",
    "Decoder",
    "Flight",
    "Graph",
    "Likelihood",
    "PagedCache",
    "Session",
    "Unsupported",
    "branches",
    "check_model",
    "config_of",
    "generate",
    "load_cache",
    "logprobs",
    "patch",
    "plugged",
    "save_cache",
    "usable",
]
