"""The catalogue of the papers that salience implements: `papers.toml`, read, checked and searched.

It is the only list of them; the command line, the documentation, the contract tests and the evidence read it
here. Importing this module needs the standard library alone.
"""

from __future__ import annotations

import functools
import itertools
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from salience.errors import DataError, InputError, nearest

# What a paper weighs, and the room (the package) that weighing it belongs to.
UNIT_ROOM: dict[str, str] = {
    "sample": "data",  # a training row: a text, an image, a sequence
    "step": "data",  # a part of a training row, such as one step of a reasoning trace
    "task": "data",  # a data set that others are trained beside
    "token": "tokens",  # a position that attention reads
    "feature": "features",  # an input: a column, a pixel
    "representation": "representations",  # a direction or a vector of a network's own space
    "prototype": "prototypes",  # an example or a part of one that a decision rests on
    "concept": "concepts",  # a nameable direction in a network's space
    "weight": "weights",  # a parameter, or its change by fine-tuning
    "channel": "weights",  # the parameters behind one feature of a layer
    "layer": "weights",  # the parameters of a whole layer
    "prediction": "trust",  # one answer of a model
    "prompt": "generation",  # words that a generator is given or gives: a prompt, a description, evidence
    "guidance": "generation",  # what pushes a sampler besides words: noise, guidance terms, skip strengths
    "edit": "generation",  # a pair of pictures with the instruction that leads from one to the other
}

# What a paper does with the units once it knows which of them matter.
ACTS: dict[str, str] = {
    "score": "the numbers themselves are what the user takes away",
    "select": "keep the units that matter, leave the others",
    "reweight": "let units count more or less",
    "prune": "remove the units that do not matter from a model, a trace or a pool",
    "quantise": "store weights in fewer bits",
    "merge": "make one unit or one model out of several",
    "perturb": "move inputs or activations in the direction that hurts most",
    "guide": "steer a sampler while it runs",
    "explain": "show what a decision rests on",
    "abstain": "say for which inputs the answer is not to be used",
    "generate": "make new pictures, masks or texts",
    "tune": "train a model, or a few of its parameters, with the paper's layer or loss",
    "distil": "carry a model or a data set over into a smaller one",
    "annotate": "write labels or descriptions",
    "verify": "measure whether a model, a label or an explanation can be relied on",
}

# How the method was checked before it was written; the weakest essential part decides.
FIDELITIES: dict[str, str] = {
    "paper": "against the text of the paper",
    "code": "against code of the authors",
    "reconstructed": "an essential part rests on abstracts, summaries, related code or memory",
}

EXTRAS: tuple[str, ...] = ("base", "torch", "peft", "diffusion", "llm")  # what an entry needs installed

