"""Figures show the numbers they are given, in both colour schemes, and their labels are only ever text."""

from __future__ import annotations

import base64
import re
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from payloads import ALL

from salience.errors import InputError
from salience.report import figure, page
from salience.report.figures import bars, change, curve, dendrogram, heat, histogram
from salience.report.images import style

SVG = "data:image/svg+xml;base64,"


@pytest.fixture
def ax():
    with matplotlib.style.context(["default", style(dark=False)]):
        yield Figure(figsize=(7, 3), layout="constrained").add_subplot()


def images(block):
    return [uri for uri in (block.light, block.dark, block.narrow, block.narrow_dark) if uri]


def check_inert(uri):
    root = ElementTree.fromstring(base64.b64decode(uri.removeprefix(SVG)))
    for element in root.iter():
        tag = element.tag.split("}")[1]
        assert tag in {
            "svg", "metadata", "RDF", "Work", "type", "format", "creator", "Agent", "title", "defs", "style",
            "g", "path", "use", "clipPath", "rect", "image",
        }  # fmt: skip
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on")
            if name.endswith("}href"):
                assert value.startswith(("#", "data:image/png;base64,"))
            assert "url(" not in value or re.search(r"url\(#\w+\)", value)


@pytest.mark.parametrize("number", range(0, len(ALL), 5))
def test_hostile_labels_are_drawn_as_text(number):
    payload, shown = ALL[number]
    short = len(shown) <= 15 and "\n" not in shown and "  " not in shown

    def draw(ax):
        bars(ax, [payload, "b"], [1.0, 2.0], xlabel=payload)
        assert not short or ax.get_yticklabels()[0].get_text() == shown
        ax.set_title(shown)

    for uri in images(figure(draw, payload)):
        check_inert(uri)


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax, p: histogram(ax, {p: [1.0, 2.0], "other": [2.0, 3.0]}, xlabel=p),
        lambda ax, p: change(ax, [p], [0.1], [0.2], (p, p), xlabel=p),
        lambda ax, p: curve(ax, [0, 1], {p: [0.1, 0.2], "b": [0.2, 0.3]}, xlabel=p, ylabel=p),
        lambda ax, p: heat(ax, np.ones((1, 1)), [p], [p]),
    ],
)
def test_markup_in_labels_of_every_kind(draw):
    for payload in ("$\\frac{1}{$", "</svg><script>alert(1)</script>", "a\x00\u202eb", "_hidden", "漢字 $x$"):
        for uri in images(figure(lambda ax, payload=payload: draw(ax, payload), "caption")):
            check_inert(uri)


def test_a_callable_is_drawn_for_both_schemes_and_two_widths():
    seen = []

    def draw(ax):
        seen.append((to_hex(matplotlib.rcParams["text.color"]), ax.figure.get_figwidth()))
        bars(ax, ["a"], [1.0])

    before = dict(matplotlib.rcParams)
    block = figure(draw, "caption", height=2.0)
    assert len(set(seen)) == len(seen) == 4 and len(set(images(block))) == 4
    assert dict(matplotlib.rcParams) == before
    light, dark = (base64.b64decode(uri.removeprefix(SVG)).decode() for uri in images(block)[:2])
    assert "#1f2328" in light and "#1f2328" not in dark and "#e6e8eb" in dark
    html = page("t", [block])
    assert html.count("<source") == 3 and block.light in html and block.dark in html


def test_users_settings_do_not_reach_the_figure():
    plain = figure(lambda ax: bars(ax, ["a"], [1.0]), "c").light
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}):
        assert figure(lambda ax: bars(ax, ["a"], [1.0]), "c").light == plain


def test_a_ready_figure_stands_on_a_light_card_and_is_left_as_it_was():
    ready = Figure(figsize=(3, 2), facecolor="none")
    ready.add_subplot().plot([1, 2])
    block = figure(ready, "caption", alt="a line")
    assert block.dark == "" and block.alt == "a line"
    assert '<figure class="card">' in page("t", [block]) and "<source" not in page("t", [block])
    assert "#ffffff" in base64.b64decode(block.light.removeprefix(SVG)).decode()
    assert ready.get_facecolor() == (0, 0, 0, 0) or ready.get_facecolor()[3] == 0


