"""Search for solutions step by step: rows of a policy, steered by a scorer.

Each strategy is a function (rollouts, questions, scorer, steps, ...) -> `Result`.
"""

from .allocate import Entry, Table, allocate, spend
from .doubt import (
    Consensus,
    Rate,
    best_n,
    by_tests,
    confidence,
    error_rates,
    threshold,
    vote_by_tests,
)
from .drawing import draw, tree
from .particles import effective_size, particle_filter, particle_gibbs, resample
from .result import Candidate, Event, Result, choose
from .retries import deepen, revise
from .run import Steps
from .scorers import Session, Verifier, arithmetic, final_number
from .stopping import SelfEvaluation, Stopping
from .trees import beam, best_of_n, dvts, prune, rebase

__all__ = [
    "Candidate",
    "Consensus",
    "Entry",
    "Event",
    "Rate",
    "Result",
    "SelfEvaluation",
    "Session",
    "Steps",
    "Stopping",
    "Table",
    "Verifier",
    "allocate",
    "arithmetic",
    "beam",
    "best_n",
    "best_of_n",
    "by_tests",
    "choose",
    "confidence",
    "deepen",
    "draw",
    "dvts",
    "effective_size",
    "error_rates",
    "final_number",
    "particle_filter",
    "particle_gibbs",
    "prune",
    "rebase",
    "resample",
    "revise",
    "spend",
    "threshold",
    "tree",
    "vote_by_tests",
]