# The kinds of values that a row may hold, as an error names them.
_TEXT, _TEXTS = "a text that says something", "a list of such texts"
_WHOLE, _POSITIVE = "a whole number above 0", "a number above 0"
_REQUIRED = {
    "number": _WHOLE, "title": _TEXT, "unit": _TEXT, "acts": _TEXTS, "takes": _TEXT, "gives": _TEXT,
    "commands": _TEXTS, "fidelity": _TEXT, "extra": _TEXT, "claim": _TEXT,
}  # fmt: skip
_OPTIONAL = {"arxiv": _TEXT, "doi": _TEXT, "entry": _TEXTS, "minutes": _POSITIVE}
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue.

    Parameters
    ----------
    slug : str
        Short name: the key in the catalogue, the ``--method`` and ``salience reproduce SLUG``.
    number : int
        Place in the list of papers, from 1.
    title : str
        Title of the paper.
    unit : str
        What is weighed, a key of `UNIT_ROOM`.
    acts : tuple of str
        What is done with it, keys of `ACTS`.
    takes, gives : str
        What the user has in the hand, and what comes out.
    commands : tuple of str
        Commands without the leading ``salience``; empty where the method is used from Python only.
    fidelity : str
        How the method was checked, a key of `FIDELITIES`.
    extra : str
        What its entry needs installed, one of `EXTRAS`.
    claim : str
        What the reproduction sets out to show, and against which baseline.
    arxiv, doi : str or None
        Identifier of the paper.
    entry : tuple of str
        Public names as ``package:name``; empty while the paper is planned.
    minutes : float or None
        Declared minutes of the desk reproduction for one seed, once its world is trained.
    """

    slug: str
    number: int
    title: str
    unit: str
    acts: tuple[str, ...]
    takes: str
    gives: str
    commands: tuple[str, ...]
    fidelity: str
    extra: str
    claim: str
    arxiv: str | None = None
    doi: str | None = None
    entry: tuple[str, ...] = ()
    minutes: float | None = None

    @property
    def room(self) -> str:
        """The package below ``salience`` that the paper lives in: its unit decides."""
        return UNIT_ROOM[self.unit]


def load() -> dict[str, Paper]:
    """Read the catalogue that comes with salience.

    Returns
    -------
    dict of str to Paper
        By slug, in the order of the numbers. The file is read once; the dictionary is the caller's own.

    Raises
    ------
    DataError
        If the catalogue is at fault (see `parse`).
    """
    return dict(_shipped())


@functools.cache
def _shipped() -> dict[str, Paper]:
    return parse(files("salience").joinpath("papers.toml").read_text(encoding="utf-8"))


def get(slug: str) -> Paper:
    """Find one paper by its slug.

    Raises
    ------
    InputError
        If there is none of that name: names the nearest ones.
    """
    papers = _shipped()
    if slug not in papers:
        raise InputError(f"there is no paper {slug!r} in the catalogue; {nearest(slug, papers)}")
    return papers[slug]


def find(query: str = "", unit: str | None = None) -> list[Paper]:
    """Search the catalogue.

    Parameters
    ----------
    query : str
        Words that must all occur, in any case, in the slug, the title, what a paper takes or gives, or its
        claim. An empty query finds every paper.
    unit : str, optional
        Only papers that weigh this unit, a key of `UNIT_ROOM`.

    Returns
    -------
    list of Paper
        In the order of the numbers.

    Raises
    ------
    InputError
        If `unit` is none that the catalogue knows.
    """
    if unit is not None and unit not in UNIT_ROOM:
        raise InputError(f"unit={unit!r} is not a unit of the catalogue; {nearest(unit, UNIT_ROOM)}")
    words = query.casefold().split()
    return [
        paper
        for paper in _shipped().values()
        if unit in (None, paper.unit) and all(word in _searchable(paper) for word in words)
    ]


def _searchable(paper: Paper) -> str:
    return "\n".join((paper.slug, paper.title, paper.takes, paper.gives, paper.claim)).casefold()


def parse(text: str) -> dict[str, Paper]:
    """Build the papers from the text of a catalogue, and check it.

    Parameters
    ----------
    text : str
        TOML with one table for each paper, its slug as the key and the fields of `Paper`.

    Returns
    -------
    dict of str to Paper
        By slug, in the order of the numbers.

    Raises
    ------
    DataError
        If the text is no TOML, or a row has a malformed slug, an unknown or missing field, a value of the
        wrong kind or outside its vocabulary, or a number that another row has: names the row and the field.
    """
    try:
        rows = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"papers.toml: {error}") from error
    papers = [_paper(slug, row) for slug, row in rows.items()]
    papers.sort(key=lambda paper: paper.number)
    for one, other in itertools.pairwise(papers):
        if one.number == other.number:
            raise _fault(other.slug, f"number {other.number} is also that of [{one.slug}]")
    return {paper.slug: paper for paper in papers}


def _paper(slug: str, row: Any) -> Paper:
    if not _SLUG.fullmatch(slug):
        raise _fault(slug, "a slug is lower-case letters and digits in words joined by single hyphens")
    if not isinstance(row, dict):
        raise _fault(slug, "is not a table")
    kinds = _REQUIRED | _OPTIONAL
    for field, value in row.items():
        if field not in kinds:
            raise _fault(slug, f"unknown field {field!r}; {nearest(field, kinds)}")
        if not _is(kinds[field], value):
            raise _fault(slug, f"{field} = {value!r} is not {kinds[field]}")
    for field in _REQUIRED:
        if field not in row:
            raise _fault(slug, f"the field {field!r} is missing")
    _check_values(slug, row)
    values: dict[str, Any] = {f: tuple(v) if isinstance(v, list) else v for f, v in row.items()}
    return Paper(slug, **values)


def _is(kind: str, value: object) -> bool:
    if kind == _TEXT:
        return isinstance(value, str) and bool(value.strip())
    if kind == _TEXTS:
        return isinstance(value, list) and all(_is(_TEXT, item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int if kind == _WHOLE else (int, float)):
        return False
    return value > 0


def _check_values(slug: str, row: dict[str, Any]) -> None:
    for field, allowed in (("unit", UNIT_ROOM), ("fidelity", FIDELITIES), ("extra", EXTRAS)):
        if row[field] not in allowed:
            raise _fault(slug, f"unknown {field} {row[field]!r}; {nearest(row[field], allowed)}")
    if not row["acts"]:
        raise _fault(slug, "acts is empty; every paper does something with its units")
    for act in row["acts"]:
        if act not in ACTS:
            raise _fault(slug, f"unknown act {act!r} in acts; {nearest(act, ACTS)}")
    if "arxiv" in row and not _ARXIV.fullmatch(row["arxiv"]):
        raise _fault(slug, f"arxiv = {row['arxiv']!r} is not an identifier such as '2302.03169'")
    room = f"salience.{UNIT_ROOM[row['unit']]}"
    for entry in row.get("entry", ()):
        if not re.fullmatch(rf"{re.escape(room)}(\.\w+)*:\w+", entry):
            raise _fault(slug, f"entry {entry!r} is not '{room}:name', a public name of the room of its unit")


def _fault(slug: str, what: str) -> DataError:
    return DataError(f"papers.toml, [{slug}]: {what}")
