"""PIR: steps and their patterns, answer perplexity by direct evaluation, pruning by hand, judges, data sets, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from salience.data import (
    PIR,
    AnswerScorer,
    Judgement,
    Step,
    classify_steps,
    comparator,
    efficiency,
    model_judge,
    pattern_stats,
    prune_steps,
    segment_reasoning,
)
from salience.data.pir.scoring import TooLong
from salience.data.pir.steps import FUNCTIONAL, PATTERNS
from salience.errors import DataError, InputError
from tiny import VOCABULARY, build, state_hash

TRACE = (
    "We need to add 3 and 5. That is 9.\n\nWait, 3 + 5 is 8. So it is 8. Then 8 + 1 is 9.\n\n"
    "Alternatively, 1 + 3 + 5 is 9. This is wrong. No, it is right. Therefore the answer is 9."
)
EXAMPLE = {"id": 7, "question": "What is 3 + 5 + 1?", "reasoning": TRACE, "answer": "9 in all"}


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator([TRACE, "the cat sat on the mat"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def long_model():
    """A Llama that reads more than the tiny one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def steps_of(*patterns_and_scores: tuple[str, float | None], tokens: list[int] | None = None) -> list[Step]:
    return [
        Step(f"step {at}", pattern, pir=score, tokens=tokens[at] if tokens else 10)
        for at, (pattern, score) in enumerate(patterns_and_scores)
    ]


def direct(model, ids: list[int], answer: int) -> float:
    """Mean NLL of the last tokens by one unbatched pass."""
    row = torch.tensor([ids])
    with torch.no_grad():
        log_p = model(input_ids=row).logits.float().log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
    return -float(log_p[-answer:].double().mean())


# Steps


def test_a_functional_marker_opens_a_step_and_a_progressive_one_ends_it() -> None:
    steps = segment_reasoning(TRACE)
    assert steps == [
        "We need to add 3 and 5. That is 9.\n\n", "Wait, 3 + 5 is 8. So it is 8.", " Then 8 + 1 is 9.\n\n",
        "Alternatively, 1 + 3 + 5 is 9.", " This is wrong. No, it is right.", " Therefore the answer is 9.",
    ]  # fmt: skip
    found = classify_steps(steps)
    assert [step.pattern for step in found] == [
        "progressive", "verification", "progressive", "multi_method", "error_correction", "progressive",
    ]  # fmt: skip
    assert [step.marker for step in found] == [
        "We need to",
        "Wait",
        "Then",
        "Alternatively",
        "This is wrong",
        "Therefore",
    ]
    assert [step.relates_to for step in found] == [None, 0, None, 2, 2, None]


def test_at_most_four_sentences_make_a_step() -> None:
    assert [len(step.split(".")) - 1 for step in segment_reasoning("One. Two. Three. Four. Five. Six.")] == [4, 2]
    assert segment_reasoning("Take 3.5 of 7.25 and stop.") == ["Take 3.5 of 7.25 and stop."]


@given(st.text(alphabet=st.sampled_from('aW .!?\n\t"“”`。\0é*'), max_size=60))
def test_the_steps_always_give_the_trace_again(text: str) -> None:
    steps = segment_reasoning(text)
    assert "".join(steps) == text and all(steps)
    assert len(classify_steps(steps)) == len(steps)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Let's solve the equation.", "progressive"), ("Given that x = 2, y = 3.", "progressive"),
        ("Let me double-check the sum.", "verification"), ("Going back to the start, it holds.", "verification"),
        ("Hmm, wait. Is it?", "verification"), ("But wait, no.", "verification"), ("Double-check: 4.", "verification"),
        ("We can use algebra. Another way is to count.", "multi_method"),
        ("Let's try a different approach.", "multi_method"), ("We can also verify it by hand.", "multi_method"),
        ("The mistake was in line 2.", "error_correction"), ("That’s impossible.", "error_correction"),
        ("This contradicts the above.", "error_correction"), ("So I made a mistake there.", "error_correction"),
        # of several markers the first in our order decides
        ("Wait, this is wrong.", "error_correction"), ("Alternatively, let me check by hand.", "multi_method"),
        # what is no marker
        ("He said: \"Wait, I made a mistake.\"", "progressive"), ("Wait times are long.", "progressive"),
        ("They wait, then go.", "progressive"), ("```\nprint('Wait, this is wrong.')\n```", "progressive"),
        ("Call `this is wrong` twice.", "progressive"), ("等一下。这不对。", "progressive"),
    ],
)  # fmt: skip
def test_markers(text: str, pattern: str) -> None:
    [step] = classify_steps([text])
    assert step.pattern == pattern


