from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from salience.errors import InputError
from salience.evidence import Bar, Control, NoControl, Outcome, judge, judge_all

Toy = Callable[..., Outcome]
RANDOM, FAKE = Control("shuffled", "random", {"gain": 0.0}), Control("lexical", "fake", {"gain": 0.0})


def outcome(**changed: Any) -> Outcome:
    fields: dict[str, Any] = dict(
        claim="it helps",
        level="claim",
        figures={"gain": 0.6, "random": 0.25},
        bars=[Bar("gain", at_least=0.5)],
        controls=[RANDOM, FAKE],
    )
    return Outcome(**{**fields, **changed})


@pytest.mark.parametrize(
    ("bar", "value", "holds"),
    [
        (Bar("gain", at_least=0.5), 0.5, True),
        (Bar("gain", at_least=0.5), 0.499, False),
        (Bar("gain", at_least=0.0), -0.001, False),
        (Bar("gain", at_most=0.5), 0.5, True),
        (Bar("gain", at_most=0.5), 0.501, False),
        (Bar("gain", at_most=0.0), 0.001, False),
        (Bar("gain", at_least=0.1, at_most=0.2), 0.3, False),
        (Bar("gain", above="random"), 0.26, True),
        (Bar("gain", above="random"), 0.25, False),
        (Bar("gain", at_least=0.5, above="random"), 0.3, False),
        (Bar("gain", at_most=9.0), math.nan, False),
        (Bar("gain", at_most=9.0), -math.inf, False),
        (Bar("gain", above="random"), math.inf, False),
        (Bar("gain", above="absent"), 0.9, False),
    ],
)
def test_bar_holds_exactly_at_its_limit(bar: Bar, value: float, holds: bool) -> None:
    assert bar.holds({"gain": value, "random": 0.25}) is holds


def test_bar_never_holds_on_what_is_missing_or_nan() -> None:
    assert not Bar("gain", at_most=1.0).holds({})
    assert not Bar("gain", above="random").holds({"gain": 1.0, "random": math.nan})


def test_bar_reads_as_its_rule() -> None:
    bar = Bar("gain", at_least=0.5, at_most=2, above="random", once=True)
    assert str(bar) == "gain >= 0.5 and <= 2 and > random (once)"


@pytest.mark.parametrize(
    "limits", [{}, {"at_least": math.nan}, {"at_most": math.inf}, {"above": "gain"}, {"at_least": "0.5"}]
)
def test_bar_refuses_limits_that_decide_nothing(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="gain"):
        Bar("gain", **limits)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bars": [Bar("gains", at_least=0.5)]}, "'gains'; nearest names: 'gain'"),
        ({"bars": [Bar("gain", above="rand")]}, "'rand'"),
        ({"bars": []}, "no bars"),
        ({"level": "desk"}, "'mechanism', 'claim', 'paper'"),
        ({"claim": " "}, "claim is empty"),
        ({"figures": {"gain": "0.6"}}, "'gain' of the outcome is '0.6'"),
        ({"figures": {"gain": True}}, "bool"),
        ({"figures": {"gain": 1 + 2j}}, "complex"),
        ({"figures": {"gain": math.inf}}, "infinite"),
        ({"controls": []}, "'random' or 'fake'"),
        ({"controls": [RANDOM]}, "no control of kind 'fake'"),
        ({"controls": [FAKE]}, "no control of kind 'random'"),
        ({"controls": [RANDOM, Control("x", "fake", {"other": 0.0})]}, "'other'"),
        ({"controls": [RANDOM, Control("x", "fake", {"random": 0.0})]}, "none of the figures"),
        ({"controls": [RANDOM, Control("x", "fake", {})]}, "none of the figures"),
        ({"intervals": {"gain": (0.7, 0.5)}}, "(low, high)"),
        ({"intervals": {"gian": (0.5, 0.7)}}, "'gian'"),
    ],
)
def test_outcome_refuses(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        outcome(**changed)
    assert said in str(error.value)


def test_outcome_takes_a_reason_for_no_control_and_plain_floats_of_numpy_numbers() -> None:
    made = outcome(figures={"gain": np.float32(0.5), "random": np.int64(1)}, controls=[NoControl("no scores")])
    assert made.figures == {"gain": 0.5, "random": 1.0}
    assert all(type(value) is float for value in made.figures.values())
    with pytest.raises(InputError, match="reason"):
        NoControl(" ")
    with pytest.raises(InputError, match="'random', 'fake'"):
        Control("x", "real", {"gain": 0.0})  # type: ignore[arg-type]


def test_judge_wants_every_bar_held_and_every_control_missed(toy_outcome: Toy) -> None:
    assert judge(toy_outcome(), master=True).shown
    assert judge(toy_outcome(gain=0.4), master=True).reasons == ("missed: gain >= 0.5 and > random",)
    passed = judge(toy_outcome(p_value=0.01, fake=0.55), master=True)
    assert passed.reasons == ("the fake control 'lexical' meets every bar",)
    assert not passed.shown
    assert not judge(toy_outcome(gain=math.nan), master=True).shown


def test_once_bars_are_judged_at_the_master_seed_only(toy_outcome: Toy) -> None:
    assert not judge(toy_outcome(p_value=0.5), master=True).shown
    assert judge(toy_outcome(p_value=0.5), master=False).shown


def test_a_control_misses_only_through_what_was_measured_for_it(toy_outcome: Toy) -> None:
    # NaN is no measurement, so it is no miss
    assert not judge(toy_outcome(fake=math.nan), master=True).shown
    # the p-value of the control is not given, so the missed p-value of the method is no miss of the control
    assert "the fake control 'lexical' meets every bar" in judge(toy_outcome(p_value=0.5, fake=0.6), True).reasons
    # a baseline that a control replaces counts as measured
    bars, figures = [Bar("gain", above="random")], {"gain": 0.6, "random": 0.25}
    assert not Control("x", "fake", {"random": 0.7}).passes(bars, figures)
    assert Control("x", "fake", {"random": 0.5}).passes(bars, figures)


def test_a_control_of_once_figures_is_asked_at_the_master_seed_only() -> None:
    made = outcome(
        figures={"gain": 0.6, "p": 0.01},
        bars=[Bar("gain", at_least=0.5), Bar("p", at_most=0.05, once=True)],
        controls=[RANDOM, Control("lexical", "fake", {"p": 0.01})],
    )
    assert not judge(made, master=True).shown
    assert judge(made, master=False).shown


def test_smoke_judges_controls_but_no_bar(toy_outcome: Toy) -> None:
    assert judge(toy_outcome(gain=0.1), master=True, smoke=True).shown
    assert not judge(toy_outcome(gain=0.1, control=0.6), master=True, smoke=True).shown


def test_judge_all_names_the_seed(toy_outcome: Toy) -> None:
    good = toy_outcome()
    assert judge_all({11: good, 12: toy_outcome(p_value=0.9)}, master=11).shown
    assert judge_all({11: good, 12: toy_outcome(gain=0.4)}, 11).reasons == (
        "seed 12: missed: gain >= 0.5 and > random",
    )
    assert judge_all({11: good, 12: None}, 11).reasons == ("seed 12: the run failed",)
    assert not judge_all({12: good}, master=11).shown
    assert not judge_all({}, master=11).shown


def test_judge_all_wants_one_set_of_bars() -> None:
    easier = outcome(bars=[Bar("gain", at_least=0.1)])
    assert judge_all({11: outcome(), 12: easier}, 11).reasons == ("the seeds differ in claim, level or bars",)
