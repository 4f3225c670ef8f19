"""Charts: marks that are round and hold all values, and drawings that are well formed and need nothing from outside."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.charts import LINEAR, LOG, TAIL, Axis, Chart, Line, draw_pngs, draw_svg, place, say, ticks

positive = st.floats(1e-6, 1e9)


@given(positive, positive, st.sampled_from([LINEAR, LOG]))
def test_marks_hold_all_values_and_are_few(one: float, other: float, scale: str) -> None:
    low, high = sorted((one, other))
    marks = ticks(low, high, scale)
    assert marks[0] <= low * (1 + 1e-6)
    assert marks[-1] >= high * (1 - 1e-6)
    assert marks == sorted(set(marks))
    assert 2 <= len(marks) <= 18


@pytest.mark.parametrize(
    ("low", "high", "scale", "said"),
    [
        (0, 1993, LINEAR, ["0", "500", "1,000", "1,500", "2,000"]),
        (0, 0, LINEAR, ["0", "1"]),
        (1e-6, 1.0000000000000002e-06, LINEAR, ["1e-06", "1e-06"]),
        (0.64, 6.8, LOG, ["0.5", "1", "2", "5", "10"]),
        (0.5, 4000, LOG, ["0.1", "1", "10", "100", "1,000", "10,000"]),
        (0, 0.5, TAIL, ["0%", "90%"]),
        (0, 0.9995, TAIL, ["0%", "90%", "99%", "99.9%", "99.99%"]),
    ],
)
def test_marks_are_round(low: float, high: float, scale: str, said: list[str]) -> None:
    assert [say(mark, scale) for mark in ticks(low, high, scale)] == said


@pytest.mark.parametrize("scale", [LINEAR, LOG, TAIL])
def test_larger_values_lie_further_out(scale: str) -> None:
    to = place(scale)
    places = [to(value) for value in (0.0, 0.5, 0.9, 0.999)]
    assert places == sorted(set(places))


def chart(lines: list[Line]) -> Chart:
    return Chart("name", "A <title> & more", Axis("x", TAIL), Axis("y", LOG), lines)


LINES = [Line("a & b", [(0.0, 1.0), (0.99, 30.0)], ["<1>", "2"]), Line("c", [(0.5, 2.0), (0.999, 0.1)])]


@pytest.mark.parametrize("lines", [LINES, [], [Line("empty", [])], [Line("one", [(0.5, 3.0)])] * 9])
def test_a_drawing_is_well_formed_and_within_its_frame(lines: list[Line]) -> None:
    root = ElementTree.fromstring(draw_svg(chart(lines)))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    drawn = [each for each in root.iter() if each.tag.endswith("polyline")]
    assert len(drawn) == len(lines)
    for line in drawn:
        for x, y in re.findall(r"([\d.-]+),([\d.-]+)", line.attrib["points"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_a_point_lies_where_its_values_say() -> None:
    lines = [Line("l", [(0.0, 1.0), (0.9, 10.0), (0.99, 100.0)])]
    drawn = draw_svg(chart(lines))
    match = re.search(r'points="([^"]+)"', drawn)
    assert match is not None
    (x0, y0), (x1, y1), (x2, y2) = ([float(each) for each in pair.split(",")] for pair in match[1].split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # each nine as far as the last
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)  # each power of ten as well
    assert y0 > y1 > y2  # upwards


def test_png_files_are_made_by_matplotlib(tmp_path: Path) -> None:
    assert draw_pngs([chart(LINES)], tmp_path)
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG\r\n")
