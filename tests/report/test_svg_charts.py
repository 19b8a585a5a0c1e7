"""Charts: axes that hold all points, texts that are escaped, bounded size."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtc_dist.report.svg_charts import (
    CHART_HEIGHT,
    CHART_WIDTH,
    MAX_POINTS,
    bar_chart,
    four_digits,
    line_chart,
    short_count,
    thinned,
    tick_text,
    ticks,
)

FINITE = st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: round(value, 6))


@given(FINITE, FINITE)
def test_ticks_are_few_round_and_hold_the_range(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step)
    assert f"{step:e}"[0] in "125" or f"{step:e}".startswith("9.99")
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= high - 1e-6 * step
    texts = [tick_text(value, found) for value in found]
    assert len(set(texts)) == len(texts) or max(map(abs, found)) >= 10_000  # short counts may be equal


@given(st.dictionaries(st.text(min_size=1), st.lists(st.tuples(FINITE, FINITE), max_size=300), max_size=4))
def test_a_chart_is_well_formed_and_keeps_its_points_inside(lines):
    lines = {name: sorted(points) for name, points in lines.items()}
    lines = {re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd]", "", name) or "x": points for name, points in lines.items()}
    drawn = line_chart(lines, "step", "<loss> & others")
    if not any(lines.values()):
        assert drawn == ""
        return
    root = ElementTree.fromstring(drawn)
    assert root.find("figcaption").text == "<loss> & others"
    found = root.findall(".//polyline")
    assert len(found) == sum(bool(points) for points in lines.values())
    for line in found:
        pairs = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert len(pairs) <= MAX_POINTS
        assert all(0 <= x <= CHART_WIDTH and 0 <= y <= CHART_HEIGHT for x, y in pairs)


def test_a_long_line_keeps_its_ends_and_its_mean():
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert np.mean([y for _, y in kept]) == pytest.approx(3, abs=0.1)
    assert thinned(points[:50]) == points[:50]


def test_bars_are_shares_of_the_largest():
    root = ElementTree.fromstring(bar_chart("b", [("<a>", 2.0, "2 s"), ("c", 0.5, "0.5 s"), ("d", -1.0, "-1")]))
    assert [row.find("th").text for row in root.iter("tr")] == ["<a>", "c", "d"]
    assert [bar.get("style") for bar in root.iter("i")] == ["width:100.0%", "width:25.0%", "width:0.0%"]
    assert bar_chart("b", []) == ""


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456, "0.1235"), (12.3456, "12.35"), (1234.5, "1,234"), (7, "7"), (2e6, "2,000,000")]
)
def test_numbers_have_four_digits_that_count(value, shown):
    assert four_digits(value) == shown


def test_short_counts():
    assert [short_count(value) for value in (950, 12_000, 3.5e6, 2e9)] == ["950", "12k", "3.5M", "2G"]
