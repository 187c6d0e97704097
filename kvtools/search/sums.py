"""Sums in running text: equations found and checked exactly, in time linear in the text.

An equation is a chain of sides joined by "=". Sides are expressions of numbers (1,234.5, .5, $3,
20%), + - * / × ÷ − · and x between numbers, powers (^, **, ², ³), brackets of any kind, a number
that touches a bracket, \\frac, \\times, \\cdot and \\div. A side that holds anything else, such as
a variable, is unknown and is compared with nothing. So is one beyond the limits below.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

DIGITS = 40  # of a number
TOKENS = 512  # of a side
DEPTH = 30  # of brackets, signs and powers within one another
BITS = 512  # of a numerator or denominator
FINAL_LENGTH = 256  # characters in which a final number must end

TOKEN = re.compile(
    r"""(?P<blank>[^\S\n]+)
    |(?P<line>\n)
    |(?P<skip>\$|\\left\b|\\right\b                       # they mean nothing here,
        |(?<![^\s=])\*\*(?=\S)|(?<=\S)\*\*(?!\.?\d|[\w(\[{$+-]))     # nor does bold type
    |(?P<number>\.?[0-9]+(?:[.,][0-9]+)*)
    |(?P<operator>\*\*|[-+*/^×÷−·]|\\(?:times|cdot|div)\b|(?<=\d)[xX](?=\d)|(?<=\s)[xX](?=\s+\$?\d))
    |(?P<frac>\\[dt]?frac\b)
    |(?P<postfix>[%²³])
    |(?P<word>\\?[^\W\d]\w*)
    |(?P<equals>==?)
    |(?P<open>[(\[{])
    |(?P<close>[)\]}])
    |(?P<other>.)""",
    re.VERBOSE,
)
NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<decimals>\d+))?", re.ASCII)
SAME = {"**": "^", "×": "*", "·": "*", "x": "*", "X": "*", "÷": "/", "−": "-"} | {
    "\\times": "*", "\\cdot": "*", "\\div": "/"
}  # fmt: skip
CLOSES = {"(": ")", "[": "]", "{": "}"}
FINAL = re.compile(
    r"(?:answer is|answer:|\#\#\#\#|\\boxed\{)[\s:*$]*"
    r"(?=[-+−]?\$?\.?[0-9]|[-+−]?\\[dt]?frac\{)",
    re.IGNORECASE,
)


class Unreadable(ValueError):
    """An expression whose value is not known."""


@dataclass
class Side:
    """A side of an equation: pairs of kind and text, and whether all of it was understood."""

    tokens: list[tuple[str, str]] = field(default_factory=list)
    known: bool = True
    opened: list[int] = field(default_factory=list)  # brackets not closed yet

    def close(self) -> None:
        """Leave out brackets around the whole equation; others that are open make it unknown."""
        lead = 0
        while lead < len(self.opened) and self.opened[lead] == lead:
            lead += 1
        self.known &= lead == len(self.opened)
        del self.tokens[:lead]

    @property
    def bare(self) -> bool:
        """Without an operation: a number by itself, whatever its sign."""
        kinds = [kind for kind, _ in self.tokens]
        signs = all(
            kind != "operator" or i == 0 or kinds[i - 1] in ("operator", "open")
            for i, kind in enumerate(kinds)
        )
        return signs and not {"touch", "frac"} & {*kinds} and not self.has("²", "³")

    def has(self, *texts: str) -> bool:
        return any(text in texts for _, text in self.tokens)

    def value(self, percent: Fraction) -> Fraction | None:
        """What it comes to, with that for each percent sign; None if that is not known.

        Raises:
            ZeroDivisionError: it divides by zero.
        """
        if not self.known or not 0 < len(self.tokens) <= TOKENS:
            return None
        if len(self.tokens) == 1:
            return _number(self.tokens[0][1]) if self.tokens[0][0] == "number" else None
        try:
            return _Parser(self.tokens, percent).all()
        except Unreadable:
            return None

    def slack(self, percent: Fraction) -> Fraction:
        """How far a rounded number may be off: half of its last decimal, if it is one with any."""
        numbers = [text for kind, text in self.tokens if kind == "number"]
        match = NUMBER.fullmatch(numbers[0]) if len(numbers) == 1 else None
        if match is None or not match["decimals"] or not self.bare:
            return Fraction(0)
        unit = percent ** sum(text == "%" for _, text in self.tokens)
        return unit / (2 * 10 ** len(match["decimals"]))


@dataclass
class Equation:
    """A chain of two sides or more, and where in the text it begins."""

    start: int
    sides: list[Side]

    def holds(self) -> bool | None:
        """Whether neighbouring sides are equal, as far as they are known; None if none are.

        A decimal number may be rounded. A percent sign may stand for a hundredth or for nothing:
        both 1/4 = 25% and 1/4 * 100 = 25% hold. A first side without an operation is not compared
        ("day 1 = 5 + 3 = 8").
        """
        if self.sides[0].bare:
            return _chained(self.sides[1:])
        return _chained(self.sides)


def agree(left: Side, right: Side) -> bool | None:
    """Whether two sides are equal, as in `Equation.holds`; None if one of them is unknown."""
    return _chained([left, right])


def _chained(sides: list[Side]) -> bool | None:
    found = _equal(sides, Fraction(1, 100))
    if found is False and any(side.has("%") for side in sides):
        return _equal(sides, Fraction(1))
    return found


def _equal(sides: list[Side], percent: Fraction) -> bool | None:
    compared, left = None, None
    try:
        for side in sides:
            right = side.value(percent)
            if left is not None and right is not None:
                compared = True
                if left != right and abs(left - right) > side.slack(percent):
                    return False
            left = right
    except ZeroDivisionError:
        return False
    return compared


def equations(text: str) -> Iterator[Equation]:
    """The equations of a text, in order."""
    yield from (chain for chain in _chains(text) if len(chain.sides) > 1)


def final(text: str) -> tuple[int, Side | None] | None:
    """Where the first final number of a text stands, and what it is: the last side of what follows
    "answer is", "answer:", "####" or "\\boxed{"; None for the side if it cannot be read."""
    match = FINAL.search(text)
    if match is None:
        return None
    follows = text[match.end() : match.end() + FINAL_LENGTH]
    sides = next(_chains(follows)).sides
    number = re.match(r"[-+−]?\$?\.?[0-9]+(?:[.,][0-9]+)*%?", follows)
    # "10 - so it is": what is no expression still begins with a number.
    tries = [sides[-1], *(chain.sides[0] for chain in _chains(number[0] if number else ""))]
    return match.end(), next((side for side in tries if readings(side)), None)


def readings(side: Side) -> set[Fraction]:
    """What a side may come to: two values where it has a percent sign."""
    try:
        found = {side.value(percent) for percent in (Fraction(1, 100), Fraction(1))}
    except ZeroDivisionError:
        return set()
    return {x for x in found if x is not None}


def value(text: str) -> Fraction | None:
    """What the expression at the beginning of a text comes to; None if it cannot be read."""
    chain = next(_chains(text), None)
    return None if chain is None else chain.sides[0].value(Fraction(1, 100))


def _chains(text: str) -> Iterator[Equation]:
    """Runs of sides, also of one alone."""
    start, sides, side = 0, [], Side()
    before = "other"  # what stands there: operand, operator, word, other
    touching = broken = False
    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if kind == "blank":
            touching = False
            continue
        if kind == "skip":
            continue
        if kind == "line":
            broken, touching = True, False
            continue
        if not side.tokens and not sides:
            start = match.start()
        # An equation goes on in the next line only where it cannot have ended.
        ended = broken and kind != "equals" and before != "operator"
        broken = False
        if kind == "close":
            opened = side.opened and CLOSES[side.tokens[side.opened[-1]][1]]
            ended |= opened != token
        ended |= kind == "other"
        ended |= kind == "word" and before == "operand" and not touching and token != "of"
        if ended:
            side.close()
            if side.tokens or sides:
                yield Equation(start, [*sides, side])
            start, sides, side, before = match.start(), [], Side(), "other"
            touching = False
        if kind == "number":
            side.known &= before != "operand"
            side.tokens.append((kind, token))
            before = "operand"
        elif kind == "operator":
            token = SAME.get(token, token)
            if not side.tokens and side.known:
                if not sides and before == "other" and token in "-+*" and _blank(text, match.end()):
                    continue  # the mark of a list
                side.known = before != "word" and token in "-+"
            side.tokens.append((kind, token))
            before = "operator"
        elif kind == "frac":
            side.known &= before != "operand"
            side.tokens.append((kind, token))
            before = "operator"
        elif kind == "open":
            if before == "operand" and touching:
                side.tokens.append(("touch", "*"))
            side.known &= touching or before != "operand"
            side.known &= not (touching and before == "word")
            side.opened.append(len(side.tokens))
            side.tokens.append((kind, token))
            before = "operator"
        elif kind == "close" and not ended:
            side.opened.pop()
            side.tokens.append((kind, token))
            before = "operand"
        elif kind == "postfix":
            side.known &= before == "operand"
            side.tokens.append((kind, token))
            before = "operand"
        elif kind == "equals":
            side.close()
            side.known &= bool(side.tokens)
            sides.append(side)
            side, before = Side(), "operator"
        elif kind == "word":
            if side.tokens or sides:
                side.known, before = False, "operand"
            else:
                before = "word"
        touching = kind != "other"
    side.close()
    if side.tokens or sides:
        yield Equation(start, [*sides, side])


def _blank(text: str, at: int) -> bool:
    return text[at : at + 1].isspace()


class _Parser:
    """Recursive descent over the tokens of a side."""

    def __init__(self, tokens: list[tuple[str, str]], percent: Fraction) -> None:
        self.tokens, self.percent, self.at, self.depth = tokens, percent, 0, 0

    def all(self) -> Fraction:
        found = self.expression()
        if self.at < len(self.tokens):
            raise Unreadable
        return found

    def next(self, *texts: str) -> str | None:
        """Take the next token if it is one of these."""
        text = self.tokens[self.at][1] if self.at < len(self.tokens) else ""
        if text not in texts:
            return None
        self.at += 1
        return text

    def expression(self) -> Fraction:
        found = self.term()
        while sign := self.next("+", "-"):
            term = self.term()
            found = _small(found + term if sign == "+" else found - term)
        return found

    def term(self) -> Fraction:
        found = self.factor()
        while sign := self.next("*", "/"):
            factor = self.factor()
            found = _small(found * factor if sign == "*" else found / factor)
        return found

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > DEPTH:
            raise Unreadable
        sign = self.next("+", "-")
        found = self.factor() if sign else self.power()
        self.depth -= 1
        return -found if sign == "-" else found

    def power(self) -> Fraction:
        base = self.primary()
        while postfix := self.next("%", "²", "³"):
            factor = {"%": self.percent, "²": base, "³": base * base}[postfix]
            base = _small(base * factor)
        if self.next("^") is None:
            return base
        exponent = self.factor()
        size = max(abs(base.numerator), base.denominator).bit_length()
        if exponent.denominator != 1 or abs(exponent) > BITS or abs(exponent) * size > 2 * BITS:
            raise Unreadable
        return _small(base ** int(exponent))

    def primary(self) -> Fraction:
        if self.at == len(self.tokens):
            raise Unreadable
        kind, text = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            found = _number(text)
            if found is None:
                raise Unreadable
            return found
        if kind == "open":
            found = self.expression()
            self.at += 1  # what closes it: the brackets of a side match
            return found
        if kind == "frac":
            above = self.group()
            if self.at == len(self.tokens) or self.tokens[self.at][0] != "touch":
                raise Unreadable
            self.at += 1
            return _small(above / self.group())
        raise Unreadable

    def group(self) -> Fraction:
        if self.at == len(self.tokens) or self.tokens[self.at][0] != "open":
            raise Unreadable
        return self.primary()


def _number(text: str) -> Fraction | None:
    if len(text) > DIGITS or not NUMBER.fullmatch(text):
        return None
    text = text.replace(",", "")
    return Fraction(text) if "." in text else Fraction(int(text))


def _small(x: Fraction) -> Fraction:
    if max(x.numerator.bit_length(), x.denominator.bit_length()) > BITS:
        raise Unreadable
    return x
