"""The published search loops, transcribed to plain Python over recorded steps.

Each loop gets `generate(rows)`: for the texts so far of the rows that go on, in order, the next
step of each and whether it is the last; and `score(text)`: a probability for each step of a text.
It returns candidates and its decisions: scores of the rows that it kept, or indices that it drew.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Beam:
    text: str = ""
    scores: list[float] = field(default_factory=list)
    ended: bool = False
    pruned: bool = False
    # of a subtree: its continuations in the last round
    continuations: list[Any] = field(default_factory=list)

    def copy(self):
        return Beam(self.text, list(self.scores), self.ended)


def to_the_end(generate, texts):
    """One call without stop string."""
    ends = [False] * len(texts)
    texts = list(texts)
    while not all(ends):
        live = [i for i, end in enumerate(ends) if not end]
        for i, (step, end) in zip(live, generate([texts[i] for i in live]), strict=True):
            texts[i] += step
            ends[i] = end
    return texts


def beam_search(generate, score, n, beam_width, iterations):
    """search-and-learn, src/sal/search/beam_search.py, aggregation "last", sorts made stable."""
    active, completed, decisions = [Beam() for _ in range(n)], [], []
    for i in range(iterations):
        if i > 0:
            active = [beam for beam in active if not beam.pruned]
        if len(active) != n:
            repeats = (n // len(active)) + 1
            active = [beam.copy() for beam in (active * repeats)[:n]]
        if i == iterations - 1:
            texts = to_the_end(generate, [beam.text for beam in active])
            ends = [True] * n
        else:
            out = generate([beam.text for beam in active])
            texts = [beam.text + step for beam, (step, _) in zip(active, out, strict=True)]
            ends = [end for _, end in out]
        for beam, text, end in zip(active, texts, ends, strict=True):
            beam.text = text
            if end:
                beam.ended = True
                completed.append(beam)
        for beam in active:
            beam.scores = score(beam.text)
        active = [beam for beam in active if not beam.ended]
        agg_scores = [beam.scores[-1] for beam in active]
        if not active:
            break
        top = np.argsort(np.array(agg_scores), kind="stable")[-(n // beam_width) :]
        for idx, beam in enumerate(active):
            if idx not in top:
                beam.pruned = True
        decisions.append([beam.scores[-1] for beam in active if not beam.pruned])
    return [(beam.text, beam.scores) for beam in completed], decisions


def dvts(generate, greedy, score, n, beam_width, iterations, lookahead):
    """search-and-learn, src/sal/search/diverse_verifier_tree_search.py and generate_k_steps,
    aggregation "last"."""
    beams, decisions = [Beam() for _ in range(n // beam_width)], []
    for i in range(iterations):
        live = [beam for beam in beams if not beam.pruned]
        if not live:
            break
        starts = [beam.text for beam in live for _ in range(beam_width)]
        if i == iterations - 1:
            texts = to_the_end(generate, starts)
            ends = [True] * len(starts)
            ahead = texts
        else:
            out = generate(starts)
            texts = [text + step for text, (step, _) in zip(starts, out, strict=True)]
            ends = [end for _, end in out]
            ahead, stop = list(texts), list(ends)
            for _ in range(lookahead):
                current = [j for j, end in enumerate(stop) if not end]
                out = greedy([ahead[j] for j in current])
                for j, (step, end) in zip(current, out, strict=True):
                    ahead[j] += step
                    stop[j] = end
        for k, beam in enumerate(live):
            mine = range(k * beam_width, (k + 1) * beam_width)
            scores = [score(ahead[j]) for j in mine]
            best = int(np.argmax([x[-1] for x in scores]))
            beam.continuations = [(texts[j], x[-1]) for j, x in zip(mine, scores, strict=True)]
            beam.text, beam.scores = texts[mine[best]], scores[best]
            beam.pruned = ends[mine[best]]
        decisions.append([beam.scores[-1] for beam in live if not beam.pruned])
    return [x for beam in beams for x in beam.continuations], decisions


def softmax(x):
    exp_x = np.exp(x - np.max(x))
    return exp_x / exp_x.sum()


def inverse_sigmoid(x):
    eps = np.finfo(float).eps
    x = np.clip(x, eps, 1 - eps)
    return np.log(x) - np.log(1 - x)


def particle_filter(generate, score, n, softmax_temp, rng):
    """probabilistic-inference-scaling, src/sal/search/particle_gibbs.py: particle_gibbs_kernel
    without a reference, resample_inactive; `rng` stands for np.random."""
    particles, decisions = [Beam() for _ in range(n)], []

    def step():
        live = [particle for particle in particles if not particle.ended]
        for particle, (text, end) in zip(
            live, generate([particle.text for particle in live]), strict=True
        ):
            particle.text += text
            particle.ended = end
            particle.scores = score(particle.text)

    step()
    while any(not particle.ended for particle in particles):
        logits = np.array([inverse_sigmoid(particle.scores[-1]) for particle in particles])
        weights = softmax(logits / softmax_temp)
        sampled = rng.choice(np.arange(n), size=n, p=weights, replace=True)
        decisions.append(sampled.tolist())
        particles = [particles[i].copy() for i in sampled]
        step()
    return [(particle.text, particle.scores) for particle in particles], decisions


def resampling_systematic(probabilities, num_particles, u):
    """its_hub, its_hub/algorithms/particle_gibbs.py."""
    positions = (np.arange(num_particles) + u) / num_particles
    indices = np.zeros(num_particles, dtype=int)
    cumulative_sum = np.cumsum(probabilities)
    i, j = 0, 0
    while i < num_particles:
        if positions[i] < cumulative_sum[j]:
            indices[i] = j
            i += 1
        else:
            j += 1
    return indices.tolist()


class Recorded(random.Random):
    """Draws from a list, in order."""

    def __init__(self, draws):
        super().__init__()
        self.draws = iter(draws)

    def random(self):
        return next(self.draws)


def resampling_multinomial(probabilities, num_particles, draws):
    """its_hub: random.choices over the particles."""
    rng = Recorded(draws)
    return rng.choices(range(len(probabilities)), weights=probabilities, k=num_particles)


def rebase_widths(scores, width, temperature):
    """rebase.py, select_softmax, in float64: pairs of node and number of children."""
    pairs = sorted(enumerate(scores), key=lambda pair: pair[1])
    pairs.reverse()
    exp_weights = [math.exp(weight / temperature) for _, weight in pairs]
    total, found = math.fsum(exp_weights), []
    for (node, _), weight in zip(pairs, exp_weights, strict=True):
        num = math.ceil(round(width * weight / total, 9))
        found.append((node, num))
        width -= num
        total -= weight
    return found
