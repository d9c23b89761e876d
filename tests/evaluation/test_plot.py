"""Plots: where points are, and what stands at the axes."""

import re
from xml.etree import ElementTree

from emu3.evaluation.load import LoadReport
from emu3.evaluation.plot import lines_to_svg

SVG = "{http://www.w3.org/2000/svg}"


def test_points_axes_and_names():
    plot = lines_to_svg({"a < b": [(0, 0), (5, 1), (10, 4)], "none": []}, "{:g} px", "{:.1f} s")
    tree = ElementTree.fromstring(plot)
    first, second = tree.iter(f"{SVG}polyline")
    assert first.get("points") == "60.0,320.0 340.0,250.0 620.0,40.0"
    assert second.get("points") == ""
    texts = [each.text for each in tree.iter(f"{SVG}text")]
    grid = ["0.0 s", "0 px", "1.0 s", "2.5 px", "2.0 s", "5 px", "3.0 s", "7.5 px", "4.0 s", "10 px"]
    assert texts == [*grid, "a < b", "none"]
    assert len(set(re.findall(r'stroke="(#\w{6})"', plot))) == 2


def test_nothing_to_plot():
    assert "0 s" in lines_to_svg({}, "{:g}", "{:g} s")


def test_the_plot_of_a_load_is_the_share_of_answers_by_seconds():
    load = LoadReport(1, 2.0, {"pictures": 2, "chats": 0}, {"pictures": [0.5, 1.0], "chats": []}, 0, 0, 0, 9)
    tree = ElementTree.fromstring(load.to_svg())
    assert [each.get("points") for each in tree.iter(f"{SVG}polyline")] == ["340.0,180.0 620.0,40.0", ""]
    texts = [each.text for each in tree.iter(f"{SVG}text")]
    assert "100 %" in texts and "1.00 s" in texts and texts[-2:] == ["pictures", "chats"]