def test_a_heavy_figure_becomes_a_bitmap():
    points = np.random.default_rng(0).normal(size=(2, 20_000))
    block = figure(lambda ax: ax.scatter(*points), "caption")
    assert all(uri.startswith("data:image/png;base64,iVBORw0KGgo") for uri in images(block))
    assert len(page("t", [block])) < 1_500_000


def test_a_million_scores_make_a_small_page():
    scores = np.random.default_rng(0).standard_t(3, size=1_000_000)
    block = figure(lambda ax: histogram(ax, {"raw": scores, "selected": scores[:1000]}), "caption")
    assert len(page("t", [block])) < 300_000


@pytest.mark.parametrize(
    ("draw", "says"),
    [("no", "draw is a str; give a matplotlib Figure or a function"), (None, "draw is a NoneType")],
)
def test_figure_names_what_it_cannot_draw(draw, says):
    with pytest.raises(InputError, match=says):
        figure(draw, "caption")
    with pytest.raises(InputError, match="height is 0"):
        figure(lambda ax: None, "caption", height=0)


def test_histogram_bars_are_shares_of_each_series(ax):
    histogram(ax, {"raw": [0.0, 0.0, 0.0, 6.0, np.nan, np.inf], "selected": np.array([6, 6])})
    raw, _, selected, _ = [patch.get_data() for patch in ax.patches]
    assert raw.values[0] == 0.75 and raw.values[-1] == 0.25 and raw.values.sum() == 1
    assert selected.values[-1] == 1 and selected.values.sum() == 1
    assert (raw.edges == selected.edges).all() and (raw.edges[0], raw.edges[-1]) == (0, 6)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["raw", "selected"]


def test_histogram_takes_counts_and_bins_the_others_alike(ax):
    histogram(ax, {"raw": ([3, 1], [0, 1, 2]), "selected": [-5.0, 0.5, 1.5, 9.0]})
    raw, _, selected, _ = [patch.get_data() for patch in ax.patches]
    assert raw.values.tolist() == [0.75, 0.25] and selected.values.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("series", "says"),
    [
        ({}, "series is empty"),
        ({"raw": [np.nan]}, "series 'raw' has no finite value"),
        ({"raw": []}, "series 'raw' has no finite value"),
        ({"raw": ([1, 2], [0, 1])}, "one more edge than counts"),
        ({"raw": ([0, 0], [0, 1, 2])}, "not all zero"),
        ({"raw": ([1, 1], [0, 2, 1])}, "rising"),
        ({"raw": (1.0, 2.0, 3.0)}, "give an array, or"),
        ({"a": ([1], [0, 1]), "b": ([1], [0, 2])}, "series 'b' has other edges"),
    ],
)
def test_histogram_names_what_does_not_fit(ax, series, says):
    with pytest.raises(InputError, match=says):
        histogram(ax, series)


def test_a_constant_series_can_be_drawn(ax):
    histogram(ax, {"raw": np.full(5, 3.0)})
    assert ax.patches[0].get_data().values.sum() == 1


def test_bars_carry_their_values_intervals_and_limit(ax):
    bars(
        ax,
        ["a", "b", "c"],
        [0.5, -0.25, np.nan],
        [(0.4, 0.7), (-0.3, -0.2), (np.nan, np.nan)],
        ["a"],
        limit=0.45,
    )
    assert [(p.get_width(), p.get_y() + p.get_height() / 2) for p in ax.patches] == [(0.5, 0), (-0.25, 1)]
    assert to_hex(ax.patches[0].get_facecolor()) == "#0072b2" != to_hex(ax.patches[1].get_facecolor())
    assert [t.get_text() for t in ax.texts] == ["0.5", "\u22120.25", "–"]
    assert [tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"] == [
        (0.4, 0.7),
        (-0.3, -0.2),
    ]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"] == [[0.45, 0.45]]
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]


