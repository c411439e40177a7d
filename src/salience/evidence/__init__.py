"""Evidence: runs, outcomes, bars, and the verdicts computed from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from salience._lazy import exports

if TYPE_CHECKING:
    from salience.evidence.outcome import Bar, Control, NoControl, Outcome, Verdict, judge, judge_all
    from salience.evidence.run import Run
    from salience.evidence.runner import reproduce
    from salience.evidence.sources import source_hash
    from salience.evidence.store import JUDGING_SEEDS, Evidence, State, state

_WHERE = {
    **dict.fromkeys(("Bar", "Control", "NoControl", "Outcome", "Verdict", "judge", "judge_all"), "outcome"),
    "Run": "run",
    "reproduce": "runner",
    "source_hash": "sources",
    **dict.fromkeys(("JUDGING_SEEDS", "Evidence", "State", "state"), "store"),
}
__all__ = [
    "JUDGING_SEEDS",
    "Bar",
    "Control",
    "Evidence",
    "NoControl",
    "Outcome",
    "Run",
    "State",
    "Verdict",
    "judge",
    "judge_all",
    "reproduce",
    "source_hash",
    "state",
]
__getattr__, __dir__ = exports(__name__, _WHERE)
