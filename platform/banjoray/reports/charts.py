"""Axes, and pictures of marks on them as SVG: from values to text, nothing else.

Everything is drawn in the current colour, so that a style sheet gives a picture its colours: a class for each step of a
score, s0 the worst, and one for the winner.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

SVG = "http://www.w3.org/2000/svg"
STEPS = 8
LIGHT = ("#b3bfcf", "#95afcd", "#779ecb", "#598ec9", "#417cc0", "#2f67b0", "#1d52a1", "#0b3d91", "#d9480f")
DARK = ("#5d6d85", "#617b9e", "#648ab7", "#6898d0", "#7aaae1", "#9bc0eb", "#bbd5f5", "#dcebff", "#ff9f5a")
RULES = """
svg{font-family:system-ui,-apple-system,sans-serif}
.mark{stroke:currentColor;stroke-width:1.8;stroke-opacity:.8;stroke-linejoin:round}
.mark polyline{fill:none}
.mark.area{fill-opacity:.45}
.mark.won{stroke-width:3.4;stroke-opacity:1}
.mark:hover{stroke-width:4.4;stroke-opacity:1}
svg:has(.mark:hover) .mark:not(:hover){opacity:.18}
.tick{paint-order:stroke;stroke-width:4;stroke-linejoin:round}
"""
# In pixels: a chart of two axes, and where its plot is inside; marks stay INSET away from the plot's edges.
WIDTH, HEIGHT, INSET = 400, 290, 22
LEFT, RIGHT, TOP, BOTTOM = 50, 392, 24, 234
# Parallel axes: at least so wide, so high, so far apart; where an axis ends above and below.
WIDE, HIGH, GAP = 760, 370, 130
UP, DOWN = 48, 354
# The area of the largest circle is that of this radius.
RADIUS = 18

Place = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A line from 0 to 1 that values stand on: numbers, with ``log`` by their logarithm, or choices by their place.

    ``choices`` are JSON texts; ``ticks`` are pairs of what is written and the number where it stands; ``falling``: low
    is better than high.
    """

    name: str
    low: float
    high: float
    ticks: tuple[tuple[str, float], ...]
    log: bool = False
    choices: tuple[str, ...] = ()
    falling: bool = False

    def at(self, value: Any) -> float:
        """Where a value stands, from 0 to 1."""
        return self.share(self.number(value))

    def number(self, value: Any) -> float:
        """The number that a value stands at, on the scale of the ticks."""
        return float(self.choices.index(json.dumps(value)) if self.choices else value)

    def share(self, number: float) -> float:
        """Where a number stands, from 0 to 1."""
        if self.log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def step(self, share: float) -> int:
        """The colour of what stands at ``share``: 0 for the worst, STEPS - 1 for the best."""
        return min(STEPS - 1, int((1 - share if self.falling else share) * STEPS))


@dataclass(frozen=True)
class Mark:
    """A trial in a picture: its tooltip, its classes, its points (x and y values), the area of its circles."""

    title: str
    style: str
    points: tuple[tuple[Any, Any], ...]
    area: float = 0.0


def choice_axis(name: str, choices: Sequence[Any]) -> Axis:
    """Choices at equal distances, in the order that they come in."""
    low, high = (0, len(choices) - 1) if len(choices) > 1 else (-1, 1)
    ticks = tuple((label(choice), float(place)) for place, choice in enumerate(choices))
    return Axis(name, low, high, ticks, choices=tuple(json.dumps(choice) for choice in choices))


def number_axis(name: str, numbers: Sequence[float], least_step: float = 0.0) -> Axis:
    """An even axis around the numbers, from tick to tick; ticks are ``least_step`` apart or more."""
    low, high = min(numbers), max(numbers)
    if low == high:
        spread = abs(low) / 10 or 1.0
        low, high = low - spread, high + spread
    step = max(_round_step((high - low) / 4), least_step)
    first, last = math.floor(round(low / step, 6)), math.ceil(round(high / step, 6))
    # As many digits as tell neighbours apart.
    digits = max(6, len(str(max(-first, last))))
    ticks = tuple((_number(place * step, digits), place * step) for place in range(first, last + 1))
    return Axis(name, first * step, last * step, ticks)


def log_axis(name: str, numbers: Sequence[float]) -> Axis:
    """A log axis around the numbers, which are above 0, with ticks at 1, 2 and 5, or at powers of ten alone."""
    low, high = min(numbers), max(numbers)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    rounds = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first = max(number for number in rounds if number <= low)
    last = min(number for number in rounds if number >= high)
    inside = [number for number in rounds if first <= number <= last]
    shown = inside if len(inside) <= 7 else [number for number in inside if f"{number:e}".startswith("1.")]
    return Axis(name, first, last, tuple((_number(number), number) for number in shown), log=True)


