"""Line and bar charts as SVG, without scripts: colours come from the page's style, so that they follow its theme."""

import math
from collections.abc import Sequence
from html import escape

from gtc_dist.report.page import LINE_COLOURS
from gtc_dist.report.run_data import Points

CHART_WIDTH, CHART_HEIGHT = 420, 250
LEFT, RIGHT, UPPER, LOWER = 52, 12, 12, 40
MAX_POINTS = 160  # of a drawn line
DOTS = 40  # points of a line, at most, that are marked and say their value


def line_chart(lines: dict[str, Points], x_title: str, y_title: str, dashed: Sequence[str] = ()) -> str:
    """Lines over a common axis; nothing without a point.

    Args:
        lines: name -> points, ascending in x. dashed: names of lines that are drawn dashed.
    """
    lines = {name: thinned(points) for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / ((x_high - x_low) or 1) * (CHART_WIDTH - LEFT - RIGHT)
        return across, CHART_HEIGHT - LOWER - (y - y_low) / ((y_high - y_low) or 1) * (CHART_HEIGHT - UPPER - LOWER)

    parts = []
    for y in y_ticks:
        _, height = at(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(LEFT - 6, height + 4, tick_text(y, y_ticks), "end"))
    for x in x_ticks:
        across, _ = at(x, y_low)
        parts.append(_text(across, CHART_HEIGHT - LOWER + 16, tick_text(x, x_ticks)))
    for n, (name, points) in reversed(list(enumerate(lines.items()))):  # the first is on top
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
        kind = f"line c{n % LINE_COLOURS}" + (" dashed" if name in dashed else "")
        parts.append(f'<polyline class="{kind}" points="{path}"><title>{escape(name)}</title></polyline>')
        for x, y in points if len(points) <= DOTS else ():
            a, b = at(x, y)
            label = escape(f"{name}: {four_digits(y)} at {x_title} {four_digits(x)}")
            dot = f'<circle class="dot c{n % LINE_COLOURS}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
            parts.append(f"{dot}<title>{label}</title></circle>")
    parts.append(_text((LEFT + CHART_WIDTH - RIGHT) / 2, CHART_HEIGHT - 5, x_title))
    label = escape(f"{y_title} over {x_title}")
    drawing = f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    keys = "".join(
        f'<span class="key"><i class="c{n % LINE_COLOURS}"></i>{escape(name)}</span>' for n, name in enumerate(lines)
    )
    keys = f'<div class="keys">{keys}</div>' if len(lines) > 1 else ""
    return f"<figure><figcaption>{escape(y_title)}</figcaption>{drawing}{keys}</figure>"


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]], largest: float | None = None) -> str:
    """Horizontal bars with their names and values, in HTML, so that names wrap on a narrow screen.

    Args:
        bars: (name, value, value as text). largest: length of the axis; None: the largest value.
    """
    top = largest or max((value for _, value, _ in bars), default=0) or 1
    if not bars:
        return ""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td class='bar'><i style='width:{min(max(value, 0) / top, 1):.1%}'></i></td>"
        f"<td>{escape(text)}</td></tr>"
        for name, value, text in bars
    )
    return f'<figure><figcaption>{escape(title)}</figcaption><table class="bars">{rows}</table></figure>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def thinned(points: Points) -> Points:
    """At most MAX_POINTS points, the first and the last among them; of points in between, the mean of each group."""
    if len(points) <= MAX_POINTS:
        return points
    size = -(-(len(points) - 2) // (MAX_POINTS - 2))
    groups = [points[start : start + size] for start in range(1, len(points) - 1, size)]
    means = [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from about `low` to about `high`: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        spread = abs(low) * 0.1 or 1
        low, high = low - spread, high + spread
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_text(value: float, among: list[float]) -> str:
    """A tick with the digits that its step needs."""
    step = among[1] - among[0] if len(among) > 1 else abs(value) or 1
    if max(abs(tick) for tick in among) >= 10_000:
        return short_count(value)
    return f"{value:.{max(-math.floor(math.log10(step) + 1e-9), 0)}f}"


def four_digits(value: float) -> str:
    """A number with four digits that count."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    digits = max(3 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(digits, 8)}f}"


def short_count(value: float) -> str:
    """Such as 12k or 3.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
