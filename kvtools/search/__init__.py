"""Search for solutions step by step: rows of a policy, steered by a scorer.

Each strategy is a function (rollouts, questions, scorer, steps, ...) -> `Result`.
"""

from .particles import effective_size, particle_filter, particle_gibbs, resample
from .result import Candidate, Event, Result, choose
from .run import Steps
from .scorers import Session, Verifier, arithmetic, final_number
from .trees import SelfEvaluation, beam, best_of_n, dvts, prune, rebase

__all__ = [
    "Candidate",
    "Event",
    "Result",
    "SelfEvaluation",
    "Session",
    "Steps",
    "Verifier",
    "arithmetic",
    "beam",
    "best_of_n",
    "choose",
    "dvts",
    "effective_size",
    "final_number",
    "particle_filter",
    "particle_gibbs",
    "prune",
    "rebase",
    "resample",
]
