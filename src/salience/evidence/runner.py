"""Run reproductions, each in a process of its own: one that crashes fails alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from salience import papers
from salience.errors import DataError, InputError, NothingToDo
from salience.evidence import store
from salience.evidence.child import versions
from salience.evidence.page import write_page
from salience.evidence.run import Scale
from salience.evidence.sources import script_of, source_hash
from salience.papers import Paper

_CHILD = [sys.executable, "-P", "-m", "salience.evidence.child"]
_ONE_THREAD = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA", "VECLIB")
_MOST_MINUTES = 3.0  # what a seed may take at desk scale: assumed where the catalogue declares nothing
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Reproduced:
    """What was run, by slug, and what was not, with the reason."""

    done: dict[str, store.Evidence] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def reproduce(
    slugs: Sequence[str],
    seeds: Sequence[int] = store.JUDGING_SEEDS,
    scale: Scale = "desk",
    *,
    data: Path | None = None,
    jobs: int = 1,
    out: Path | None = None,
    budget: float | None = None,
    on_done: Callable[[store.Evidence], None] | None = None,
) -> Reproduced:
    """Run the reproductions of papers, cheapest first, and keep their outcomes.

    Parameters
    ----------
    slugs : sequence of str
        Papers of the catalogue.
    seeds : sequence of int
        The first is the master seed, at which bars with ``once=True`` are judged.
    scale : {"smoke", "desk", "full"}
    data : Path, optional
        Folder with the user's data, for scripts that take it.
    jobs : int
        How many run at once, each on one thread.
    out : Path, optional
        Folder for ``SLUG.json`` and the page ``SLUG.html``; by default that of the user's own outcomes. An
        earlier outcome there is replaced. The package's own folder of outcomes gets no pages.
    budget : float, optional
        Minutes: a reproduction whose declared time no longer fits is skipped.
    on_done : callable, optional
        Takes each `Evidence` as it comes.

    Raises
    ------
    InputError
        If a slug is unknown or a parameter is out of range.
    NothingToDo
        If none of the papers has a reproduction that fits.
    """
    seeds = list(dict.fromkeys(seeds))
    out = store.own_outcomes() if out is None else out
    ours = out.resolve() == store.OUTCOMES.resolve()
    _check(seeds, scale, data, jobs, ours)
    chosen = sorted(
        (papers.get(slug) for slug in dict.fromkeys(slugs)), key=lambda paper: (_minutes(paper), paper.slug)
    )
    skipped = {paper.slug: why for paper in chosen if (why := unready(paper))}
    waiting = [paper for paper in chosen if paper.slug not in skipped]
    done: dict[str, store.Evidence] = {}
    running: list[_Child] = []
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                paper = waiting.pop(0)
                spent = (time.monotonic() - started) / 60
                needed = _minutes(paper) * len(seeds)
                if budget is not None and spent + needed > budget:
                    skipped[paper.slug] = f"needs about {needed:g} minutes, more than the budget leaves"
                    continue
                running.append(_Child(paper, seeds, scale, data, page=not ours))
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                done[child.paper.slug] = evidence = child.collect(out)
                if on_done is not None:
                    on_done(evidence)
            time.sleep(_POLL_SECONDS if running else 0)
    finally:
        _stop(running)
    if not done:
        raise NothingToDo(
            "nothing to run: " + ("; ".join(f"{slug} {why}" for slug, why in skipped.items()) or "no paper")
        )
    return Reproduced(done, skipped)


def unready(paper: Paper) -> str | None:
    """Why `paper` cannot be reproduced yet; None if it can."""
    if not paper.entry:
        return "is planned: its method is not part of salience yet"
    if not script_of(paper.slug).exists():
        return "has no reproduction yet"
    return None


def _minutes(paper: Paper) -> float:
    return paper.minutes or _MOST_MINUTES


class _Child:
    """A running reproduction and its temporary folder."""

    def __init__(self, paper: Paper, seeds: list[int], scale: Scale, data: Path | None, page: bool) -> None:
        self.paper, self.seeds, self.scale, self.data, self.page = paper, seeds, scale, data, page
        self.source_hash = source_hash(paper)
        self.scratch = tempfile.TemporaryDirectory(prefix=f"salience-{paper.slug}-", ignore_cleanup_errors=True)
        self.folder = Path(self.scratch.name)
        self.started = time.monotonic()
        command = [*_CHILD, paper.slug, str(self.folder), "--scale", scale, "--seeds", *map(str, seeds)]
        command += ["--data", str(data)] if data else []
        command += ["--page"] if page else []
        one_thread = {f"{library}_NUM_THREADS": "1" for library in _ONE_THREAD}
        quiet = {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **one_thread, **quiet, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a script prints must not mix with this command's own output
            start_new_session=True,  # Ctrl-C reaches this process, which then stops the child
        )

    def collect(self, out: Path) -> store.Evidence:
        """Take over what the finished process left, and write it to `out`."""
        evidence = store.read(self.paper.slug, self.folder) or store.Evidence(
            self.paper.slug, self.scale, self.seeds[0], {}, versions(), own_data=self.data is not None
        )
        lost = store.SeedRun((time.monotonic() - self.started) / 60, error=_ended(self.process.returncode))
        runs = {seed: evidence.runs.get(seed, lost) for seed in self.seeds}
        evidence = replace(evidence, runs=runs, source_hash=self.source_hash)
        store.write(evidence, out)
        if self.page:
            self._keep_page(evidence, out)
        self.scratch.cleanup()
        return evidence

    def _keep_page(self, evidence: store.Evidence, out: Path) -> None:
        page = self.folder / f"{self.paper.slug}.html"
        if not page.exists():  # the process died, or could not draw the script's pictures
            write_page(evidence, {}, page)
        partial = out / f".{page.name}.{os.getpid()}.tmp"
        partial.write_bytes(page.read_bytes())
        os.replace(partial, out / page.name)


def _check(seeds: list[int], scale: Scale, data: Path | None, jobs: int, ours: bool) -> None:
    if not seeds:
        raise InputError("seeds is empty; give at least one")
    if min(seeds) < 0:
        raise InputError(f"seed is {min(seeds)}; give 0 or a positive integer")
    if jobs < 1:
        raise InputError(f"jobs is {jobs}; give at least 1")
    if data is not None and not data.is_dir():
        raise DataError(f"{data}: not a folder; --data takes the folder that holds the data")
    if ours and scale == "smoke":
        raise InputError("a smoke run judges no bar, so it cannot replace salience's own outcomes: give another folder")


def _ended(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code} before this seed was done"
    name = signal.Signals(-code).name
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"


def _stop(running: list[_Child]) -> None:
    for child in running:
        _signal(child.process, signal.SIGTERM)
    for child in running:
        try:
            child.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal(child.process, getattr(signal, "SIGKILL", signal.SIGTERM))
            child.process.wait()
        child.scratch.cleanup()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, number)  # its session's group, so processes that a script started go too
    else:
        process.terminate()
