"""The generated pages list every paper, show its text as text, and keep README.md in step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def paper(slug, number, room, **given):
    usual = dict(
        title=f"On {slug}", takes="text corpus", gives="scores", claim="it helps", arxiv=None, doi=None,
        entry=(), commands=(),
    )  # fmt: skip
    return SimpleNamespace(slug=slug, number=number, room=room, **{**usual, **given})


DSIR = dict(entry=("salience.data:DSIR",), commands=("select text --method dsir",), arxiv="2302.03169")
RSQ = dict(entry=("salience.weights:rsq",), takes="a | b", title="<b>*RSQ*</b> [x](y) $z$ `c`")
FOD = dict(commands=("detect anomaly",), doi="10.1/x")
PAPERS = [
    paper("dsir", 2, "data", **DSIR),
    paper("rsq", 20, "weights", **RSQ),
    paper("fod", 49, "trust", **FOD),
]
STATES = {"dsir": "shown (claim)", "rsq": "not shown", "fod": "planned"}
FACTS = (PAPERS, STATES, {"dsir"})


def cells(page, slug):
    [line] = [line for line in page.splitlines() if line.startswith("|") and slug in line]
    return [cell.strip() for cell in line.strip("|").replace("\\|", "¦").split("|")]


def test_first_page_goes_from_have_to_want(generate):
    page = generate.index_table(*FACTS)
    assert cells(page, "dsir") == [
        "text corpus", "scores", "`salience select text --method dsir`", "[dsir](methods/dsir.md)",
        "shown (claim)",
    ]  # fmt: skip
    assert cells(page, "rsq") == [
        "a ¦ b",
        "scores",
        "`salience.weights.rsq`",
        "rsq",
        "not shown",
    ]
    assert cells(page, "fod") == [
        "text corpus",
        "scores",
        "–",
        "fod",
        "planned",
    ]  # no command before it works
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "## Which training samples, steps and tasks matter?",
        "## Which layers, weights and deltas matter?",
        "## Which predictions can be trusted?",
    ]


def test_catalogue_counts_the_states_and_lists_the_pages(generate):
    page = generate.catalogue(*FACTS)
    assert "Now: 1 not shown, 1 planned, 1 shown (claim)." in page
    assert page.count("\n../methods/") == 1
    assert cells(page, "dsir")[2] == "[On dsir](https://arxiv.org/abs/2302.03169)"
    assert cells(page, "fod")[2] == "[On fod](https://doi.org/10.1/x)"


def test_text_of_the_catalogue_is_never_markup(generate):
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    shown = "<b>*bold*</b> [a](b) $x$ `c` | # ~~d~~ &amp; \\ _e_ {f}"
    html = MarkdownIt().enable(["table", "strikethrough"]).render(generate.table(["x"], [[generate.text(shown)]]))
    escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{escaped}</td>" in html


def test_readme_keeps_everything_but_the_table(generate, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(generate, "README", readme)
    monkeypatch.setattr(generate, "read", lambda: FACTS)
    readme.write_text("# top\n<!-- papers:begin -->\nold\n<!-- papers:end -->\nrest\n", encoding="utf-8")
    assert generate.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err
    assert "old" in readme.read_text(encoding="utf-8")
    assert generate.main(["--readme"]) == 0 and generate.main(["--check"]) == 0
    new = readme.read_text(encoding="utf-8")
    assert new.startswith("# top\n<!-- papers:begin -->\n| no. |") and new.endswith("|\n<!-- papers:end -->\nrest\n")
    assert "old" not in new and cells(new, "dsir")[0:2] == ["2", "[dsir](docs/methods/dsir.md)"]
    monkeypatch.setitem(STATES, "dsir", "stale")
    assert generate.main(["--check"]) == 1


@pytest.mark.parametrize(
    "readme",
    ["none", "<!-- papers:end --><!-- papers:begin -->", "<!-- papers:begin -->" * 2 + "<!-- papers:end -->"],
)
def test_readme_without_its_markers_is_an_error(generate, readme):
    with pytest.raises(SystemExit, match="once each"):
        generate.with_table(readme, "")


def test_every_room_of_the_catalogue_has_its_question(generate):
    from salience.papers import UNIT_ROOM

    assert set(generate.ROOMS) == set(UNIT_ROOM.values())


def test_every_paper_is_in_every_list(generate):
    listed, states, methods = generate.read()
    assert set(states) == {paper.slug for paper in listed} and len(listed) == 62
    for page in (generate.index_table, generate.catalogue, generate.readme_table):
        rows = [line for line in page(listed, states, methods).splitlines() if line.startswith("| ")]
        headers = len(generate.ROOMS) if page is generate.index_table else 1
        assert len(rows) == 62 + 2 * headers


def test_every_command_is_in_the_reference(generate):
    page = generate.commands()
    for heading in (
        "## `salience`",
        "### `salience papers`",
        "#### `salience papers list`",
        "### `salience reproduce`",
    ):
        assert f"{heading}\n" in page


def test_reference_names_what_a_module_offers(generate):
    page = generate.module_page("salience.report", "An intro.")
    for name in ("page", "verdict", "table"):
        assert f".. autofunction:: {name}\n" in page
    assert generate.module_page("salience.errors", "").count(".. autoclass::") >= 5
    assert "sys" not in generate.public_names(sys.modules["salience.errors"])