def test_long_names_are_cut_in_the_middle(ax):
    bars(ax, ["a" * 100 + ".jsonl"], [1.0])
    [name] = [t.get_text() for t in ax.get_yticklabels()]
    assert len(name) == 39 and name.startswith("aaaa") and name.endswith("a.jsonl") and "…" in name


def test_change_joins_before_and_after(ax):
    change(ax, ["a", "b"], [0.1, 0.2], [0.3, 0.1], ("raw", "selected"))
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.1, 0.2], [0.3, 0.1]]
    assert [s[:, 0].tolist() for s in ax.collections[0].get_segments()] == [[0.1, 0.3], [0.2, 0.1]]


def test_curve_draws_its_bands(ax):
    curve(ax, [0, 1], {"a": [1.0, 2.0], "b": [0.0, 1.0]}, {"a": ([0.5, 1.5], [1.5, 2.5])})
    assert [list(line.get_ydata()) for line in ax.lines] == [[1.0, 2.0], [0.0, 1.0]]
    assert len({line.get_linestyle() for line in ax.lines}) == 2  # told apart without colour too
    band = ax.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 2.5)


def test_heat_writes_the_cells(ax):
    heat(ax, np.array([[0.0, 1.0], [np.nan, np.inf]]), ["a", "b"], ["c", "d"])
    assert [t.get_text() for t in ax.texts] == ["0", "1", "–", "–"]
    assert [t.get_color() for t in ax.texts[:2]] == ["white", "black"]


def test_dendrogram_names_its_leaves_in_the_order_of_the_tree(ax):
    tree = np.array([[0, 2, 0.1, 2.0], [1, 3, 0.9, 3.0]])  # first a and c, then b
    dendrogram(ax, tree, ["a", "b", "c"], xlabel="distance", limit=0.5)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert (set(names[1:]) == {"a", "c"} and names[0] == "b") or names[2] == "b"
    merges = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert sorted(max(line.get_xdata()) for line in merges) == [0.1, 0.9]
    near, far = sorted(merges, key=lambda line: max(line.get_xdata()))
    assert near.get_color() == "C0" != far.get_color()
    places = {name: place for place, name in enumerate(names)}
    assert {near.get_ydata()[0], near.get_ydata()[-1]} == {places["a"], places["c"]}


def test_crowded_heat_has_no_cells_written(ax):
    heat(ax, np.ones((1, 11)), ["a"], list("abcdefghijk"))
    assert not ax.texts


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda ax: bars(ax, ["a"], [1.0, 2.0]), "values has length 2; labels has length 1"),
        (lambda ax: bars(ax, ["a"], [1.0], intervals=[]), "intervals has length 0"),
        (lambda ax: bars(ax, [], []), "labels is empty"),
        (lambda ax: change(ax, ["a"], [1.0], []), "after has length 0"),
        (lambda ax: curve(ax, [0, 1], {"a": [1.0]}), "series 'a' has length 1; x has length 2"),
        (lambda ax: curve(ax, [0], {"a": [1.0]}, {"b": ([0.0], [1.0])}), "bands name no series"),
        (lambda ax: curve(ax, [0], {"a": [1.0]}, {"a": ([0.0, 1.0], [1.0])}), "low band of 'a' has length 2"),
        (lambda ax: curve(ax, [0], {}), "series is empty"),
        (lambda ax: heat(ax, np.ones((2, 2)), ["a"], ["b", "c"]), "labels make it \\(1, 2\\)"),
        (lambda ax: dendrogram(ax, np.array([[0, 1, 0.5, 2.0]]), ["a"]), "1 names do not fit a tree of 1 merges"),
        (lambda ax: heat(ax, np.full((1, 1), np.nan), ["a"], ["b"]), "no finite value"),
    ],
)
def test_drawings_name_what_does_not_fit(ax, call, says):
    with pytest.raises(InputError, match=says):
        call(ax)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_legend_leaves_room_for_the_curves_on_a_phone(count):
    series = {f"a rather long name {i}": [0.0, 1.0] for i in range(count)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when axes collapse
        figure(lambda ax: curve(ax, [0.0, 1.0], series, xlabel="x", ylabel="y"), "curves")