def test_a_judge_decides_where_there_is_no_marker() -> None:
    asked = []

    def judge(steps, unmarked):
        asked.append(list(unmarked))
        return [Judgement("verification", 0), "progressive"]

    found = classify_steps(["Wait, no.", "3 + 5 is 8 again.", "The sum is 8."], judge)
    assert asked == [[1, 2]]
    assert [(step.pattern, step.relates_to, step.marker) for step in found] == [
        ("verification", None, "Wait"), ("verification", 0, None), ("progressive", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        (
            lambda steps, unmarked: ["verify"],
            "called step 0 'verify', which is no pattern .nearest names: 'verification'",
        ),
        (lambda steps, unmarked: [], "gave 0 judgements for 1 steps"),
        (lambda steps, unmarked: [("verification", 4)], "related step 0 to step 4"),
    ],
)
def test_a_judge_that_errs_is_refused(judge: Callable, told: str) -> None:
    with pytest.raises(DataError, match=told):
        classify_steps(["It is 8."], judge)


def test_a_segmenter_must_drop_nothing() -> None:
    assert segment_reasoning("a b c", lambda text: ["a ", "", "b c"]) == ["a ", "b c"]
    with pytest.raises(DataError, match="differ from character 2 on, 'c' for 'b c'"):
        segment_reasoning("a b c", lambda text: ["a ", "c"])


def test_a_model_as_judge(tokenizer) -> None:
    model = build("llama")
    steps = ["3 + 5 is 8.", "It is 8."]
    found = classify_steps(steps, model_judge_short(model, tokenizer))
    assert all(step.pattern in PATTERNS for step in found)


def model_judge_short(model, tokenizer):
    """The tiny models read 128 positions; Llama's rotate on beyond that."""
    return model_judge(model, tokenizer)


# Scores


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "moe"])
def test_answer_nll_equals_direct_evaluation_on_every_path(family: str, tokenizer) -> None:
    model = build(family)
    before = state_hash(model)
    texts = ["We add 3.", " Wait, no.", " The cat sat.", " Alternatively, 4.", " Then 8."]
    variants = [list(range(5)), [0, 2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3], [0, 3], [], [0, 1, 2, 4], [0, 2, 3, 4]]
    chain = AnswerScorer(model, tokenizer).encode("3 + 5?", texts, "8 mats")
    expected = [direct(model, chain.ids(kept), len(chain.answer)) for kept in variants]
    assert len(chain.answer) >= 3 and np.ptp(expected) > 0.01  # the steps matter, so a wrong path would show
    for batch_size in (1, 3, 8):
        cached = AnswerScorer(model, tokenizer, batch_size=batch_size)
        assert cached._cached
        np.testing.assert_allclose(cached.nll(chain, variants), expected, atol=1e-5)
    again = AnswerScorer(model, tokenizer, prefix_cache=False)
    np.testing.assert_allclose(again.nll(chain, variants), expected, atol=1e-5)
    assert state_hash(model) == before


@given(
    st.lists(st.text("ab ", min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 2**6 - 1), st.booleans()
)
def test_any_choice_of_steps(texts: list[str], bits: int, link: bool) -> None:
    model, scorer = _shared()
    scorer._parts = ("", " ", "." if link else "")
    chain = scorer.encode("q", texts, "ab")
    kept = [number for number in range(len(texts)) if bits >> number & 1]
    found = scorer.nll(chain, [kept, range(len(texts))])
    assert found[0] == pytest.approx(direct(model, chain.ids(kept), len(chain.answer)), abs=1e-5)


_SHARED: list = []


def _shared():
    if not _SHARED:
        inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate("ab q.")}, unk_token="."))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
        model = build("gpt2")
        _SHARED.extend((model, AnswerScorer(model, tokenizer)))
    return _SHARED


