"""Write the pages that follow from the catalogue, the evidence, the rooms and the command line.

``python docs/generate.py`` writes ``docs/_generated/`` (the Sphinx build does that by itself);
``python docs/generate.py --readme`` rewrites the table of papers in README.md, and
``python docs/generate.py --check`` exits with 1 when that table is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from salience.papers import Paper

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- papers:begin -->", "<!-- papers:end -->"

# What each room weighs, as the question that a reader comes with.
ROOMS = {
    "data": "Which training samples, steps and tasks matter?",
    "tokens": "Which tokens matter?",
    "features": "Which inputs and columns matter?",
    "representations": "What does a network's space hold?",
    "prototypes": "Which examples does a decision rest on?",
    "concepts": "Which concepts does a network use?",
    "weights": "Which layers, weights and deltas matter?",
    "trust": "Which predictions can be trusted?",
    "generation": "What steers a generator?",
}
FLOORS = ("scores", "io", "model", "measure", "report", "evidence", "papers", "errors")


def index_table(papers: list[Paper], states: Mapping[str, str], methods: set[str]) -> str:
    """The first page's "I have, I want" tables, one for each room."""
    parts = []
    for room, question in ROOMS.items():
        mine = [paper for paper in papers if paper.room == room]
        if mine:
            rows = [
                [text(paper.takes), text(paper.gives), how(paper), link(paper, methods), states[paper.slug]]
                for paper in mine
            ]
            parts += [f"## {question}\n", table(["I have", "I want", "how", "method", "state"], rows)]
    return "\n".join(parts)


def catalogue(papers: list[Paper], states: Mapping[str, str], methods: set[str]) -> str:
    """The page with every paper, its claim and its state."""
    counts = {state: list(states.values()).count(state) for state in sorted(set(states.values()))}
    rows = [
        [str(paper.number), link(paper, methods, "../"), title(paper), text(paper.claim), states[paper.slug]]
        for paper in papers
    ]
    return "\n".join(
        [
            "# Methods\n",
            "Every paper of the catalogue with what its reproduction sets out to show, and where that stands "
            "([how evidence works](../evidence.md)). "
            f"Now: {', '.join(f'{count} {state}' for state, count in counts.items())}.\n",
            table(["no.", "method", "paper", "claim", "state"], rows),
            "```{toctree}\n:hidden:\n",
            *(f"../methods/{paper.slug}" for paper in papers if paper.slug in methods),
            "```\n",
        ]
    )


def readme_table(papers: list[Paper], states: Mapping[str, str], methods: set[str]) -> str:
    """The table of papers in README.md."""
    rows = [
        [
            str(paper.number),
            link(paper, methods, "docs/"),
            title(paper),
            f"{text(paper.takes)} → {text(paper.gives)}",
            states[paper.slug],
        ]
        for paper in papers
    ]
    return table(["no.", "method", "paper", "takes → gives", "state"], rows)


def with_table(readme: str, papers_table: str) -> str:
    """`readme` with the text between its two markers replaced by `papers_table`."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md must hold {BEGIN} and after it {END}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{papers_table}{END}{rest.split(END)[1]}"


def how(paper: Paper) -> str:
    """The command, or else the name to import; nothing while the paper is planned."""
    if not paper.entry:
        return "–"
    if paper.commands:
        return "<br>".join(code(f"salience {command}") for command in paper.commands)
    return "<br>".join(code(entry.replace(":", ".")) for entry in paper.entry)


def link(paper: Paper, methods: set[str], up: str = "") -> str:
    """The slug, linked to the method's page where there is one."""
    return f"[{paper.slug}]({up}methods/{paper.slug}.md)" if paper.slug in methods else paper.slug


def title(paper: Paper) -> str:
    """The paper's title, linked to the paper where the catalogue knows where it is."""
    if paper.arxiv:
        return f"[{text(paper.title)}](https://arxiv.org/abs/{paper.arxiv})"
    return f"[{text(paper.title)}](https://doi.org/{paper.doi})" if paper.doi else text(paper.title)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def text(plain: str) -> str:
    """Plain text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#$~&])", r"\\\1", " ".join(plain.split()))


def code(plain: str) -> str:
    """Plain text as a piece of code in a table's cell."""
    return f"`{plain.replace('|', chr(92) + '|')}`"


