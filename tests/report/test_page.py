"""A page shows hostile text as text, loads nothing, runs nothing, and is written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import markupsafe
import numpy as np
import pytest
from payloads import ALL, PLAIN

from salience.errors import InputError
from salience.report import code, documents, facts, heading, page, table, text, verdict
from salience.report.blocks import Picture

PIXEL = "data:image/png;base64,iVBORw0KGgo="
ALLOWED = {
    "meta": {"charset", "http-equiv", "content", "name"}, "html": {"lang"}, "p": {"class"}, "dl": {"class"},
    "section": {"class"}, "div": {"class", "tabindex", "dir"}, "th": {"scope", "class"}, "td": {"class"},
    "figure": {"class"}, "source": {"media", "srcset"}, "img": {"src", "alt"},
}  # fmt: skip
BARE = {
    "head", "title", "style", "body", "main", "header", "footer", "h1", "h2", "pre", "code", "dt", "dd",
    "table", "caption", "thead", "tbody", "tr", "figcaption", "picture", "details", "summary",
}  # fmt: skip


class Reader(HTMLParser):
    """Collects elements with their attributes, and the text of each element that holds only text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.declarations: list[str] = []
        self._open, self._text = "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open, self._text = tag, ""

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self.texts.append((tag, self._text))
        self._open = ""

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_comment(self, data: str) -> None:
        self.declarations.append(data)

    def handle_pi(self, data: str) -> None:
        self.declarations.append(data)

    def unknown_decl(self, data: str) -> None:
        self.declarations.append(data)

    def of(self, tag: str) -> list[str]:
        return [content for name, content in self.texts if name == tag]


def everywhere(payload: str) -> list[object]:
    return [
        verdict(payload, payload, None),
        facts({payload: payload}),
        heading(payload),
        text(payload),
        table([payload, "n"], [[payload, 1]], caption=payload),
        documents([(payload, payload)], payload),
        code(payload),
        Picture(payload, payload, light=PIXEL, dark=PIXEL, narrow=PIXEL, narrow_dark=PIXEL),
    ]


def policy(reader: Reader) -> str:
    [meta] = [a for tag, a in reader.elements if tag == "meta" and "http-equiv" in a]
    assert meta["http-equiv"] == "Content-Security-Policy"
    return str(meta["content"])


def test_enough_payloads():
    assert len({payload for payload, _ in ALL}) == len(ALL) >= 60


@pytest.mark.parametrize("number", range(len(ALL)))
def test_hostile_text_is_shown_as_text_in_every_block(number):
    payload, shown = ALL[number]
    reader = Reader(page(payload, everywhere(payload), subtitle=payload))
    for tag, attributes in reader.elements:
        assert tag in BARE or tag in ALLOWED
        assert set(attributes) <= ALLOWED.get(tag, set())
    assert reader.declarations == ["doctype html"]
    plain = Reader(page("t", everywhere("t"), subtitle="t"))
    assert [tag for tag, _ in reader.elements] == [tag for tag, _ in plain.elements]
    for tag, times in {
        **dict.fromkeys(["title", "h1", "h2", "dt", "dd", "summary", "code", "caption", "figcaption"], 1),
        **{"th": 1, "td": 1, "div": 1, "p": 5},
    }.items():
        assert reader.of(tag).count(shown) == times, tag
    assert [a["alt"] for tag, a in reader.elements if tag == "img"] == [shown]


def test_text_that_claims_to_be_safe_html_is_escaped_too():
    class Sly(str):
        def __html__(self) -> str:
            return "<script>alert(1)</script>"

    class Object:
        def __html__(self) -> str:
            return "<script>alert(1)</script>"

        def __str__(self) -> str:
            return "<b>"

    for payload in (markupsafe.Markup("<b>"), Sly("<b>"), Object()):
        reader = Reader(page(payload, everywhere(payload), subtitle=payload))
        assert "<b>" in reader.of("td") and "<b>" in reader.of("h1")
        assert not {"b", "script"} & {tag for tag, _ in reader.elements}


