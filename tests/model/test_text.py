from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from salience.errors import DataError, InputError, NothingToDo
from salience.model import embed, span_log_probs
from tiny import TEXT, VOCABULARY, build, state_hash

PREFIX = "the cat sat on the"
ENDS = [" mat", " mat, and what does not count?", "se weights", " cat sat on the mat"]


def one_by_one(model, tokenizer, prefix, text):
    """Log-probabilities from one unbatched pass without a cache."""
    encoded = tokenizer(prefix + text, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])
    with torch.no_grad():
        log_probs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    inside = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prefix)]
    return torch.stack([log_probs[i - 1, ids[i]] for i in inside])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", [*TEXT, "moe"])
def test_cached_and_batched_equals_uncached_one_by_one(family, batch_size, tokenizer):
    model = build(family)
    model.train()
    before = state_hash(model)
    spans = span_log_probs(model, tokenizer, PREFIX, ENDS, batch_size=batch_size)
    assert state_hash(model) == before
    model.eval()
    for text, span in zip(ENDS, spans, strict=True):
        expected = one_by_one(model, tokenizer, PREFIX, text)
        assert span.dtype == torch.float32
        torch.testing.assert_close(span.double(), expected, atol=1e-4, rtol=0)
    assert min(float(span.std()) for span in spans if len(span) > 1) > 0.01  # not all alike


def test_a_sliding_window_shorter_than_the_prefix(tokenizer):
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    for text, span in zip(ENDS, span_log_probs(model, tokenizer, PREFIX, ENDS), strict=True):
        expected = one_by_one(model, tokenizer, PREFIX, text)
        torch.testing.assert_close(span.double(), expected, atol=1e-4, rtol=0)


def test_a_token_across_the_seam_belongs_to_the_continuation(tokenizer):
    model = build("llama")
    prefix, ends = "the ca", ["t sat", "ts", "b"]
    ids = tokenizer(prefix)["input_ids"]
    assert tokenizer(prefix + ends[0])["input_ids"][: len(ids)] != ids  # " cat" is one token
    spans = span_log_probs(model, tokenizer, prefix, ends)
    for text, span in zip(ends, spans, strict=True):
        torch.testing.assert_close(span.double(), one_by_one(model, tokenizer, prefix, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_prefix_runs_once(family, tokenizer):
    model, lengths = build(family), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    span_log_probs(model, tokenizer, PREFIX, ENDS * 3, batch_size=4)
    n = len(tokenizer(PREFIX)["input_ids"])
    assert lengths[0] == (1, n - 1)
    longest = max(len(tokenizer(PREFIX + e)["input_ids"]) for e in ENDS)
    assert lengths[1:] == [(4, longest - n)] * 3


def test_the_sum_over_a_partition_is_the_whole(tokenizer):
    """log p(ab) = log p(a) + log p(b | a): what a wrong offset by one would break."""
    model = build("gpt2")
    whole = span_log_probs(model, tokenizer, "what", [" matters here"])[0].sum()
    first = span_log_probs(model, tokenizer, "what", [" matters"])[0].sum()
    second = span_log_probs(model, tokenizer, "what matters", [" here"])[0].sum()
    torch.testing.assert_close(whole, first + second)


def test_an_empty_prefix_needs_a_first_token(tokenizer):
    model = build("llama")
    with pytest.raises(InputError, match="prefix"):
        span_log_probs(model, tokenizer, "", ["the cat"])
    # A single token of prefix has nothing to cache, and works.
    span = span_log_probs(model, tokenizer, "a", [" weight"])[0]
    torch.testing.assert_close(span.double(), one_by_one(model, tokenizer, "a", " weight"), atol=1e-4, rtol=0)


def test_bad_text_input_is_named(tokenizer):
    model = build("llama")
    with pytest.raises(NothingToDo, match="continuations"):
        span_log_probs(model, tokenizer, PREFIX, [])
    with pytest.raises(DataError, match="number 1"):
        span_log_probs(model, tokenizer, PREFIX, [" mat", ""])

    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="encoder-decoder"):
        span_log_probs(build("t5"), tokenizer, PREFIX, ENDS)
    with pytest.raises(InputError, match="Slow"):
        span_log_probs(model, Slow(), PREFIX, ENDS)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        span_log_probs(model, tokenizer, PREFIX, ENDS)


TEXTS = ["the cat", "what matters here, and what does not?", "a", "a weight is what it counts for"]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", [*TEXT, "t5"])
def test_embeddings_equal_unbatched_pooling(family, pooling, batch_size, tokenizer):
    model = build(family)
    before = state_hash(model)
    got = embed(model, tokenizer, TEXTS, batch_size=batch_size, pooling=pooling)
    assert state_hash(model) == before
    assert got.dtype == torch.float32 and got.shape == (4, 32)
    torch.testing.assert_close(got.norm(dim=1), torch.ones(4))
    backbone = model.encoder if family == "t5" else model.base_model
    for text, row in zip(TEXTS, got, strict=True):
        with torch.no_grad():
            hidden = backbone(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(row, pooled / pooled.norm(), atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_and_half_precision_comes_out_as_float32(tokenizer):
    model = build("gpt2").bfloat16()
    got = embed(model, tokenizer, ["the cat sat on the mat " * 50])
    assert got.dtype == torch.float32 and got.shape == (1, 32)


def test_bad_embedding_input_is_named(tokenizer):
    model = build("llama")
    with pytest.raises(InputError, match="pooling"):
        embed(model, tokenizer, TEXTS, pooling="max")
    with pytest.raises(NothingToDo):
        embed(model, tokenizer, [])
    with pytest.raises(DataError, match="no token"):
        embed(model, tokenizer, ["a", ""])
    with torch.no_grad():
        model.model.norm.weight.zero_()
    with pytest.raises(DataError, match="zero"):
        embed(model, tokenizer, TEXTS)
