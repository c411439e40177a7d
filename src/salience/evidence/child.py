"""The process in which one reproduction runs: ``python -m salience.evidence.child`` (see `runner`).

It hands its results over in a file, so whatever a script prints does no harm. It writes that file after each
seed, so a process that dies loses only the seed it was at.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import random
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from salience import __version__
from salience._lazy import missing_extra
from salience.errors import InputError, MissingExtra
from salience.evidence import store
from salience.evidence.outcome import Outcome
from salience.evidence.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DISTRIBUTIONS = {
    "captum": "captum", "diffusers": "diffusers", "numba": "numba", "peft": "peft", "pyarrow": "pyarrow",
    "scipy": "scipy", "sklearn": "scikit-learn", "torch": "torch", "transformers": "transformers",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one reproduction at each seed and write ``SLUG.json``, and ``SLUG.html`` with ``--page``."""
    parser = argparse.ArgumentParser(prog="salience.evidence.child")
    parser.add_argument("slug")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args(arguments)

    evidence = store.Evidence(args.slug, args.scale, args.seeds[0], {}, own_data=args.data is not None)
    pictures: dict[str, Figure] = {}
    for seed in args.seeds:
        result = _run_seed(args.slug, seed, args.scale, args.data, args.folder, evidence)
        if not pictures and result.outcome is not None:
            pictures = {f"{caption} (seed {seed})": figure for caption, figure in result.outcome.pictures.items()}
        evidence = replace(evidence, runs={**evidence.runs, seed: result}, versions=versions())
        store.write(evidence, args.folder)
    if args.page:
        from salience.evidence.page import write_page

        kept = store.read(args.slug, args.folder)  # judged on the rounded figures, as anyone will read them
        assert kept is not None
        write_page(kept, pictures, args.folder / f"{args.slug}.html")


def versions() -> dict[str, str]:
    """Versions of Python, salience, and those of the large packages that are loaded."""
    loaded = {name for module, name in _DISTRIBUTIONS.items() if module in sys.modules} | {"numpy"}
    packages = {name: importlib.metadata.version(name) for name in sorted(loaded)}
    return {"python": platform.python_version(), "salience": __version__, **packages}


def _run_seed(
    slug: str, seed: int, scale: store.Scale, data: Path | None, folder: Path, before: store.Evidence
) -> store.SeedRun:
    console = Console(stderr=True, highlight=False, markup=False)

    def progress(message: str) -> None:
        if console.is_terminal:
            console.print(f"{slug}, seed {seed}: {message}", style="dim")

    scratch = folder / f"seed-{seed}"
    scratch.mkdir()
    progress("starts")
    started = time.monotonic()
    try:
        script = importlib.import_module(f"salience.reproductions.{slug.replace('-', '_')}")
        _seed_globals(seed)
        run = Run(seed, scale, data, progress=progress, scratch=scratch, master=seed == before.master)
        outcome = _checked(script.reproduce(run), before)
    except (Exception, SystemExit) as error:
        minutes = (time.monotonic() - started) / 60
        extra = missing_extra(error, slug) if isinstance(error, ModuleNotFoundError) else None
        if extra is not None or isinstance(error, MissingExtra):
            return store.SeedRun(minutes, error=str(extra or error))
        last = traceback.format_exception_only(error)[-1].strip()
        return store.SeedRun(minutes, error=last, traceback=_without_folders(traceback.format_exc()))
    return store.SeedRun((time.monotonic() - started) / 60, outcome)


def _checked(outcome: object, before: store.Evidence) -> Outcome:
    if not isinstance(outcome, Outcome):
        raise InputError(f"reproduce(run) returned {type(outcome).__name__}; it must return an Outcome")
    for other in before.measured:
        if (other.claim, other.level) != (outcome.claim, outcome.level):
            raise InputError("the outcome's claim or level differs from that of an earlier seed")
    return outcome


def _seed_globals(seed: int) -> None:
    # a library that draws from a global generator behind the script's back then still repeats itself
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _without_folders(text: str) -> str:
    # outcomes are published: they name files below the packages, not where this machine keeps those
    for folder in sorted(map(str, map(Path, filter(None, sys.path))), key=len, reverse=True):
        text = text.replace(f"{folder}/", "").replace(f"{folder}\\", "")
    return text


if __name__ == "__main__":
    main()