def _round_step(rough: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = float(f"1e{math.floor(math.log10(rough))}")
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999)


def _number(number: float, digits: int = 6) -> str:
    small = 0 < abs(number) < 1e-3
    text = re.sub(r"\.?0*e", "e", f"{number:.{digits - 1}e}") if small else f"{number:.{digits}g}"
    return re.sub(r"e([+-])0+", r"e\1", text).replace("e+", "e")


def label(value: Any) -> str:
    """A value for people.

    >>> label({"type": "lora", "r": 8}), label(0.00002), label(True)
    ('type lora, r 8', '2e-5', 'true')
    """
    match value:
        case str():
            return value
        case dict():
            return ", ".join(f"{key} {label(inner)}" for key, inner in value.items())
        case list():
            return ", ".join(label(inner) for inner in value)
        case float():
            return _number(value, 3)
    return json.dumps(value)


def clipped(text: str, length: int) -> str:
    """A text in ``length`` letters: where it is longer, its beginning and its end.

    >>> clipped("sentence-transformers/all-MiniLM-L6-v2", 14)
    'senten…M-L6-v2'
    """
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def parallel(axes: Sequence[Axis], marks: Sequence[Mark], alone: bool = False) -> str:
    """An upright line per axis, a line per mark across them; the last axis has the colours of the steps.

    ``alone``: as a file of its own, in the light colours on white. Points of a mark are (number of axis, value).
    """
    gap = max(GAP, (WIDE - 180) / max(1, len(axes) - 1))
    columns = [110 + gap * number for number in range(len(axes))]

    def place(column: int, value: Any) -> Place:
        return columns[column], _between(UP, DOWN, axes[column].at(value))

    parts = _upright(axes, columns)
    parts += [_drawn(mark, [place(*point) for point in mark.points]) for mark in marks]
    # Labels above the lines.
    for axis, x in zip(axes, columns, strict=True):
        parts += [_beside(axis, x, last=axis is axes[-1])]
    return _svg(parts, (columns[-1] + 70, HIGH), "parallel coordinates: a line per trial", alone)


def _between(up: float, down: float, share: float) -> float:
    return down - share * (down - up)


def _upright(axes: Sequence[Axis], columns: Sequence[float]) -> list[str]:
    parts = [_line((x, DOWN), (x, UP), 0.45) for x in columns[:-1]]
    part = (DOWN - UP) / STEPS
    for number in range(STEPS):
        style = f"s{axes[-1].step((number + 0.5) / STEPS)}"
        box = {"x": columns[-1] - 3, "y": DOWN - (number + 1) * part, "width": 6, "height": part}
        parts.append(_tag("rect", class_=style, fill="currentColor", **box))
    for axis, x in zip(axes, columns, strict=True):
        parts.append(_text(axis.name, (x, 22), 20, text_anchor="middle", font_weight="600"))
    return parts


def _beside(axis: Axis, x: float, last: bool) -> str:
    side, anchor = (9, "start") if last else (-7, "end")
    labels = (
        _text(words, (x + side, _between(UP, DOWN, axis.share(tick)) + 4), 15, class_="tick", text_anchor=anchor)
        for words, tick in axis.ticks
    )
    return "".join(labels)


def lines(x: Axis, y: Axis, marks: Sequence[Mark], name: str) -> str:
    """A line per mark with a dot at each of its points."""
    return _chart(x, y, [_drawn(mark, _places(x, y, mark), dots=1.8) for mark in marks], name)


def circles(x: Axis, y: Axis, marks: Sequence[Mark], name: str) -> str:
    """A circle per mark, whose area is to the others' as ``area`` says; the large ones below the small ones."""
    largest = max((mark.area for mark in marks), default=0.0) or 1.0
    drawn = []
    for mark in sorted(marks, key=lambda mark: -mark.area):
        radius = max(2.0, RADIUS * math.sqrt(mark.area / largest))
        drawn.append(_drawn(replace(mark, style=f"area {mark.style}"), _places(x, y, mark), dots=radius))
    return _chart(x, y, drawn, name)