def test_models_without_a_cache_to_cut_are_encoded_anew(tokenizer) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    scorer = AnswerScorer(model, tokenizer)
    chain = scorer.encode("3 + 5?", ["We add 3.", " Wait, no.", " Then 8."], "8")
    expected = [direct(model, chain.ids(kept), len(chain.answer)) for kept in ([0, 1, 2], [0, 2])]
    np.testing.assert_allclose(scorer.nll(chain, [[0, 1, 2], [0, 2]]), expected, atol=1e-5)


def test_pir_is_the_difference_of_two_calls_and_progressive_steps_have_none(long_model, tokenizer) -> None:
    pir = PIR(long_model, tokenizer)
    steps = pir.steps_of(TRACE)
    scores = pir.score(EXAMPLE["question"], steps, EXAMPLE["answer"])
    texts = [step.text for step in steps]
    full = pir.answer_nll(EXAMPLE["question"], texts, EXAMPLE["answer"])
    for number, step in enumerate(steps):
        if step.pattern == "progressive":
            assert math.isnan(scores[number]) and step.pir is None
            continue
        without = pir.answer_nll(EXAMPLE["question"], texts[:number] + texts[number + 1 :], EXAMPLE["answer"])
        assert scores[number] == pytest.approx(without - full, abs=1e-5) and step.pir == scores[number]
        assert step.tokens == len(tokenizer(step.text, add_special_tokens=False)["input_ids"])
    assert np.isfinite(pir.score(EXAMPLE["question"], steps, EXAMPLE["answer"], PATTERNS)).all()


def test_the_answer_alone_is_scored_with_its_own_tokens(long_model, tokenizer) -> None:
    pir = PIR(long_model, tokenizer, template="Q: {question}\n{reasoning}\n#### {answer}")
    chain = pir.scorer.encode("one?", ["Step.", " Two."], "the mat")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    assert chain.ids([0, 1]) == [*ids("Q: one?\n"), *ids("Step."), *ids(" Two."), *ids("\n#### "), *ids("the mat")]
    expected = direct(long_model, chain.ids([0, 1]), len(ids("the mat")))
    assert pir.answer_nll("one?", ["Step.", " Two."], "the mat") == pytest.approx(expected, abs=1e-5)


def test_a_chat_template_asks_the_question(long_model, tokenizer) -> None:
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "<s>user: {{ messages[0]['content'] }}\nassistant: "
    chain = AnswerScorer(long_model, chatty).encode("one?", ["Step."], "two")
    assert tokenizer.decode(chain.before) == "<s>user: one?\nassistant: "


def test_bfloat16_is_upcast_before_the_logarithm(tokenizer) -> None:
    model = build("llama").to(torch.bfloat16)
    pir = PIR(model, tokenizer)
    found = pir.answer_nll("3?", ["We add."], "8")
    chain = pir.scorer.encode("3?", ["We add."], "8")
    assert found == pytest.approx(direct(model, chain.ids([0]), 1), abs=1e-6)


# Pruning


def test_the_lowest_of_each_pattern_go_by_hand() -> None:
    v, m, e, p = "verification", "multi_method", "error_correction", "progressive"
    steps = steps_of((p, None), (v, 0.3), (v, -0.1), (m, -5.0), (e, 0.2), (v, 0.0), (e, 0.1), (v, 0.4), (v, 0.5))
    # floor(0.4 * 5) = 2 verifications, floor(0.4 * 1) = 0 alternatives, floor(0.4 * 2) = 0 corrections
    assert prune_steps(steps, 0.4) == [2, 5]
    assert [step.removed for step in steps] == [False, False, True, False, False, True, False, False, False]
    assert steps[2].reason == "lowest of 5 verification steps by PIR -0.1000; the lowest 2 go"
    assert steps[0].reason == "progressive steps are never removed"
    assert prune_steps(steps, 0.5) == [2, 5, 6]
    assert prune_steps(steps, 0.5, [e]) == [6] and steps[2].reason == "verification steps are not pruned"
    assert prune_steps(steps, 1.0) == [1, 2, 3, 4, 5, 6, 7, 8] and prune_steps(steps, 0.0) == []


def test_ties_take_the_longer_step_then_the_later_one() -> None:
    ties = [("verification", value) for value in (1e-7, 0.0, -1e-7, 2e-7)]
    steps = steps_of(*ties, tokens=[5, 9, 5, 5])
    assert prune_steps(steps, 0.5) == [1, 3]
    assert "4 tied at the cut: longer first, then later" in steps[0].reason
    assert prune_steps(steps_of(*ties[:2]), 1.0) == [0, 1]


