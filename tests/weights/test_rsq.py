"""RSQ: the solve against the plain algorithm, the importance of tokens, rotations, the layer-wise pass, bad input."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from salience.errors import DataError, InputError, NothingToDo
from salience.model import eager_attention
from salience.scores import Scores
from salience.weights import (
    Grid,
    RSQQuantizer,
    Scales,
    TokenImportance,
    gptq_solve,
    load_packed,
    quantize_directory,
    reconstruction_error,
    rotate_model,
    round_to_nearest,
    save_packed,
    weighted_hessian,
)
from salience.weights.rsq.calibration import calibration_from_texts, calibration_of
from salience.weights.rsq.grids import spread
from salience.weights.rsq.importance import attention_received
from salience.weights.rsq.layers import GROUPS, Stream, layer_importance
from salience.weights.rsq.packing import pack_bits, unpack_bits
from salience.weights.rsq.quantizer import embed
from salience.weights.rsq.rotating import Turn, hadamard
from tiny import VOCABULARY, build, directory_hash, state_hash

# Codes of llm-compressor 0.14.0.1 for a small problem; benchmarks/quantize.py compares a large one.
OFFICIAL = Path(__file__).with_name("gptq_official.json")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def decoder(family: str, **more):
    """A tiny decoder with norms, biases and weights that a mistake would show in."""
    t = transformers
    cls, config = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig), "mistral": (t.MistralForCausalLM, t.MistralConfig),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config), "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config),
    }[family]  # fmt: skip
    own = {"mistral": {"sliding_window": 8}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 16}}
    torch.manual_seed(0)
    model = cls(config(**SIZES, **own.get(family, {}), **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def tokens(rows: int = 12, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def problem(out: int = 20, inputs: int = 96, count: int = 300):
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=draw, dtype=torch.float64)
    W = torch.randn(out, inputs, generator=draw, dtype=torch.float64)
    return W, torch.randn(count, inputs, generator=draw, dtype=torch.float64) @ mix


def plainly(W, H, grid, scales=None, group=None, percdamp=0.01):
    """GPTQ as the paper has it: the inverse, its Cholesky factor, one column after the other, no blocks."""
    W, H = W.clone(), H.clone()
    H += percdamp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    scales = grid.fit(W) if scales is None else scales
    codes, Q = torch.zeros_like(W), torch.zeros_like(W)
    for i in range(W.shape[1]):
        if group is not None and i % group == 0:
            scales = grid.fit(W[:, i : i + group])
        codes[:, i : i + 1] = grid.encode(W[:, i : i + 1], *scales)
        Q[:, i : i + 1] = grid.decode(codes[:, i : i + 1], *scales)
        W[:, i:] -= ((W[:, i] - Q[:, i]) / U[i, i])[:, None] * U[i, i:]
    return codes, Q


@pytest.mark.parametrize(
    "grid",
    [Grid(3), Grid(2, sym=False), Grid(4, clip=False), Grid(3, kind="nf")],
    ids=lambda g: f"{g.kind}{g.bits}{g.sym}",
)
@pytest.mark.parametrize("block", [128, 40], ids=str)
def test_the_solve_is_the_column_by_column_algorithm(grid, block) -> None:
    W, X = problem()
    H = weighted_hessian(X)
    codes, Q = plainly(W, H, grid)
    solution = gptq_solve(W, H, grid, block=block)
    assert torch.equal(solution.codes, codes.to(torch.uint8))
    torch.testing.assert_close(solution.weight, Q)
    assert solution.error < solution.rtn_error and solution.dampings == 1


@pytest.mark.parametrize(
    "known", json.loads(OFFICIAL.read_text())["problems"], ids=lambda known: f"{known['bits']} bits"
)
def test_codes_are_those_of_llm_compressor(known) -> None:
    draw = torch.Generator().manual_seed(known["seed"])
    inputs, bits = known["inputs"], known["bits"]
    W = torch.randn(known["rows"], inputs, generator=draw)
    X = torch.randn(4 * inputs, inputs, generator=draw)
    X = X @ (torch.eye(inputs) + torch.randn(inputs, inputs, generator=draw) / inputs**0.5)
    codes = torch.tensor([[int(code, 16) for code in row] for row in known["codes"]])
    found = gptq_solve(W, weighted_hessian(X), Grid(bits, clip=False)).codes
    assert (found != codes).double().mean() < 1e-3


@pytest.mark.parametrize("group", [16, 32, 24])
def test_groups_take_their_scale_from_what_is_left_of_them(group) -> None:
    W, X = problem()
    H = weighted_hessian(X)
    codes, Q = plainly(W, H, Grid(3), group=group)
    solution = gptq_solve(W, H, Grid(3), group_size=group, block=48)
    assert torch.equal(solution.codes, codes.to(torch.uint8))
    torch.testing.assert_close(solution.weight, Q)
    assert solution.scales.scale.shape == (20, 96 // group)


def test_columns_in_order_of_activations_are_a_permuted_problem() -> None:
    W, X = problem()
    H = weighted_hessian(X)
    order = H.diagonal().argsort(descending=True)
    ordered, straight = (
        gptq_solve(W, H, Grid(3), act_order=True),
        gptq_solve(W[:, order], H[order][:, order], Grid(3), scales=Grid(3).fit(W)),
    )
    assert torch.equal(ordered.codes[:, order], straight.codes)
    assert math.isclose(ordered.error, straight.error, rel_tol=1e-9)
    grouped = gptq_solve(W, H, Grid(3), act_order=True, group_size=16)
    torch.testing.assert_close(grouped.scales.scale, round_to_nearest(W, Grid(3), 16)[2].scale)


def test_the_error_told_is_that_of_the_damped_hessian() -> None:
    W, X = problem()
    H = weighted_hessian(X)
    solution = gptq_solve(W, H, Grid(3))
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    moved, near = solution.weight - W, round_to_nearest(W, Grid(3))[1] - W
    assert math.isclose(solution.error, float(((moved @ damped) * moved).sum()), rel_tol=1e-9)
    assert math.isclose(solution.rtn_error, float(((near @ damped) * near).sum()), rel_tol=1e-9)


def test_a_diagonal_hessian_gives_rounding_to_nearest() -> None:
    W, _ = problem()
    solution = gptq_solve(W, torch.eye(96, dtype=torch.float64), Grid(3))
    codes, weight, _ = round_to_nearest(W, Grid(3))
    assert torch.equal(solution.codes, codes) and torch.equal(solution.weight, weight)


def test_grids_by_hand() -> None:
    W = torch.tensor([[-3.0, 0.0, 1.4, 2.0], [0.0, 0.0, 0.0, 0.0]])
    codes, weight, scales = round_to_nearest(W, Grid(3, clip=False))
    assert scales.scale[0].item() == 1.0 and codes[0].tolist() == [1, 4, 5, 6] and weight[0].tolist() == [-3, 0, 1, 2]
    assert weight[1].tolist() == [0, 0, 0, 0]
    codes, weight, scales = round_to_nearest(torch.tensor([[0.0, 1.0, 3.0]]), Grid(2, sym=False, clip=False))
    assert codes.tolist() == [[0, 1, 3]] and weight.tolist() == [[0, 1, 3]]
    levels = Grid(4, kind="nf").levels(torch.zeros(1, dtype=torch.float64))
    assert len(levels) == 16 and levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1
    assert math.isclose(float(levels[8]), 0.0796, abs_tol=1e-4)  # of QLoRA's table


def test_the_clip_is_the_best_of_eighty() -> None:
    W = torch.randn(1, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    best = min(
        (float(((4 - (torch.round(W / s) + 4).clamp(0, 7)) * s + W).abs().pow(2.4).sum()), s)
        for s in (float(W.abs().max()) * (1 - i / 100) / 3 for i in range(80))
    )
    assert math.isclose(float(Grid(3).fit(W).scale), best[1], rel_tol=1e-12)


def test_importance_enters_the_hessian_once() -> None:
    X, r = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(weighted_hessian(X, r), torch.tensor([[2.0, 3.0], [3.0, 6.0]], dtype=torch.float64))
    torch.testing.assert_close(weighted_hessian(X, torch.full((2,), 9.0)), weighted_hessian(X))
    W, W_q = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])
    assert reconstruction_error(W, W_q, X) == (1 + 9) / 2
    assert reconstruction_error(W, W_q, X, r) == (0.5 * 1 + 1.5 * 9) / 2


def test_dead_inputs_get_weight_zero() -> None:
    W, X = problem()
    X[:, 7] = 0
    solution = gptq_solve(W, weighted_hessian(X), Grid(3))
    assert not solution.weight[:, 7].any() and solution.weight[:, 8].any()


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    W = problem(4, 4)[0]
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.02], dtype=torch.float64))
    solution = gptq_solve(W, H, Grid(4))  # 0.01 of the mean 0.745 three times is more than 0.02
    assert solution.dampings == 3 and torch.isfinite(solution.weight).all()


# ---- importance


def test_each_strategy_by_hand() -> None:
    z = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [0.0, 1.0]]])
    mask = torch.ones(1, 4, dtype=torch.bool)

    def share(name, **known):
        return TokenImportance(name, 0.0, 1.0)(z, mask, **known)[0].tolist()

    assert share("actnorm") == [0.5, 0.0, 1.0, pytest.approx(0.1)]
    assert share("actdiff", outputs=z + torch.tensor([0.0, 1.0, 4.0, 2.0])[None, :, None]) == [1.0, 0.75, 0.0, 0.5]
    assert share("tokenfreq", counts=torch.tensor([[1, 5, 3, 3]])) == [1.0, 0.0, 0.5, 0.5]
    assert share("attncon", received=torch.tensor([[4.0, 0.0, 1.0, 2.0]])) == [1.0, 0.0, 0.25, 0.5]
    assert share("0_2") == [1, 1, 0, 0] and share("1_3_4") == [0, 1, 0, 1] and share("uniform") == [1, 1, 1, 1]
    pairs = (z[0][:, None] - z[0][None]).square().sum(-1).mean(1)
    expected = (pairs - pairs.min()) / (pairs.max() - pairs.min())
    torch.testing.assert_close(TokenImportance("tokensim", 0.0, 1.0)(z, mask)[0], expected)
    ranged = TokenImportance("attncon")(z, mask, received=torch.tensor([[4.0, 0.0, 1.0, 2.0]]))
    assert ranged.min() == pytest.approx(0.005) and ranged.max() == 1.0


def test_padding_has_no_importance_and_equal_tokens_have_all() -> None:
    z, mask = torch.zeros(2, 3, 2), torch.tensor([[True, True, False], [True, True, True]])
    r = TokenImportance("attncon")(z, mask, received=torch.tensor([[2.0, 1.0, 99.0], [3.0, 3.0, 3.0]]))
    assert r.tolist() == [[1.0, pytest.approx(0.005), 0.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_received_is_a_column_sum_of_eager_attention(family) -> None:
    model, ids = decoder(family), tokens(2, 20)
    with eager_attention(model), torch.no_grad():
        output = model(ids, output_attentions=True, output_hidden_states=True)
    layer, hidden = model.model.layers[1], output.hidden_states[1]
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    if family == "mistral":
        allowed &= ~torch.ones(20, 20, dtype=torch.bool).tril(-8)
    with torch.no_grad():
        places = model.model.rotary_emb(hidden, torch.arange(20)[None])
        mask = torch.ones(2, 20, dtype=torch.bool)
        found = attention_received(layer.self_attn, layer.input_layernorm(hidden), places, allowed[None], mask, block=6)
    torch.testing.assert_close(found, output.attentions[1].sum((1, 2)), rtol=1e-4, atol=1e-5)


# ---- rotation


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 40, 48, 60, 76, 148, 896])
def test_hadamard_matrices_are(size) -> None:
    H = hadamard(size)
    assert H is not None and (H.abs() == 1).all()
    assert torch.equal(H @ H.T, size * torch.eye(size, dtype=torch.float64))
    x = torch.randn(3, size, dtype=torch.float64)
    torch.testing.assert_close(Turn(size, "a test")(x), x @ H / math.sqrt(size))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"online": True}, {"mode": "random"}], ids=str)
def test_a_rotation_leaves_the_logits_as_they_are(family, options) -> None:
    model, ids = decoder(family), tokens(3)
    before = state_hash(model)
    turned = rotate_model(model, **options)
    assert (logits(model, ids) - logits(turned, ids)).abs().max() < 1e-4
    assert state_hash(model) == before
    assert turned.lm_head.weight is not turned.get_input_embeddings().weight
    assert (turned.model.layers[1].mlp.down_proj.weight - model.model.layers[1].mlp.down_proj.weight).abs().max() > 0.1
    assert (turned.model.norm.weight == 1).all()


def test_without_a_hadamard_matrix_it_says_so_and_turns_all_the_same() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6}
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with pytest.warns(UserWarning, match="no Hadamard matrix of order 6"):
        turned = rotate_model(model)
    assert (logits(model, tokens(2)) - logits(turned, tokens(2))).abs().max() < 1e-4
    assert hadamard(172) is None and hadamard(6) is None


# ---- the layer-wise pass


def by_definition(model, ids, quantizer):
    """The method spelled out: whole passes of the whole model, all attention held, no stream, no file."""
    turned = rotate_model(model, generator=torch.Generator().manual_seed(quantizer.random_state))
    for number, layer in enumerate(turned.model.layers):
        with eager_attention(turned), torch.no_grad():
            output = turned(ids, output_attentions=True)
        received = output.attentions[number].sum((1, 2))
        low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
        r = 0.005 + (received - low) / (high - low) * 0.995
        r = r / r.mean(1, keepdim=True)
        for group in GROUPS:
            seen = []
            handle = layer.get_submodule(group[0]).register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            logits(turned, ids)
            handle.remove()
            X = seen[0].flatten(0, 1).detach()
            H = 2 / len(X) * (X * r.flatten()[:, None]).T @ X
            for part in group:
                weight = layer.get_submodule(part).weight
                weight.data.copy_(gptq_solve(weight.detach(), H, quantizer.values()).weight)
    return turned


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_it_is_the_method_spelled_out(family) -> None:
    model, ids = decoder(family), tokens()
    quantizer = RSQQuantizer(bits=4, clip=False, batch_size=5)
    found, expected = quantizer.quantize(model, [ids]).model, by_definition(model, ids, quantizer)
    differing = [
        (found.get_parameter(name) - value).abs().gt(1e-4).double().mean()
        for name, value in expected.named_parameters()
    ]
    assert max(differing) < 0.01  # a rounding tie that tips moves what comes after it


def test_constant_importance_is_plain_gptq() -> None:
    model, ids = decoder("llama"), tokens()
    given = {"input_ids": ids, "token_weights": torch.full(ids.shape, 5.0)}
    one = RSQQuantizer(bits=3).quantize(model, given)
    two = RSQQuantizer(bits=3, importance="uniform").quantize(model, ids)
    assert all(torch.equal(one.matrices[name].codes, two.matrices[name].codes) for name in two.matrices)
    three = RSQQuantizer(bits=3).quantize(model, ids)
    assert any(not torch.equal(one.matrices[name].codes, three.matrices[name].codes) for name in two.matrices)


def test_padding_changes_nothing() -> None:
    model, ids = decoder("qwen2"), tokens()
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (0, 6), value=3),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, 6)),
    }
    one, two = (RSQQuantizer(bits=4, clip=False).quantize(model, batches) for batches in ([ids], [padded]))
    differing = [(one.matrices[n].codes != two.matrices[n].codes).double().mean() for n in one.matrices]
    assert max(differing) < 0.01


def test_the_same_twice_and_the_model_is_left_alone() -> None:
    model, ids = decoder("llama"), tokens()
    before = state_hash(model)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(state_hash(RSQQuantizer(bits=3, clip=False).quantize(model, [ids]).model))
    assert results[0] == results[1] and state_hash(model) == before
    assert state_hash(RSQQuantizer(bits=3, clip=False, random_state=1).quantize(model, [ids]).model) != results[0]


def test_expansion_rolls_each_sequence() -> None:
    calibration = calibration_of(
        {"input_ids": torch.tensor([[1, 2, 3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}
    )
    assert calibration.expanded(2).ids.tolist() == [[1, 2, 3, 4, 0], [3, 4, 1, 2, 0]]
    assert calibration.expanded(2).mask.tolist() == [[True] * 4 + [False]] * 2
    assert calibration.expanded(1) is calibration


def test_half_precision_stays_half_and_excluded_layers_stay() -> None:
    model = decoder("llama").to(torch.bfloat16)
    result = RSQQuantizer(bits=4, clip=False, exclude=("down_proj", "*.0.self_attn.*"), rotate=None).quantize(
        model, tokens()
    )
    assert all(parameter.dtype == torch.bfloat16 for parameter in result.model.parameters())
    assert len(result.matrices) == 2 + 6
    kept = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(result.model.get_parameter(kept), model.get_parameter(kept))


# ---- directories and packed codes


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_packed_codes_come_back(bits) -> None:
    codes = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, -(-13 * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, 13), codes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_quantised_as_a_model_in_memory(family, tmp_path) -> None:
    model, ids = decoder(family), tokens()
    model.save_pretrained(tmp_path / "model")
    before = directory_hash(tmp_path / "model")
    quantizer = RSQQuantizer(bits=3, clip=False)
    expected = logits(quantizer.quantize(model, ids).model, ids)
    done = quantize_directory(tmp_path / "model", tmp_path / "out", ids, quantizer)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert torch.equal(logits(loaded, ids), expected)
    quantize_directory(tmp_path / "model", tmp_path / "packed", ids, quantizer, packed=True)
    assert torch.equal(logits(load_packed(tmp_path / "packed"), ids), expected)
    assert done.weights == sum(value.numel() for name, value in loaded.named_parameters() if "proj.weight" in name)
    stored = sum(v.numel() * v.itemsize for v in load_file(tmp_path / "out" / "codes.safetensors").values())
    assert stored <= done.codes_bytes < done.dense_bytes
    assert directory_hash(tmp_path / "model") == before
    assert not list(tmp_path.glob("**/*.part"))


def test_online_rotations_come_back_from_packed_codes_only(tmp_path) -> None:
    model, ids = decoder("llama"), tokens()
    model.save_pretrained(tmp_path / "model")
    quantizer = RSQQuantizer(bits=4, clip=False, online=True, sym=False, group_size=16)
    result = quantizer.quantize(model, ids)
    save_packed(result, tmp_path / "packed")
    back = load_packed(tmp_path / "packed")
    assert torch.equal(logits(back, ids), logits(result.model, ids))
    near = logits(result.model, ids) - logits(model, ids)
    assert near.abs().mean() < 0.5 * logits(model, ids).abs().mean()  # without the hooks it would be far off
    with pytest.raises(InputError, match="packed"):
        quantize_directory(tmp_path / "model", tmp_path / "out", ids, quantizer)
    with pytest.raises(OSError):
        type(model).from_pretrained(tmp_path / "packed")
    with pytest.raises(DataError, match="packed"):
        load_packed(tmp_path / "model")


def test_token_scores_are_the_weights(tmp_path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{n}": n for n in range(300)} | {"[UNK]": 300, "[S]": 301}
    fast = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]", bos_token="[S]")
    texts = ["w1 w2 w3", "[S] w5 w6"]
    scores = Scores([1, 2, 3, 4, 5, 6], ["0:0", "0:1", "0:2", "7:0", "7:1", "7:2"], "token")
    draw = torch.Generator().manual_seed(0)
    options = {"length": 2, "sequences": 9, "generator": draw}
    found = calibration_from_texts(tokenizer, texts, weights=scores, numbers=[0, 7], skip_special=True, **options)
    assert found.ids.tolist() == [[1, 2], [3, 301], [5, 6]] and found.given.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert found.mask.all() and found.weighed().tolist() == [[True, True], [True, False], [True, True]]
    with pytest.raises(InputError, match="1:0"):
        calibration_from_texts(tokenizer, texts, weights=scores, **options)
    with pytest.raises(InputError, match="tokens are wanted"):
        calibration_from_texts(tokenizer, texts, weights=Scores([1.0], ["a"], "sample"), **options)
    # and in the Hessian: a token without weight might as well not be there
    model, ids = decoder("llama"), tokens()
    weights = torch.ones(ids.shape)
    weights[:, 12:] = 0
    given = RSQQuantizer(bits=3, clip=False, r_min=0.0).quantize(model, {"input_ids": ids, "token_weights": weights})
    chunk = RSQQuantizer(bits=3, clip=False, importance="0_2").quantize(model, ids)
    assert all(torch.equal(given.matrices[n].codes, chunk.matrices[n].codes) for n in chunk.matrices)


def test_tokens_without_weight_are_seen_by_the_model_all_the_same() -> None:
    model, ids = decoder("llama"), tokens()
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, [0, 3, 5, 11]] = True
    plain = calibration_of(ids)
    skipped = plain._replace(fitted=~special)
    states = []
    for calibration in (plain, skipped):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            stream = Stream(calibration, model.model.rotary_emb, model.config, torch.float32, Path(folder))
            embed(stream, model.get_input_embeddings())
            for number, layer in enumerate(model.model.layers):
                r = layer_importance(layer, stream, TokenImportance(), number)
                for rows in stream.batches():
                    stream.hidden[rows] = stream.call(layer, rows, number)
            states.append((stream.hidden.clone(), r))
    expected = model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(states[0][0], states[1][0])
    torch.testing.assert_close(model.model.norm(states[0][0]), expected, rtol=1e-4, atol=1e-4)
    assert not states[1][1][special].any() and states[1][1][~special].all()
    torch.testing.assert_close(states[1][1].sum(1), (~special).sum(1).float())  # mean 1 of those that count
    # In the Hessian they are as good as weights of 0: as many in each sequence, so that only the scale differs.
    weights = (~special).float()
    one = RSQQuantizer(bits=3, clip=False, importance="uniform").quantize(model, skipped)
    two = RSQQuantizer(bits=3, clip=False, r_min=0.0).quantize(model, {"input_ids": ids, "token_weights": weights})
    differing = [(one.matrices[n].codes != two.matrices[n].codes).double().mean() for n in one.matrices]
    assert max(differing) < 0.01
    rolled = skipped.expanded(2)
    assert rolled.given is None and torch.equal(rolled.weighed(), torch.cat([~special, ~special.roll(12, 1)]))


# ---- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"bits": 3.0}, "bits"), ({"grid": "x"}, "grid"),
        ({"group_size": 7}, "group_size: 7"), ({"importance": "loud"}, "importance"), ({"importance": "8_8"}, "chunk 8"),
        ({"r_min": 1.0}, "r_min"), ({"rotate": "spin"}, "rotate"), ({"rotate": None, "online": True}, "online"),
        ({"exclude": ("down_prj",)}, "fits 'down_prj'; nearest names: 'down_proj'"),
        ({"exclude": ("model.layers.7.mlp.down_proj",)}, "nearest names: 'model.layers.1.mlp.down_proj'"),
        ({"exclude": ("*",)}, "nothing to quantise"), ({"expand": 0}, "expand"), ({"percdamp": 0.0}, "percdamp"), ({"rounding": "up"}, "rounding"),
    ],
)  # fmt: skip
def test_bad_parameters(options, match) -> None:
    with pytest.raises(InputError, match=match):
        RSQQuantizer(**options).quantize(decoder("llama"), tokens())


@pytest.mark.parametrize("family", ["gpt2", "moe", "t5", "resnet", "plain"])
def test_other_families_are_refused(family) -> None:
    model = build(family)
    for work in (rotate_model, lambda m: RSQQuantizer().quantize(m, tokens())):
        with pytest.raises(InputError, match="llama, mistral, qwen2"):
            work(model)


def test_a_quantised_model_is_refused() -> None:
    model = decoder("llama")
    model.config.quantization_config = {"bits": 4}
    with pytest.raises(InputError, match="already"):
        RSQQuantizer().quantize(model, tokens())


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], NothingToDo, "no token"), (None, InputError, "calibration"), (torch.ones(2, 3), InputError, "input_ids"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}, NothingToDo, "no token"),
        (torch.ones(1, 65).long(), InputError, "65 tokens"), (torch.full((1, 4), VOCABULARY), DataError, "vocabulary"),
        ({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)}, InputError, "shape"),
    ],
)  # fmt: skip
def test_bad_calibration(batches, error, match) -> None:
    with pytest.raises(error, match=match):
        RSQQuantizer(clip=False).quantize(decoder("llama"), batches)


def test_what_is_not_finite_is_told_with_the_layer() -> None:
    model = decoder("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"model\.layers\.1"):
        RSQQuantizer(clip=False, rotate=None).quantize(model, tokens())
    model = decoder("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(DataError, match=r"model\.layers\.0"):
        RSQQuantizer(clip=False, rotate=None).quantize(model, tokens())


def test_worse_than_rounding_stops_with_the_name(monkeypatch) -> None:
    from salience.weights.rsq import solving

    def broken(*arguments):
        swept = sweep(*arguments)
        return swept._replace(errors=swept.errors * 100)

    sweep = solving._sweep
    monkeypatch.setattr(solving, "_sweep", broken)
    told = r"model\.layers\.0\.self_attn\.q_proj: .*rounding to nearest .*exclude.*percdamp"
    with pytest.raises(DataError, match=told):
        RSQQuantizer(clip=False).quantize(decoder("llama"), tokens())


def test_bad_matrices() -> None:
    W, X = problem(4, 8)
    H = weighted_hessian(X)
    for W_bad, H_bad, options, error, match in (
        (W, H[:4, :4], {}, InputError, "do not fit"), (W.int(), H, {}, InputError, "quantised already"),
        (W * torch.nan, H, {}, DataError, "here: its weights"), (W, H * torch.inf, {}, DataError, "here: its Hessian"),
        (W, -H, {}, DataError, "here: .*49 dampings"), (W, H, {"group_size": 3}, InputError, "group_size"),
        (W, H, {"percdamp": -1}, InputError, "percdamp"), (W[:, :0], H[:0, :0], {}, InputError, "do not fit"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            gptq_solve(W_bad, H_bad, Grid(3), name="here", **options)
    for X_bad, r_bad in ((X[:0], None), (X, torch.ones(2)), (X, -torch.ones(300)), (X, torch.zeros(300))):
        with pytest.raises(InputError):
            weighted_hessian(X_bad, r_bad)


def test_damaged_packed_directories(tmp_path) -> None:
    model = decoder("llama")
    save_packed(RSQQuantizer(bits=3, rounding="nearest", rotate=None, clip=False).quantize(model), tmp_path / "packed")
    with pytest.raises(InputError, match="exists"):
        save_packed(RSQQuantizer(bits=3, rounding="nearest", clip=False).quantize(model), tmp_path / "packed")
    config = tmp_path / "packed" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "intermediate_size": 64}))
    with pytest.raises(DataError, match="configuration"):
        load_packed(tmp_path / "packed")
    config.write_text(json.dumps({**told, "auto_map": {"AutoModel": "x.y"}}))
    with pytest.raises(DataError, match="auto_map"):
        load_packed(tmp_path / "packed")


@pytest.mark.parametrize(
    ("file", "name", "change", "match"),
    [
        ("codes", "codes", lambda t: t[:, :-1], r"codes: stored as"),
        ("codes", "codes", lambda t: torch.cat([t, t[:, :1]], 1), r"codes: stored as"),
        ("codes", "codes", lambda t: t[:-1], r"codes: stored as"),
        ("codes", "codes", lambda t: t.to(torch.int16), "bytes are wanted"),
        ("codes", "scale", lambda t: t[:, :1], "scale: stored as"),
        ("codes", "scale", lambda t: None, "scale: is not there"),
        ("codes", "zero", lambda t: None, "zero: is not there"),
        ("codes", "codes", lambda t: None, "no weights for"),
        ("codes", "more", lambda t: torch.ones(1), "no such weight"),
        ("rest", "", lambda t: t[:-1], "stored as"),
        ("rest", "", lambda t: None, "no weights for"),
        ("description", "bits", lambda t: 11, "of this version"),
        ("description", "group_size", lambda t: None, "of this version"),
    ],
)
def test_damaged_tensors(file, name, change, match, packed_asymmetric, tmp_path) -> None:
    shutil.copytree(packed_asymmetric, tmp_path / "packed")
    path = tmp_path / "packed" / ("rest.safetensors" if file == "rest" else "codes.safetensors")
    tensors, key = load_file(path), "model.norm.weight" if file == "rest" else f"model.layers.1.mlp.up_proj.{name}"
    with safe_open(path, "pt") as opened:
        described = dict(opened.metadata())
    if file == "description":
        told = json.loads(described["salience"])
        described["salience"] = json.dumps({**told, name: change(told[name])})
    else:
        changed = change(tensors.pop(key, None))
        tensors |= {} if changed is None else {key: changed.contiguous()}
    save_file(tensors, path, described)
    with pytest.raises(DataError, match=match):
        load_packed(tmp_path / "packed")


@pytest.fixture(scope="module")
def packed_asymmetric(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model"
    quantizer = RSQQuantizer(bits=3, rounding="nearest", rotate=None, clip=False, sym=False, group_size=16)
    save_packed(quantizer.quantize(decoder("llama")), path)
    load_packed(path)
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_what_fails_on_the_way_leaves_nothing(packed, tmp_path) -> None:
    model = decoder("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    (tmp_path / ".out.partial").mkdir()  # of a run that was killed
    with pytest.raises(DataError, match=r"model\.layers\.1"):
        quantizer = RSQQuantizer(clip=False, rotate=None)
        quantize_directory(tmp_path / "model", tmp_path / "out", tokens(), quantizer, packed=packed)
    with pytest.raises(InputError, match=r"folder .* does not exist"):
        quantize_directory(tmp_path / "model", tmp_path / "no" / "out", tokens(), RSQQuantizer(clip=False))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_packed_model_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch) -> None:
    from salience.weights.rsq import packing

    def full(*arguments) -> None:
        raise OSError("no space left")

    result = RSQQuantizer(rounding="nearest", rotate=None, clip=False).quantize(decoder("llama"))
    monkeypatch.setattr(packing, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_packed(result, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_scales_of_groups_spread() -> None:
    scales = Scales(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    assert spread(scales, 4).scale.tolist() == [[1, 1, 2, 2]]
    assert np.isclose(float(Grid(8).top), 255)
