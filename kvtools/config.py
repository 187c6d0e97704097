"""How keys and values are kept: the options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from .policy import Policy, policy_of

BITS = {16: "none", 8: "int8", "fp8": "fp8", 6: "int6", 4: "int4", 3: "int3", 2: "int2"}


PRESETS: dict[str, dict] = {
    "lossless": dict(bits=8, recent_bits=16),
    "balanced": dict(bits=4, recent=32),
    "max": dict(bits=4, prompt_budget=0.13),
}


@dataclass(frozen=True)
class CacheConfig:
    """How keys and values are kept.

    Args:
        bits: 16 (the model's own dtype), 8, 6, 4, 3, 2 or "fp8", for keys and values.
        k_bits, v_bits: override `bits` for one of them.
        prompt_budget: tokens of a prompt that are kept, an int, or a fraction of the prompt as a
            float in (0, 1], but always more than sinks + recent; None keeps all.
        budget: tokens that a row may own beyond its prompt; None for no limit.
        policy: "scissorhands", "h2o", "snapkv", "tova", "streaming", "lru", "random", or a callable
            that takes `kvtools.policy.Candidates` and returns the worth of each.
        window: w, steps over which low attention is counted, and queries of a prompt that judge its
            tokens. Beyond `recent` it favours young tokens, which were there for fewer steps.
        recent: r, newest tokens of a row, that are never evicted.
        recent_bits: 16, 8 or "fp8": those tokens are also held like this, if that is finer than
            `k_bits` or `v_bits`, and read from there; None to read them as they are stored.
        sinks: first tokens of a prompt, never evicted and always kept unquantised.
        drop: m, victims chosen at a time; default an eighth of the budget. The paper's half loses
            more where a third of the tokens stays, less where half of them do.
        group: "all" counts a token as low for a KV head if every query head of it does, "mean" if
            their average does.
        layer_budget: "uniform"; "later" for half the budgets at the first layer up to one and a
            half at the last; or one factor per layer.
        page_size: token slots per page.
        impl: who computes; see the operators.

    Raises:
        ValueError: a value is out of range; the message names it and the remedy.
    """

    bits: int | str = 16
    k_bits: int | str | None = None
    v_bits: int | str | None = None
    prompt_budget: int | float | None = None
    budget: int | None = None
    policy: str | Policy | Callable = "scissorhands"
    window: int = 16
    recent: int = 16
    recent_bits: int | str | None = 8
    sinks: int = 4
    drop: int | None = None
    group: str = "mean"
    layer_budget: str | Sequence[float] = "uniform"
    page_size: int = 16
    impl: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):  # numpy's integers are stored as Python's
            if is_int(value := getattr(self, field.name)):
                object.__setattr__(self, field.name, int(value))
        for name in ("bits", "k_bits", "v_bits"):
            value = getattr(self, name)
            if value is not None and value not in BITS:
                raise ValueError(
                    f"{name}={value!r} does not exist; expected one of 16, 8, 6, 4, 3, 2 or 'fp8'"
                )
        for name, least in (("window", 1), ("recent", 1), ("sinks", 0), ("page_size", 1)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if self.recent_bits not in (None, 16, 8, "fp8"):
            raise ValueError(
                f"recent_bits={self.recent_bits!r} does not exist; expected 16, 8, 'fp8' or None"
            )
        policy_of(self.policy)
        if self.group not in ("all", "mean"):
            raise ValueError(f"group={self.group!r}: expected 'all' or 'mean'")
        floor = self.sinks + self.recent
        if self.budget is not None and (not is_int(self.budget) or self.budget <= floor):
            raise ValueError(
                f"budget={self.budget!r} must be an integer above sinks + recent = {floor}: "
                "raise budget or lower recent"
            )
        if is_int(self.prompt_budget):
            if self.prompt_budget <= floor:
                raise ValueError(
                    f"prompt_budget={self.prompt_budget} must be above sinks + recent = {floor}: "
                    "raise prompt_budget or lower recent (1.0, a float, keeps the whole prompt)"
                )
        elif self.prompt_budget is not None and not 0 < self.prompt_budget <= 1:
            raise ValueError(
                f"prompt_budget={self.prompt_budget!r} must be an integer, or a fraction in (0, 1]"
            )
        if self.drop is not None:
            if self.budget is None:
                raise ValueError(f"drop={self.drop!r} needs a budget: set budget too")
            if not is_int(self.drop) or not 0 < self.drop <= self.budget - self.recent:
                raise ValueError(
                    f"drop={self.drop!r} must be an integer from 1 to budget - recent = "
                    f"{self.budget - self.recent}"
                )
        if isinstance(self.layer_budget, str) and self.layer_budget not in ("uniform", "later"):
            raise ValueError(
                f"layer_budget={self.layer_budget!r}: expected 'uniform', 'later' or one factor "
                "per layer"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "CacheConfig":
        """A configuration chosen by measurement, with `changes`.

        Measured on SmolLM2-135M-Instruct by bench.quality (docs/compression.md): bits per element
        held, KL from the 16-bit cache on text, same most likely token.

        - "lossless": 8.5 bits, 0.00002 nats, 0.998.
        - "balanced": 4.5 bits, 0.0034 nats, 0.970; answers as the 16-bit cache in retrieval, 0.69
          for 0.81 among four needles.
        - "max": 22 times less than 16 bits at 2,000 tokens of prompt, 0.15 nats, 0.845; finds 16 of
          16 needles where the prompt ends with the question, 14 for 13 among four, none where the
          question comes later; solves no word problem shown in 250 tokens. Use it only on long
          prompts that end with the question.

        Args:
            name: "lossless", "balanced" or "max".
            changes: options that differ from the preset's.

        Raises:
            ValueError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} does not exist; expected {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def k_format(self) -> str:
        return BITS[self.bits if self.k_bits is None else self.k_bits]

    @property
    def v_format(self) -> str:
        return BITS[self.bits if self.v_bits is None else self.v_bits]

    @property
    def recent_formats(self) -> tuple[str, str] | None:
        """Formats of keys and values of recent tokens; None if they are not held apart."""
        width = {format: 8 if bits == "fp8" else bits for bits, format in BITS.items()}
        stored = (self.k_format, self.v_format)
        finer = "none" if self.recent_bits is None else BITS[self.recent_bits]
        if self.recent_bits is None or width[finer] <= min(width[x] for x in stored):
            return None
        return tuple(x if width[x] >= width[finer] else finer for x in stored)

    @property
    def exact(self) -> bool:
        """Nothing is lost: neither quantised nor evicted."""
        lossless = self.k_format == self.v_format == "none"
        return lossless and self.budget is None and self.prompt_budget in (None, 1.0)

    def factors(self, layers: int) -> list[float]:
        """What each layer's budgets are multiplied by."""
        if self.layer_budget == "uniform":
            return [1.0] * layers
        if self.layer_budget == "later":
            return [0.5 + i / max(layers - 1, 1) for i in range(layers)]
        if len(self.layer_budget) != layers or min(self.layer_budget) <= 0:
            raise ValueError(
                f"layer_budget has {len(self.layer_budget)} factors; the model needs {layers} "
                "positive ones"
            )
        return [float(factor) for factor in self.layer_budget]


def is_int(value: object) -> bool:
    """Whether it is a whole number, of Python or numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number, of Python or numpy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)