def test_policy_admits_our_style_sheet_by_hash_and_nothing_else():
    html = page("title", everywhere("text"))
    reader = Reader(html)
    rules = dict(rule.strip().split(" ", 1) for rule in policy(reader).split(";"))
    [style] = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    assert len(style) > 1000
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    first = [tag for tag, a in reader.elements if tag == "style" or "http-equiv" in a]
    assert first == ["meta", "style"]  # a policy counts only for what follows it


def test_page_refers_to_nothing_outside_itself():
    html = page("title", everywhere("text"))
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html, flags=re.IGNORECASE)
    for _, attributes in Reader(html).elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")


def test_page_fits_phones_and_both_colour_schemes():
    html = page("title", everywhere("text"))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert html.count("prefers-color-scheme: dark") >= 3 and "@media print" in html


def test_same_blocks_give_the_same_bytes():
    assert page("t", everywhere("x")) == page("t", everywhere("x"))


def test_cells_are_shown_for_readers():
    rows = [
        [12345678, -0.5, None, True, "a"],
        [2024, 1e-7, float("nan"), False, "b"],
        [np.int64(7), np.float32(0.25), 3.0, True, "c"],
        [-1234567, 123456.7, float("inf"), True, "d"],
    ]
    built = table(["count", "real", "holes", "flag", "word"], rows)
    assert built.align == ("right", "right", "right", "left", "left")
    assert built.rows[0] == ("12\u202f345\u202f678", "\u22120.5", "–", "yes", "a")
    assert built.rows[1] == ("2024", "1e\u221207", "–", "no", "b")
    assert built.rows[2] == ("7", "0.25", "3", "yes", "c")
    assert built.rows[3] == ("\u22121\u202f234\u202f567", "123\u202f457", "∞", "yes", "d")


@pytest.mark.parametrize(
    ("columns", "rows", "align", "says"),
    [
        (["a", "b"], [[1, 2], [3]], None, "row 1 of the table has 1 cells; there are 2 columns"),
        (["a", "b"], [[1, 2]], ["left"], "for each of the 2 columns"),
        (["a"], [[1]], ["onclick=alert(1)"], "give 'left' or 'right'"),
    ],
)
def test_table_names_what_does_not_fit(columns, rows, align, says):
    with pytest.raises(InputError, match=re.escape(says)):
        table(columns, rows, align=align)


def test_an_empty_table_is_a_table():
    assert Reader(page("t", [table(["a"], [])])).of("th") == ["a"]


def test_page_refuses_what_is_no_block():
    with pytest.raises(InputError, match="block 1 of the page is a str"):
        page("t", [text("a"), "b"])


class Fails(str):
    """Text that cannot be rendered."""

    def replace(self, *_: object) -> str:
        raise RuntimeError("cannot be rendered")

    def __str__(self) -> str:
        return self


def test_file_is_the_returned_html(tmp_path):
    path = tmp_path / "report.html"
    html = page("téxt \ud800", everywhere("a\r\nb"), path=path)
    assert path.read_bytes() == html.encode()
    page("second", [], path=str(path))
    assert "<h1>second</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_existing_file_survives_a_failing_render(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="cannot be rendered"):
        page("t", [text(Fails("x"))], path=path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_existing_file_survives_a_failing_write(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        page("t", [], path=path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_import_is_light():
    program = (
        "import sys, salience.report as r; r.__dir__(); heavy = {'matplotlib', 'jinja2', 'torch', 'pandas'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); r.page('t', [r.text('x')]); "
        "assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_browser_finds_nothing_to_refuse(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: the page was checked by parsing only")

    def console(path: Path) -> tuple[str, str]:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, "\n".join(lines)

    blocks = [block for payload in PLAIN for block in everywhere(payload)]
    html = page("hostile", blocks, path=tmp_path / "page.html")
    dom, complaints = console(tmp_path / "page.html")
    assert complaints == ""
    assert [tag for tag, _ in Reader(dom).elements] == [tag for tag, _ in Reader(html).elements]

    # The check itself can fail: a page with a script in it is refused by the same policy.
    (tmp_path / "bad.html").write_text(html.replace("<h1>", "<script>document.title = 'ran'</script><h1>"))
    dom, complaints = console(tmp_path / "bad.html")
    assert "Content Security Policy" in complaints and "<title>hostile</title>" in dom
