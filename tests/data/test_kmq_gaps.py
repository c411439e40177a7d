"""The score gap of iterative kMQ on tiny language models: greedy answers, scorers, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from salience.data import perplexity_scorer, reward_scorer, score_gap
from salience.errors import DataError, InputError, NothingToDo
from tiny import VOCABULARY, build, state_hash

EXAMPLES = [("the cat", " sat"), ("what is it for? a weight", " counts"), ("mat", " on the mat")]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(["the cat sat on the mat", "a weight is what it counts for"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<s>", model_max_length=128
    )


def answers_of(model, tokenizer, batch_size: int) -> list[str]:
    """What the model writes, as the scorer gets to see it."""
    seen: list[list[str]] = []

    def scorer(prompts, answers):
        seen.append(list(answers))
        return np.zeros(len(answers))

    score_gap(model, tokenizer, EXAMPLES, scorer, max_new_tokens=6, batch_size=batch_size)
    assert seen[0] == [gold for _, gold in EXAMPLES]
    return seen[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_are_greedy_whatever_the_batch(family, tokenizer) -> None:
    model = build(family)
    before = state_hash(model)
    together = answers_of(model, tokenizer, 3)
    assert together == answers_of(model, tokenizer, 1)
    for (prompt, _), answer in zip(EXAMPLES, together):  # step by step, without a cache and without padding
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
            if int(best) == tokenizer.eos_token_id:
                break
        start = len(tokenizer(prompt)["input_ids"])
        assert tokenizer.decode(ids[0, start:], skip_special_tokens=True) == answer
    assert state_hash(model) == before


def test_the_gap_is_given_minus_written(tokenizer) -> None:
    gap = score_gap(build("gpt2"), tokenizer, EXAMPLES, lambda prompts, answers: [float(a == " sat") for a in answers],
                    max_new_tokens=2)  # fmt: skip
    assert gap[0] == 1.0 and gap.shape == (3,) and gap.dtype == np.float64


def test_perplexity_by_hand(tokenizer) -> None:
    model = build("gpt2")
    [score] = perplexity_scorer(model, tokenizer)(["the cat"], [" sat"])
    ids = tokenizer("the cat sat<s>", return_tensors="pt")["input_ids"]
    start = len(tokenizer("the cat")["input_ids"])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert score == pytest.approx(-float(torch.exp(-log_p[start - 1 :].mean())), rel=1e-4)
    assert np.isfinite(perplexity_scorer(model, tokenizer)(["the cat"], [""])).all()  # an empty answer has its end


def test_reward_scorer(tokenizer) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCABULARY,
                                     num_labels=1, pad_token_id=0)  # fmt: skip
    judge = transformers.GPT2ForSequenceClassification(config).eval()
    scores = reward_scorer(judge, tokenizer)(["a", "the cat"], [" weight", " sat"])
    with torch.no_grad():
        expected = judge(**tokenizer("the cat sat", return_tensors="pt")).logits[0, 0]
    assert scores.shape == (2,) and scores[1] == pytest.approx(float(expected), rel=1e-5)
    config.num_labels = 2
    with pytest.raises(InputError, match="2 labels; a reward model has one"):
        reward_scorer(transformers.GPT2ForSequenceClassification(config), tokenizer)


def test_bad_use(tokenizer) -> None:
    model = build("gpt2")
    with pytest.raises(NothingToDo, match="there are none"):
        score_gap(model, tokenizer, [], lambda p, a: [])
    with pytest.raises(InputError, match="scores of shape"):
        score_gap(model, tokenizer, EXAMPLES, lambda p, a: [1.0], max_new_tokens=1)
    with pytest.raises(DataError, match="score of answer 0 is not finite"):
        score_gap(model, tokenizer, EXAMPLES, lambda p, a: [np.nan] * 3, max_new_tokens=1)
    with pytest.raises(InputError, match="writes no text"):
        score_gap(torch.nn.Linear(2, 2), tokenizer, EXAMPLES, lambda p, a: [1.0] * 3)
    with pytest.raises(DataError, match="has no token"):
        score_gap(model, tokenizer, [("", "x")], lambda p, a: [1.0], max_new_tokens=1)
