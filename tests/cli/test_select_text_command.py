"""`salience select text`: exit codes, one sentence for each failure, and nothing hostile on a terminal or a page."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

import salience
from salience.data import text_stages
from salience.io import RecordWriter
from salience.scores import Scores

WORDS = [
    "wave",
    "tide",
    "harbour",
    "anchor",
    "sail",
    "reef",
    "gull",
    "salt",
    "net",
    "mast",
    "rope",
    "storm",
    "fish",
    "deck",
    "captain",
]
OTHERS = [
    "court",
    "judge",
    "statute",
    "appeal",
    "clause",
    "ruling",
    "party",
    "claim",
    "contract",
    "duty",
    "witness",
    "motion",
    "brief",
]
HOSTILE = "<script>alert('{}')</script>"


def document(words: list[str], number: int) -> str:
    return " ".join(random.Random(number).choices(words, k=24))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``raw.jsonl`` (600 documents, 120 like the target) and ``target.jsonl`` (200), in the current folder."""
    raw = [document(OTHERS if number % 5 else WORDS, number) for number in range(600)]
    for name, texts in (("raw", raw), ("target", [document(WORDS, number) for number in range(600, 800)])):
        lines = [json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


BASE = ["raw.jsonl", "--target", "target.jsonl", "--out", "out.jsonl"]
SMALL = ["--buckets", "200", "--min-tokens", "5", "--smoothing", "1", "--workers", "1"]


@pytest.fixture
def run(folder: Path, salience):
    return partial(salience, "select", "text")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


BEFORE = ["raw.jsonl", "target.jsonl"]


# --- what it does -------------------------------------------------------------------------------------------


def test_it_says_first_whether_it_helped_then_accounts_for_every_record(run, folder: Path) -> None:
    code, out, err = run(*BASE, *SMALL, "--count", "60")
    assert code == 0 and err == ""
    assert out.startswith("Closer to your held-out target than random: KL reduction")
    assert "600 records read = 60 selected + 540 not selected + 0 too short + 0 blank + 0 quarantined" in out
    assert "written: out.jsonl" in out and "out.jsonl.report.html" in out
    assert names(folder) == ["out.jsonl", "out.jsonl.manifest.json", "out.jsonl.report.html", *BEFORE]
    raw = (folder / "raw.jsonl").read_text().splitlines()
    chosen = (folder / "out.jsonl").read_text().splitlines()
    assert len(set(chosen)) == 60 and set(chosen) <= set(raw)
    page = (folder / "out.jsonl.report.html").read_text()
    assert "better than random" in page and "60 selected" in page


def test_no_better_than_random_is_said_as_plainly(run) -> None:
    code, out, _ = run(*BASE, *SMALL[:4], "--count", "60", "--method", "random")
    assert code == 0 and out.startswith("No better than random here")


def test_json_is_json_on_stdout(run, folder: Path) -> None:
    with open(folder / "raw.jsonl", "a") as file:
        file.write("\n{\n")
    code, out, _ = run(*BASE, *SMALL, "--count", "60", "--max-bad", "0.1", "--json")
    data = json.loads(out)
    assert code == 0 and data["proof"]["better"] is True and data["out"] == "out.jsonl"
    counts = {"read": 602, "selected": 60, "not_selected": 540, "too_short": 0, "blank": 1, "quarantined": 1}
    assert {name: data[name] for name in counts} == counts
    assert data["report"] == "out.jsonl.report.html" and "--buckets" not in str(data["warnings"])


def test_warnings_go_to_stderr(run, folder: Path) -> None:
    (folder / "target.jsonl").write_text(json.dumps({"text": document(WORDS, 3)}) + "\n")
    code, out, err = run(*BASE, "--count", "5", "--min-tokens", "5")
    assert code == 0 and "note: the target is too small to hold a part of it out" in err
    assert "note: the target has only" in err and "note" not in out


def test_dry_run_writes_nothing(run, folder: Path) -> None:
    code, out, _ = run(*BASE, *SMALL, "--count", "60", "--dry-run")
    assert code == 0 and out.endswith("nothing was written\n") and "1 files" in out
    code, out, _ = run(*BASE, *SMALL, "--fraction", "0.2", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["raw_bytes"] == (folder / "raw.jsonl").stat().st_size
    assert plan["seconds"] > 0 and plan["peak_bytes"] > 0 and plan["units"] == 1
    assert names(folder) == BEFORE


def test_scores_only_and_back(run, folder: Path) -> None:
    hold_out = ["--hold-out", "0"]
    code, out, _ = run(*BASE[:-1], "scored", *SMALL, "--scores-only", *hold_out)
    assert code == 0 and "600 records read = 600 weighed + 0 blank + 0 quarantined" in out
    assert len(Scores.load(folder / "scored" / "scores.parquet")) == 600
    code, out, _ = run(*BASE[:-1], "scored", *SMALL, "--scores-only", *hold_out, "--json", "--overwrite")
    counts = {"read": 600, "documents": 600, "blank": 0, "quarantined": 0}
    assert code == 0 and json.loads(out) == {"out": "scored", **counts}
    assert names(folder) == sorted([*BEFORE, "scored"])
    assert run(*BASE, *SMALL[:4], "--count", "60", "--scores", "scored/scores.parquet", *hold_out)[0] == 0
    assert run(*BASE[:-1], "direct.jsonl", *SMALL, "--count", "60", *hold_out)[0] == 0
    assert (folder / "out.jsonl").read_bytes() == (folder / "direct.jsonl").read_bytes()


def test_one_scoring_pass_serves_many_selections(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice, and what is measured of it, are those of a run of its own; nothing is weighed again."""
    assert run(*BASE[:-1], "scored", *SMALL[:4], "--scores-only")[0] == 0
    direct = {}
    for count, method in (("60", "dsir"), ("35", "heuristic"), ("20", "random")):
        options = [*SMALL[:4], "--count", count, "--method", method, "--json", "--overwrite"]
        direct[method] = json.loads(run(*BASE, *options)[1]), (folder / "out.jsonl").read_bytes(), options

    def never(self: object, unit: object) -> None:
        raise AssertionError("weighed again")

    monkeypatch.setattr(text_stages.Weigh, "__call__", never)
    monkeypatch.setattr(text_stages.CountRaw, "__call__", never)
    for told, chosen, options in direct.values():
        code, out, _ = run(*BASE, *options, "--from-scores", "scored")
        assert code == 0 and json.loads(out)["proof"] == told["proof"]
        assert (folder / "out.jsonl").read_bytes() == chosen
    code, _, err = run(
        *BASE, "--count", "60", "--min-tokens", "5", "--buckets", "300", "--from-scores", "scored", "--overwrite"
    )
    assert code == 2 and "num_buckets was 200 and is 300" in err and one_sentence(err)
    assert run(*BASE, *SMALL, "--count", "6", "--from-scores", "absent", "--overwrite")[0] == 2


def test_resume_of_what_is_complete_does_nothing(run, folder: Path) -> None:
    options = [*SMALL, "--count", "60"]
    assert run(*BASE, *options, "--resume")[0] == 0  # nothing to resume: a run like any other
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, out, _ = run(*BASE, *options, "--resume")
    assert code == 0 and "out.jsonl is complete already" in out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert json.loads(run(*BASE, *options, "--resume", "--json")[1])["already_complete"] is True
    code, _, err = run(*BASE, *SMALL, "--count", "61", "--resume")
    assert code == 2 and "choice count was 60 and is 61" in err and one_sentence(err)
    text = (folder / "raw.jsonl").read_text()
    (folder / "raw.jsonl").write_text(text.replace("a", "b", 1))
    code, _, err = run(*BASE, *options, "--resume")
    assert code == 2 and "the bytes of raw" in err and one_sentence(err)
    assert run(*BASE, *options, "--resume", "--overwrite")[0] == 2


def test_overwrite_replaces_all_of_it(run, folder: Path) -> None:
    with open(folder / "raw.jsonl", "a") as file:
        file.write("{\n")
    assert run(*BASE, *SMALL, "--count", "60", "--max-bad", "0.1")[0] == 0
    assert (folder / "out.jsonl.quarantine.jsonl").exists()
    raw = (folder / "raw.jsonl").read_text().splitlines(keepends=True)
    (folder / "raw.jsonl").write_text("".join(raw[:-1]))
    assert run(*BASE, *SMALL, "--count", "10", "--max-bad", "0.1", "--overwrite")[0] == 0
    assert names(folder) == ["out.jsonl", "out.jsonl.manifest.json", "out.jsonl.report.html", *BEFORE]
    assert json.loads((folder / "out.jsonl.manifest.json").read_text())["counts"]["selected"] == 10


def test_help_shows_examples_and_whose_options_are_whose(run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "salience select text raw/*.jsonl --target mine.jsonl --count 50000 -o chosen.jsonl" in out
    own = out[out.index("Options of dsir alone") :]
    assert "--smoothing" in own and "--proportions" in own and "--separate-targets" in own
    assert "--top-k" not in own.split("╰")[0] and "Exit codes" in out


# --- exit codes ---------------------------------------------------------------------------------------------


def one_sentence(err: str) -> bool:
    return err.startswith("salience: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give either --count or --fraction"),
        (["--count", "5", "--fraction", "0.1"], 2, "give either --count or --fraction"),
        (["--count", "0"], 2, "count must be at least 1, not 0"),
        (["--count", "601", "--min-tokens", "5"], 2, "count 601 is more than the 600 eligible documents"),
        (["--count", "5", "--min-tokens", "25"], 2, "the 0 eligible documents (of at least 25 tokens, of 600"),
        (["--fraction", "1.5"], 2, "fraction must lie in (0, 1], not 1.5"),
        (["--count", "5", "--hold-out", "0.7"], 2, "hold_out must lie in 0..0.5"),
        (["--count", "5", "--buckets", "0"], 2, "num_buckets must lie in"),
        (["--count", "5", "--workers", "0"], 2, "workers must be at least 1"),
        (["--count", "5", "--smoothing", "nan"], 2, "smoothing must be a finite number"),
        (["--count", "5", "--target", "absent.jsonl"], 2, "input absent.jsonl does not exist"),
        (["--count", "5", "--out", "absent/out.jsonl"], 2, "absent does not exist"),
        (["--count", "5", "--out", "out.docx"], 2, "output out.docx has an unknown ending"),
        (["--count", "5", "--out", "out.parquet"], 2, "cannot take jsonl records"),
        (["--count", "5", "--out", "raw.jsonl"], 2, "raw.jsonl exists"),
        (["--count", "5", "--out", "raw.jsonl", "--overwrite"], 2, "raw.jsonl is one of the inputs"),
        (["--count", "5", "--report", "out.jsonl"], 2, "--report must name a file that ends in .html"),
        (["--count", "5", "--report", "absent/page.html"], 2, "in a folder that exists"),
        (["--count", "5", "--method", "random", "--smoothing", "1"], 2, "--smoothing belongs to --method dsir alone"),
        (["--count", "5", "--method", "heuristic", "--separate-targets"], 2, "--separate-targets belongs to"),
        (["--count", "5", "--method", "random", "--proportions", "1"], 2, "--proportions belongs to"),
        (["--count", "5", "--scores", "s.parquet", "--smoothing", "1"], 2, "--smoothing belongs to"),
        (["--count", "5", "--method", "random", "--top-k"], 2, "--top-k means nothing for --method random"),
        (["--count", "5", "--scores", "s.parquet", "--method", "random"], 2, "--scores replaces the method"),
        (["--count", "5", "--scores-only"], 2, "--scores-only chooses nothing"),
        (["--scores-only", "--out", "scored", "--method", "random"], 2, "leave --method and --top-k out"),
        (["--scores-only", "--out", "absent/scored"], 2, "absent does not exist"),
        (["--count", "5", "--ray-address", "auto"], 2, "--ray-address needs --engine ray"),
        (["--count", "5", "--proportions", "1"], 2, "needs separate_targets"),
        (["--count", "5", "--separate-targets", "--proportions", "1,2"], 2, "has 2 entries for 1 targets"),
        (["--count", "5", "--separate-targets", "--proportions", "1,x"], 2, "numbers with commas between, not '1,x'"),
        (["--count", "5", "--scores", "absent.parquet"], 3, "absent.parquet is not a readable Scores file"),
        (["--count", "5", "--text-column", "txt"], 3, "no field 'txt' (nearest names: 'text'"),
        (["--count", "5", "--target", "empty.jsonl"], 4, "empty.jsonl is empty"),
    ],
)  # fmt: skip
def test_failures_exit_with_their_code_and_one_sentence(
    run, folder: Path, arguments: list[str], code: int, said: str
) -> None:
    (folder / "empty.jsonl").touch()
    got, out, err = run(*BASE, *arguments)
    assert (got, said in err) == (code, True), err
    assert one_sentence(err) and out == ""
    assert names(folder) == ["empty.jsonl", *BEFORE]


def test_every_method_but_kmq_needs_a_target(run, folder: Path) -> None:
    code, out, err = run("raw.jsonl", "--count", "5", "-o", "out.jsonl")
    assert (code, out) == (2, "") and "--target is missing" in err and not Path("out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["raw.jsonl", "--count", "5"], "--out"),
        ([*BASE, "--count", "many"], "--count"),
        ([*BASE, "--count", "5", "--method", "dsri"], "dsri"),
        ([*BASE, "--cuont", "5"], "--cuont"),
    ],
)
def test_usage_errors_exit_2(run, folder: Path, arguments: list[str], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and said in err and "Usage: salience select text" in err and "Traceback" not in err
    assert names(folder) == BEFORE


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("{", 3, "9 of 609 records of the raw corpus are bad (1.5%, more than --max-bad 1.0%): 9 x not JSON"),
        ('{"text": null}', 3, "raw.jsonl at "),
    ],
)
def test_bad_data_exits_3(run, folder: Path, line: str, code: int, said: str) -> None:
    with open(folder / "raw.jsonl", "a") as file:
        file.write(f"{line}\n" * 9)
    for strict in ([], ["--strict", "--max-bad", "1"]):
        got, _, err = run(*BASE, *SMALL, "--count", "5", *strict)
        assert got == code and one_sentence(err) and (said in err or strict) and names(folder) == BEFORE
    assert "bad record in" in err
    code, out, _ = run(*BASE, *SMALL, "--count", "5", "--max-bad", "0.02")
    assert code == 0 and "9 quarantined" in out and "unreadable records: out.jsonl.quarantine.jsonl" in out
    quarantined = [json.loads(line) for line in Path("out.jsonl.quarantine.jsonl").read_text().splitlines()]
    assert [record["raw"] for record in quarantined] == [line] * 9 and quarantined[0]["offset"] > 0


KEPT = "finished units are kept: the same command with --resume goes on from there\n"


def test_a_full_disk_exits_1_with_a_clear_sentence(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RecordWriter, records: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.jsonl")

    monkeypatch.setattr(RecordWriter, "write", full)
    code, _, err = run(*BASE, *SMALL, "--count", "5")
    assert (code, err) == (1, f"{KEPT}salience: No space left on device (out.jsonl)\n")
    assert names(folder) == [".out.jsonl.ledger", *BEFORE]


@pytest.mark.parametrize("error", [KeyboardInterrupt])
def test_an_interrupt_exits_130_and_leaves_nothing(run, folder: Path, monkeypatch, error: type[BaseException]) -> None:
    def stop(self: RecordWriter, records: object) -> int:
        raise error

    monkeypatch.setattr(RecordWriter, "write", stop)
    code, _, err = run(*BASE, *SMALL, "--count", "5")
    assert (code, err) == (130, f"{KEPT}salience: interrupted; no unfinished output was left\n")
    assert names(folder) == [".out.jsonl.ledger", *BEFORE]


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "salience", "select", "text", "absent.jsonl", *BASE[1:], "--count", "5"]
    monkeypatch.setenv("PYTHONPATH", str(Path(salience.__file__).parents[1]))
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 2 and one_sentence(plain.stderr)
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "absent.jsonl does not exist" in debug.stderr


# --- hostile names and texts --------------------------------------------------------------------------------


class Page(HTMLParser):
    """Collect what a page would run or load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.active = "", []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.active += [value for name, value in attributes if name.startswith("on") or "alert(" in str(value)]

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lasttag == "script":
            self.active += [data] if "alert(" in data else []


def test_markup_in_documents_and_names_is_shown_not_run(run, folder: Path) -> None:
    name = HOSTILE.format("name").replace("/", "")  # a name cannot hold a slash
    text = HOSTILE.format("text") + ' <img src=x onerror="alert(1)">'
    lines = [json.loads(line)["text"] for line in (folder / "raw.jsonl").read_text().splitlines()]
    hostile = [json.dumps({"text": f"{text} {document(WORDS, n)}"}) + "\n" for n in range(30)]
    with open(folder / "target.jsonl", "a") as file:
        file.writelines(json.dumps({"text": f"{text} {document(WORDS, n)}"}) + "\n" for n in range(300, 330))
    (folder / "pool").mkdir()
    (folder / "pool" / f"{name}.jsonl").write_text("".join(hostile))
    (folder / "pool" / "other.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    out = f"{name} out.jsonl"
    code, _, _ = run("pool", *BASE[1:3], "--out", out, *SMALL, "--count", "60")
    page = Page((folder / f"{out}.report.html").read_text())
    assert code == 0 and page.active == []
    assert text in page.text and f"{name}.jsonl" in page.text and f"Selected text: {out}" in page.text


def test_control_characters_are_never_printed_raw(run, folder: Path) -> None:
    evil = "a\x1b]0;owned\x07\x1b[31m\x08b"
    code, out, err = run(*BASE[:-1], f"{evil}.jsonl", *SMALL, "--count", "5")
    assert code == 0 and f"written: {repr(evil)[1:-1]}.jsonl" in out
    with open(folder / f"{evil}.jsonl", "a") as file:
        file.write("{\n" * 9)
    printed = [out + err]
    for arguments in (
        [f"{evil}.jsonl", *BASE[1:], *SMALL, "--count", "5"],  # bad records, told with the name of their file
        [evil, *BASE[1:], "--count", "5"],
        [*BASE, "--count", "5", "--text-column", evil],
        [*BASE, "--count", "5", "--proportions", evil, "--separate-targets"],
        [*BASE, "--count", "5", "--scores", evil],
        [*BASE, "--count", evil],
        [*BASE, "--count", "5", "--method", evil],
        [*BASE, "--count", "5", f"--{evil}"],
    ):
        code, out, err = run(*arguments)
        assert code in (2, 3)
        printed.append(out + err)
    for text in printed:
        assert [c for c in text if not c.isprintable() and c != "\n"] == [], repr(text)


def test_a_field_name_with_control_characters_is_told_safely(run, folder: Path) -> None:
    (folder / "raw.jsonl").write_text(json.dumps({"te\x1b[31mxt": "a"}) + "\n")
    code, _, err = run(*BASE, "--count", "1")
    assert code == 3 and "\x1b" not in err and "te\\x1b[31mxt" in err


def test_file_names_that_are_not_unicode_are_refused(run, folder: Path) -> None:
    os.link("raw.jsonl", b"raw\xff.jsonl")
    for arguments in (["raw\udcff.jsonl", *BASE[1:]], [*BASE[:-1], "out\udcff.jsonl"]):
        code, _, err = run(*arguments, "--count", "5")
        assert code == 2 and one_sentence(err) and "\\udcff.jsonl has a name that is not UTF-8" in err
