"""The catalogue: its rows, the map from units to rooms, its errors and its search."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

from salience import papers
from salience.errors import DataError, InputError
from salience.papers import ACTS, EXTRAS, FIDELITIES, UNIT_ROOM, Paper, parse

# The plan of the house: every paper's number, slug and commands, room by room. Commands that several papers
# share are told apart by `--method SLUG`.
ROOMS = {
    "data": """
        1 pir: refine traces
        2 dsir: select text
        10 gais: select rows
        16 kmq: select rows, select text
        19 loss-reweighting:
        23 visual-complexity: rank images
        24 inset:
        30 desmil:
        37 rcal:
        40 nrr-dd: compress dataset
        42 lasso-task-selection: select tasks
        57 bias-loss:
        60 adapt-infinity: select stream""",
    "tokens": """
        9 gaam:
        12 vflowopt: compress tokens
        18 random-feature-attention:
        45 attention-at:
        55 sea:""",
    "features": """
        25 explainability-study: verify saliency
        36 bee: explain saliency
        38 blackbox-surrogate: explain table
        46 normgrad: explain saliency
        61 outrank: rank table""",
    "representations": """
        27 pretraining-advantage:
        43 nfe:
        51 kalm-embedding:
        53 supremix:
        59 moe-x:
        62 representation-biases:""",
    "prototypes": """
        6 prob-psenn:
        14 evalprotopnet: verify prototypes
        26 robust-cbc: verify robustness""",
    "concepts": """
        3 holistic-concepts: explain concepts
        5 feature-complexity: explain complexity
        21 craft: explain concepts
        39 pace: explain concepts
        54 concept-audit: verify concepts""",
    "weights": """
        7 ist:
        11 darex: compress delta, merge delta
        13 ifm: compress channels
        17 sparseland: compress sparsify
        20 rsq: compress quantize
        22 bn-only:
        47 weight-matching: merge permute
        50 peft-survey:""",
    "trust": """
        8 costarr: detect novelty
        28 advstyle:
        41 bayes-pfl: detect anomaly
        44 dsl: verify labels
        48 sdm: verify predictions
        49 fod: detect anomaly
        52 m-attack: verify attack
        56 negclip-aro: verify compositionality""",
    "generation": """
        4 noise-refinement: generate image
        15 far: generate image
        29 neti: generate image
        31 omniedit: select edits, generate edit
        32 resanything: generate mask
        33 skip-tuning: generate image
        34 imageinwords: annotate images
        35 perp-neg: generate image
        58 grove: generate story""",
}

CATALOGUE = papers.load()
ENTRIES = [(paper, entry) for paper in CATALOGUE.values() for entry in paper.entry]
PACKAGES = {
    "base": (),
    "torch": ("torch", "transformers", "accelerate", "captum", "torchmetrics"),
    "peft": ("torch", "peft"),
    "diffusion": ("torch", "diffusers"),
    "llm": ("openai",),
}

ROW = """
[one]
number = 1
title = "One"
arxiv = "2302.03169"
unit = "sample"
acts = ["select"]
takes = "a corpus"
gives = "a part of it"
commands = ["select text"]
fidelity = "code"
extra = "base"
claim = "the part is closer than a random one"
"""


def planned() -> dict[str, tuple[int, str, list[str]]]:
    plan = {}
    for room, lines in ROOMS.items():
        for line in lines.strip().splitlines():
            name, _, commands = line.partition(":")
            number, slug = name.split()
            plan[slug] = (int(number), room, [c.strip() for c in commands.split(",") if c.strip()])
    return plan


def test_rows_agree_with_the_plan() -> None:
    plan = planned()
    everywhere = [command for _, _, commands in plan.values() for command in commands]
    for slug, (number, room, commands) in plan.items():
        paper = CATALOGUE[slug]
        shown = [c + f" --method {slug}" * (everywhere.count(c) > 1) for c in commands]
        assert (paper.slug, paper.number, paper.room, list(paper.commands)) == (slug, number, room, shown)
    assert [paper.number for paper in CATALOGUE.values()] == list(range(1, 63))
    assert len(plan) == len(CATALOGUE)


def test_every_unit_has_a_room_and_every_room_a_unit() -> None:
    assert set(UNIT_ROOM.values()) == set(ROOMS)
    for room in ROOMS:
        assert find_spec(f"salience.{room}") is not None


def test_no_word_of_the_vocabularies_is_idle() -> None:
    rows = CATALOGUE.values()
    assert {paper.unit for paper in rows} == set(UNIT_ROOM)
    assert {act for paper in rows for act in paper.acts} == set(ACTS)
    assert {paper.fidelity for paper in rows} == set(FIDELITIES)
    assert {paper.extra for paper in rows} == set(EXTRAS) == set(PACKAGES)


def test_identifiers_titles_and_claims_are_each_papers_own() -> None:
    rows = CATALOGUE.values()
    assert all(paper.arxiv or paper.doi for paper in rows)
    for field in ("arxiv", "title", "claim"):
        values = [getattr(paper, field) for paper in rows]
        assert len(set(values)) == 62, field
    assert not [paper.slug for paper in rows if paper.claim.endswith(".") or "\n" in paper.claim]


def test_parse_builds_a_paper() -> None:
    text = ROW + 'entry = ["salience.data:One", "salience.data.one:two"]\nminutes = 1.5\n'
    assert parse(text) == {
        "one": Paper(
            slug="one",
            number=1,
            title="One",
            unit="sample",
            acts=("select",),
            takes="a corpus",
            gives="a part of it",
            commands=("select text",),
            fidelity="code",
            extra="base",
            claim="the part is closer than a random one",
            arxiv="2302.03169",
            entry=("salience.data:One", "salience.data.one:two"),
            minutes=1.5,
        )
    }
    assert parse(ROW)["one"].entry == () and parse(ROW)["one"].minutes is None


def test_parse_orders_by_number() -> None:
    later = ROW.replace("[one]", "[two]").replace("number = 1", "number = 2")
    assert list(parse(later + ROW)) == ["one", "two"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[one]", "[One]", r"\[One\]: a slug is lower-case"),
        ("[one]", "[one_two]", r"\[one_two\]: a slug is lower-case"),
        ("[one]", "[one--two]", "a slug is lower-case"),
        ("[one]", "one = 3\n[two]", r"\[one\]: is not a table"),
        ("[one]", "[one", "papers.toml: .*line 2"),
        ("takes =", "take =", r"\[one\]: unknown field 'take'; nearest names: 'takes'"),
        ('takes = "a corpus"', "", r"\[one\]: the field 'takes' is missing"),
        ("number = 1", "number = 0", r"\[one\]: number = 0 is not a whole number above 0"),
        ("number = 1", "number = true", "number = True is not a whole number"),
        ("number = 1", "number = 1.0", "number = 1.0 is not a whole number"),
        ('"a corpus"', '" "', "takes = ' ' is not a text"),
        ('"a corpus"', "7", "takes = 7 is not a text"),
        ('["select"]', '"select"', "acts = 'select' is not a list"),
        ('["select"]', "[1]", r"acts = \[1\] is not a list"),
        ('["select"]', "[]", "acts is empty"),
        ('["select"]', '["select", "selct"]', "unknown act 'selct' in acts; nearest names: 'select'"),
        ('"sample"', '"smaple"', "unknown unit 'smaple'; nearest names: 'sample'"),
        ('"code"', '"guess"', "unknown fidelity 'guess'; there are: 'code', 'paper', 'reconstructed'"),
        ('"base"', '"tensor"', "unknown extra 'tensor'; .*'torch'"),
        ('"2302.03169"', '"arXiv:2302.03169"', "arxiv = 'arXiv:2302.03169' is not an identifier"),
        ('"2302.03169"', '"2302.03169v1"', "arxiv = '2302.03169v1' is not an identifier"),
        ("number = 1", "number = 1\nminutes = 0", "minutes = 0 is not a number above 0"),
        ("number = 1", 'number = 1\nentry = ["salience.data.One"]', "entry 'salience.data.One' is not"),
        ("number = 1", 'number = 1\nentry = ["salience.trust:One"]', "entry 'salience.trust:One' is not"),
        ("number = 1", 'number = 1\nentry = ["salience.database:One"]', "entry 'salience.database:One'"),
    ],
)
def test_parse_names_the_row_and_the_fault(old: str, new: str, told: str) -> None:
    assert old in ROW
    with pytest.raises(DataError, match=told):
        parse(ROW.replace(old, new, 1))


def test_parse_refuses_a_number_used_twice() -> None:
    with pytest.raises(DataError, match=r"\[two\]: number 1 is also that of \[one\]"):
        parse(ROW + ROW.replace("[one]", "[two]"))


def test_get() -> None:
    assert papers.get("dsir").title == "Data Selection for Language Models via Importance Resampling"
    with pytest.raises(InputError, match=r"no paper 'dsri' in the catalogue; nearest names: 'dsir'"):
        papers.get("dsri")


def test_find() -> None:
    assert papers.find() == list(CATALOGUE.values())
    assert [paper.slug for paper in papers.find("IMPORTANCE resampling")] == ["dsir"]  # the title, any case
    assert [paper.slug for paper in papers.find("resampling importance")] == ["dsir"]  # in any order
    assert [paper.slug for paper in papers.find("nrr-dd")] == ["nrr-dd"]  # the slug
    assert [paper.slug for paper in papers.find("knowledge graph triples")] == ["nfe"]  # what it takes
    assert [paper.slug for paper in papers.find("nearest training rows")] == ["sdm"]  # what it gives
    assert [paper.slug for paper in papers.find("textual inversion")] == ["neti"]  # its claim
    assert papers.find("importance nosuchword") == []


def test_find_by_unit() -> None:
    assert [paper.slug for paper in papers.find(unit="task")] == ["lasso-task-selection"]
    assert {paper.room for paper in papers.find(unit="token")} == {"tokens"}
    everywhere, tokens = papers.find("text"), papers.find("text", unit="token")
    assert tokens == [paper for paper in everywhere if paper.unit == "token"]
    assert 0 < len(tokens) < len(everywhere)
    with pytest.raises(InputError, match=r"unit='tokn' is not a unit of the catalogue; nearest names: 'token'"):
        papers.find("text", unit="tokn")


def test_load_gives_a_dictionary_of_ones_own() -> None:
    papers.load().clear()
    assert len(papers.load()) == 62 and papers.load()["dsir"] is papers.get("dsir")


@pytest.mark.parametrize(("paper", "entry"), ENTRIES, ids=[entry for _, entry in ENTRIES])
def test_entries_import(paper: Paper, entry: str) -> None:
    for package in PACKAGES[paper.extra]:
        pytest.importorskip(package)
    module, name = entry.split(":")
    assert hasattr(importlib.import_module(module), name), f"{paper.slug}: {module} has no {name}"


def test_base_entries_and_the_catalogue_need_no_torch() -> None:
    entries = [entry.split(":") for paper, entry in ENTRIES if paper.extra == "base"]
    code = (
        "import importlib, sys\n"
        "from salience import papers\n"
        "assert len(papers.load()) == 62\n"
        "heavy = {'numpy', 'scipy', 'sklearn', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"for module, name in {entries!r}:\n"
        "    getattr(importlib.import_module(module), name)\n"
        "    heavy = {'torch', 'transformers', 'captum'} & set(sys.modules)\n"
        "    assert not heavy, (module, name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