def bars(shares: Mapping[str, float], name: str) -> str:
    """A bar per key under its name, as long as its share of 1."""
    parts: list[str] = []
    for number, (key, share) in enumerate(shares.items()):
        y = 22 + 40 * number
        parts.append(_text(key, (0, y), 46))
        parts.append(_text(f"{share:.0%}", (WIDTH, y), 8, text_anchor="end", font_weight="600"))
        for width, opacity in ((float(WIDTH), 0.12), (WIDTH * share, 1.0)):
            box = {"x": 0, "y": y + 7, "width": width, "height": 9, "rx": 2}
            parts.append(_tag("rect", class_=f"s{STEPS - 2}", fill="currentColor", fill_opacity=str(opacity), **box))
    return _svg(parts, (WIDTH, 10 + 40 * len(shares)), name)


def _chart(x: Axis, y: Axis, drawn: Sequence[str], name: str) -> str:
    parts = [_text(y.name, (LEFT - 46, 14), 40, font_weight="600")]
    parts.append(_text(x.name, ((LEFT + RIGHT) / 2, HEIGHT - 6), 40, text_anchor="middle", font_weight="600"))
    for words, tick in y.ticks:
        level = _across(y, tick)
        parts.append(_line((LEFT, level), (RIGHT, level), 0.15))
        parts.append(_text(words, (LEFT - 7, level + 4), 10, text_anchor="end"))
    parts.append(_line((LEFT, BOTTOM), (RIGHT, BOTTOM), 0.45))
    # Names that would touch stand in two rows.
    crowded = sum(len(clipped(words, 14)) for words, _ in x.ticks) > 48
    for number, (words, tick) in enumerate(x.ticks):
        down = 29 if crowded and number % 2 else 16
        parts.append(_text(words, (_along(x, tick), BOTTOM + down), 14, text_anchor="middle"))
    return _svg([*parts, *drawn], (WIDTH, HEIGHT), name)


def _along(x: Axis, number: float) -> float:
    return LEFT + INSET + x.share(number) * (RIGHT - LEFT - 2 * INSET)


def _across(y: Axis, number: float) -> float:
    return _between(TOP + INSET, BOTTOM - INSET, y.share(number))


def _places(x: Axis, y: Axis, mark: Mark) -> list[Place]:
    return [(_along(x, x.number(over)), _across(y, y.number(up))) for over, up in mark.points]


def _drawn(mark: Mark, places: Sequence[Place], dots: float = 0.0) -> str:
    """A mark as a line through its places, dots at them, or both; its tooltip with it."""
    shapes = [_tag("title", _plain(mark.title))]
    if len(places) > 1:
        shapes.append(_tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places)))
    if dots:
        shapes += [_tag("circle", cx=x, cy=y, r=dots, fill="currentColor") for x, y in places]
    return _tag("g", *shapes, class_=f"mark {mark.style}")


def _line(start: Place, end: Place, opacity: float) -> str:
    ends = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    return _tag("line", stroke="currentColor", stroke_opacity=str(opacity), **ends)


def _text(words: str, at: Place, length: int, **attributes: object) -> str:
    """Words in ``length`` letters; where they are cut, all of them as a tooltip."""
    short = clipped(words, length)
    title = [_tag("title", _plain(words))] if short != words else []
    return _tag("text", *title, _plain(short), x=at[0], y=at[1], **attributes)


def _svg(parts: Sequence[str], size: tuple[float, float], name: str, alone: bool = False) -> str:
    width, height = (round(side) for side in size)
    attributes: dict[str, object] = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria_label": name}
    if alone:
        sheet = f"svg{{color:#1d2733}}{RULES}.tick{{stroke:#ffffff}}{colours(LIGHT)}"
        parts = [_tag("style", sheet), _tag("rect", width=width, height=height, fill="#ffffff"), *parts]
        attributes |= {"width": width, "height": height}
    return _tag("svg", *parts, xmlns=SVG, font_size="12", fill="currentColor", **attributes)


def colours(palette: Sequence[str]) -> str:
    """The style rules of a palette: a colour for each step, then the winner's."""
    names = [*(f"s{step}" for step in range(STEPS)), "won"]
    return "".join(f".{name}{{color:{colour}}}" for name, colour in zip(names, palette, strict=True))


def _tag(name: str, *inside: str, **attributes: object) -> str:
    """An element around what is markup already; ``stroke_width`` is written stroke-width, ``class_`` class."""
    told = (
        f' {key.rstrip("_").replace("_", "-")}="{_plain(f"{value:.1f}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{''.join(told)}>{''.join(inside)}</{name}>"


def _plain(text: str) -> str:
    """Text that is no markup, without letters that XML does not have."""
    return escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