@given(st.integers(1, 100), st.integers(0, 100))
def test_the_budget_is_the_exact_floor(n: int, percent: int) -> None:
    steps = steps_of(*[("verification", float(at)) for at in range(n)])
    assert len(prune_steps(steps, percent / 100)) == percent * n // 100


def test_the_comparators() -> None:
    steps = steps_of(("progressive", -1.0), ("verification", 0.5), ("multi_method", 0.1), ("progressive", 2.0),
                     tokens=[1, 2, 7, 9])  # fmt: skip
    assert comparator(steps, 2, "spirit") == [0, 2] and comparator(steps, 1, "longest") == [2]
    rng = np.random.default_rng(0)
    rule = {tuple(comparator(steps, 1, "rule", rng)) for _ in range(50)}
    assert rule == {(1,), (2,)} and {comparator(steps, 1, "random", rng)[0] for _ in range(80)} == {0, 1, 2, 3}
    assert comparator(steps, 0, "rule", rng) == []
    for bad, told in [
        ((3, "rule", rng), "2 steps to choose from"),
        ((1, "rule"), "give rng"),
        ((1, "best"), "kind must be"),
    ]:
        with pytest.raises(InputError, match=told):
            comparator(steps, *bad)
    steps[0].pir = None
    with pytest.raises(InputError, match="score them with patterns=PATTERNS"):
        comparator(steps, 1, "spirit")


def test_statistics_and_efficiency() -> None:
    steps = steps_of(("progressive", None), ("verification", 0.0), ("verification", 1.0), tokens=[60, 10, 30])
    prune_steps(steps, 0.5)
    stats = pattern_stats([steps])
    assert stats["progressive"] == {"steps": 1, "tokens": 60, "share": 0.6, "kept_tokens": 60}
    assert stats["verification"] == {"steps": 2, "tokens": 40, "share": 0.4, "kept_tokens": 30}
    assert efficiency(0.421, 4716) == pytest.approx(8.92e-5, rel=1e-3)
    for accuracy, tokens in ((42.1, 4716), (0.4, 0), (float("nan"), 5)):
        with pytest.raises(InputError):
            efficiency(accuracy, tokens)


# Examples and data sets


def test_an_example_keeps_its_other_fields_and_says_why(long_model, tokenizer) -> None:
    pir = PIR(long_model, tokenizer, ratio=1.0, patterns=["verification"])
    found = pir.refine(EXAMPLE)
    assert found["reasoning"] == TRACE.replace("Wait, 3 + 5 is 8. So it is 8.", "")
    assert found["id"] == 7 and EXAMPLE["reasoning"] == TRACE and found["pir"]["skipped"] is None
    told = found["pir"]["steps"]
    assert [step["removed"] for step in told] == [False, True, False, False, False, False]
    assert found["pir"]["tokens_before"] - found["pir"]["tokens_after"] == told[1]["tokens"]
    listed = pir.refine({**EXAMPLE, "reasoning": segment_reasoning(TRACE)})
    assert "".join(listed["reasoning"]) == found["reasoning"] and len(listed["reasoning"]) == 5


def test_no_functional_step_and_a_budget_of_none_change_nothing(long_model, tokenizer) -> None:
    plain = {**EXAMPLE, "reasoning": "First, 3 + 5 is 8. Then 8 + 1 is 9."}
    for example in (plain, EXAMPLE):  # one step of each pattern: floor(0.4) = 0
        found = PIR(long_model, tokenizer).refine(example)
        assert found["reasoning"] == example["reasoning"]
        assert not any(step["removed"] for step in found["pir"]["steps"])


def test_a_data_set_in_gives_a_data_set_out(long_model, tokenizer) -> None:
    pir = PIR(long_model, tokenizer, ratio=1.0)
    rows = [EXAMPLE, {**EXAMPLE, "id": 8, "reasoning": "It is 9."}]
    expected = pir.refine_dataset(rows)
    assert [row["id"] for row in expected] == [7, 8] and expected[0]["reasoning"] != TRACE
    for table in (pd.DataFrame(rows), pa.Table.from_pylist(rows)):
        found = pir.refine_dataset(table)
        assert isinstance(found, pa.Table) and found.column("reasoning").to_pylist() == [
            r["reasoning"] for r in expected
        ]
        assert found.column("pir").to_pylist()[0]["tokens_after"] == expected[0]["pir"]["tokens_after"]
    with pytest.raises(InputError, match="is no data set"):
        pir.refine_dataset(3)