def module_page(name: str, intro: str) -> str:
    """The reference of a module: its docstring and each of its public names."""
    from salience.errors import MissingExtra

    module = importlib.import_module(name)
    parts = [f"# {name}\n", f"{intro}\n", "```{eval-rst}", f".. automodule:: {name}\n   :no-members:\n"]
    parts += [f".. currentmodule:: {name}\n"]
    for public in public_names(module):
        try:
            thing = getattr(module, public)
        except MissingExtra as error:
            parts.append(f"``{public}``\n   {error}\n")
            continue
        kind = "class" if isinstance(thing, type) else "function" if callable(thing) else "data"
        parts.append(f".. auto{kind}:: {public}\n" + ("   :members:\n" if kind == "class" else ""))
    return "\n".join([*parts, "```\n"])


def public_names(module: object) -> list[str]:
    """The names that a module offers: `__all__`, or else what it defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__  # type: ignore[attr-defined]
    )


def reference() -> dict[str, str]:
    """The pages of the reference by name, their list among them."""
    intros = {**{f"salience.{room}": question for room, question in ROOMS.items()}}
    intros |= {f"salience.{floor}": "" for floor in FLOORS}
    pages = {f"api/{name}.md": module_page(name, intro) for name, intro in intros.items()}
    rows = [[f"[{name}](api/{name}.md)", summary(name)] for name in intros]
    contents = ["# Reference\n", table(["module", "holds"], rows), "```{toctree}\n:hidden:\n"]
    pages["reference.md"] = "\n".join([*contents, *(f"api/{name}" for name in intros), "```\n"])
    return pages


def summary(name: str) -> str:
    """The first line of a module's docstring."""
    return text((importlib.import_module(name).__doc__ or "").strip().split("\n")[0])


def commands() -> str:
    """The help of every command, as users see it."""
    import typer
    from typer.testing import CliRunner

    from salience.cli import app

    def walk(command: object, path: list[str]) -> list[str]:
        plain = {"COLUMNS": "96", "TERM": "dumb", "NO_COLOR": "1"}
        shown = CliRunner().invoke(app, [*path, "--help"], prog_name="salience", env=plain)
        if shown.exit_code:
            raise SystemExit(f"salience {' '.join(path)} --help failed: {shown.output}")
        lines = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
        parts = [
            f"{'#' * min(len(path) + 2, 4)} `{' '.join(['salience', *path])}`\n",
            f"```text\n{lines}\n```\n",
        ]
        for name, child in sorted(getattr(command, "commands", {}).items()):
            if not child.hidden:
                parts += walk(child, [*path, name])
        return parts

    return "\n".join(walk(typer.main.get_command(app), []))


def read() -> tuple[list[Paper], dict[str, str], set[str]]:
    """The catalogue, the state of each paper, and the slugs that have a page."""
    from salience import evidence, papers

    listed = list(papers.load().values())
    methods = {page.stem for page in (DOCS / "methods").glob("*.md")}
    if stray := methods - {paper.slug for paper in listed}:
        raise SystemExit(f"docs/methods has pages of no paper in the catalogue: {', '.join(sorted(stray))}")
    return listed, {paper.slug: str(evidence.state(paper)) for paper in listed}, methods


def write(folder: Path = DOCS / "_generated") -> None:
    """Write all generated pages; a page that is already right keeps its time, so that Sphinx skips it."""
    facts = read()
    pages = {"index.md": index_table(*facts), "catalogue.md": catalogue(*facts), "commands.md": commands()}
    pages |= reference()
    for name, page in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in pages:
            path.unlink()


def main(arguments: list[str] | None = None) -> int:
    """Run the script; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--readme", action="store_true", help="rewrite the table of papers in README.md")
    which.add_argument("--check", action="store_true", help="exit with 1 when that table is out of date")
    options = parser.parse_args(arguments)
    if not (options.readme or options.check):
        write()
        return 0
    old = README.read_text(encoding="utf-8")
    new = with_table(old, readme_table(*read()))
    if options.readme:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        print("README.md is out of date: run python docs/generate.py --readme", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