def test_datasets_of_hugging_face(long_model, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    found = PIR(long_model, tokenizer, ratio=1.0).refine_dataset(datasets.Dataset.from_list([EXAMPLE, EXAMPLE]))
    assert isinstance(found, datasets.Dataset) and len(found) == 2 and "Wait" not in found[0]["reasoning"]


# Bad input


def test_what_is_too_long_is_refused_or_skipped_and_never_cut(tokenizer) -> None:
    model = build("gpt2")  # reads 128
    long = {**EXAMPLE, "reasoning": "Wait, no. " * 60}
    with pytest.raises(TooLong, match=r"have [0-9,]+ tokens; the model reads 128"):
        PIR(model, tokenizer).refine(long)
    with pytest.raises(TooLong, match="the model reads 40"):
        PIR(build("llama"), tokenizer, max_length=40).refine(EXAMPLE)
    found = PIR(model, tokenizer, on_overflow="skip", ratio=1.0).refine(long)
    assert found["reasoning"] == long["reasoning"] and "the model reads 128" in found["pir"]["skipped"]
    assert found["pir"]["tokens_before"] == found["pir"]["tokens_after"] > 128


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": ""}, r"field 'answer' \(answer\) is empty"),
        ({"answer": 9}, r"field 'answer' \(answer\) holds 9; text is needed"),
        ({"question": None}, "field 'question'"),
        ({"reasoning": ["a", 3]}, r"field 'reasoning' \(reasoning\) holds"),
        ({"reasoning": " "}, r"field 'reasoning' \(reasoning\) is empty"),
    ],
)
def test_a_part_that_is_missing_is_named(change: dict, told: str, long_model, tokenizer) -> None:
    with pytest.raises(DataError, match=f"example 1: {told}"):
        PIR(long_model, tokenizer).refine_dataset([EXAMPLE, {**EXAMPLE, **change}])


def test_a_segmenter_that_drops_text_names_the_example(long_model, tokenizer) -> None:
    with pytest.raises(DataError, match="example 0: the segmenter's steps do not put the reasoning together"):
        PIR(long_model, tokenizer, segmenter=lambda text: text.split(". ")).refine_dataset([EXAMPLE])


def test_numbers_that_are_not_finite_are_refused(tokenizer) -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(DataError, match="log-probability of the answer is not finite"):
        PIR(model, tokenizer).answer_nll("q", ["a"], "b")


def test_an_answer_without_tokens(long_model) -> None:
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="has no token"):
        AnswerScorer(long_model, transformers.PreTrainedTokenizerFast(tokenizer_object=inner)).encode("a", ["a"], " ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.5}, "ratio must lie in 0..1"), ({"ratio": float("nan")}, "ratio must lie in 0..1"),
        ({"patterns": ["progressive"]}, "never pruned"), ({"patterns": ["verify"]}, "'verify' is unknown"),
        ({"patterns": []}, "at least one of"), ({"template": "{question}{answer}"}, "template must hold"),
        ({"template": "{answer}{question}{reasoning}"}, "template must hold"), ({"batch_size": 0}, "batch_size"),
        ({"template": "{question}{reasoning}{answer}."}, "template must hold"), ({"max_length": 1}, "max_length"),
        ({"on_overflow": "cut"}, "on_overflow must be"), ({"columns": ("a", "a", "b")}, "columns must be three names"),
    ],
)  # fmt: skip
def test_parameters(options: dict, told: str, long_model, tokenizer) -> None:
    with pytest.raises(InputError, match=told):
        PIR(long_model, tokenizer, **options)


def test_models_of_another_kind(tokenizer) -> None:
    with pytest.raises(InputError, match="no causal language model"):
        PIR(build("t5"), tokenizer)
    with pytest.raises(InputError, match="no causal language model"):
        PIR(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(InputError, match="tokenizer: there is none"):
        PIR(build("gpt2"), None)


def test_functional_patterns_are_the_three_of_the_paper() -> None:
    assert FUNCTIONAL == ("verification", "multi_method", "error_correction")
