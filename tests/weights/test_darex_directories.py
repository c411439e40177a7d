"""Pruning and merging of model directories: closed forms, guards, families, and a peer's figures."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from salience.errors import DataError, InputError
from salience.model import load, logits_of, run
from salience.weights import DeltaPruner, check_pair, merge_directories, prune_directory
from salience.weights.darex.blocks import add_scaled
from salience.weights.darex.deltas import keep_mask, mask_seed
from tiny import FAMILIES, build, directory_hash, example, save

MERGED = ["llama", "qwen2", "gpt2", "vit", "resnet"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="[UNK]")


def write(family, path, seed=None, tokenizer=None, shard_size="50GB", dtype=torch.float32):
    """The tiny model, with `seed` fine-tuned at random."""
    model = build(family)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    model.to(dtype).save_pretrained(path, max_shard_size=shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return model


def stored(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("family", MERGED)
def test_families_load_after_pruning_and_merging(family, shard_size, tmp_path, tokenizer):
    words = None if family in ("vit", "resnet") else tokenizer
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write(family, tmp_path / name, seed, words, shard_size)
    hashes = {name: directory_hash(tmp_path / name) for name in ("base", "one", "two")}
    pair = check_pair(tmp_path / "base", tmp_path / "one")
    prune_directory(tmp_path / "base", tmp_path / "one", tmp_path / "pruned", pair.names, rate=0.9)
    both = [tmp_path / "one", tmp_path / "two"]
    merge_directories(both, tmp_path / "linear")
    merge_directories(both, tmp_path / "darex", base=tmp_path / "base", method="darex", q=0.3)
    for name in ("pruned", "linear", "darex"):
        cls = type(build(family))
        model, info = cls.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        assert torch.isfinite(logits_of(run(model.eval(), example(family)))).all()
        if family in ("qwen2", "gpt2"):
            assert model.lm_head.weight is model.get_input_embeddings().weight
        assert {f.name for f in (tmp_path / name).iterdir()} == {f.name for f in (tmp_path / "one").iterdir()}
    assert {name: directory_hash(tmp_path / name) for name in hashes} == hashes


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # a ViT is stored under other names than it has in memory
def test_a_directory_is_pruned_as_a_model_in_memory(family, tmp_path):
    base, tuned = write(family, tmp_path / "base"), write(family, tmp_path / "tuned", 1)
    pair = check_pair(tmp_path / "base", tmp_path / "tuned")
    pruner = DeltaPruner(rate=0.8, rescale=0.5, random_state=4).fit(base, tuned)
    assert set(pair.names) == set(pruner.names_)
    assert pair.stats is not None and pair.stats.std == pytest.approx(pruner.delta_stats_.std, rel=1e-5)
    prune_directory(
        tmp_path / "base", tmp_path / "tuned", tmp_path / "out", pair.names, rate=0.8, q=0.5, seed=pruner._final_seed
    )
    expected, out = pruner.apply(), load(tmp_path / "out").model
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(out.get_parameter(name), parameter, msg=name)


def test_merges_are_their_closed_forms(tmp_path):
    models = {name: write("llama", tmp_path / name, seed) for name, seed in (("base", None), ("one", 1), ("two", 2))}
    base, one, two = (models[name].state_dict() for name in ("base", "one", "two"))
    both = [tmp_path / "one", tmp_path / "two"]

    def merged(**options):
        merge_directories(both, tmp_path / "out", overwrite=True, **options)
        return stored(tmp_path / "out")

    linear, weighted = merged(), merged(weights=[3, 1])
    task = merged(base=tmp_path / "base", method="task", weights=[0.7, 0.9])
    dare = merged(base=tmp_path / "base", method="dare", rate=0.6, weights=[1, 1], seed=8)
    for name, b in base.items():
        torch.testing.assert_close(linear[name], (one[name] + two[name]) / 2, msg=name)
        torch.testing.assert_close(weighted[name], (3 * one[name] + two[name]) / 4, msg=name)
        torch.testing.assert_close(task[name], b + 0.7 * (one[name] - b) + 0.9 * (two[name] - b), msg=name)
        if ".self_attn." in name or ".mlp." in name:
            first, second = (keep_mask(seed, name, b.shape, 0.4) for seed in (mask_seed(8, 0), mask_seed(8, 1)))
            expected = b + (first * (one[name] - b) + second * (two[name] - b)) / 0.4
        else:
            expected = one[name] + two[name] - b
        torch.testing.assert_close(dare[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_darex_with_all_kept_is_task_arithmetic(tmp_path):
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write("gpt2", tmp_path / name, seed)
    both, base = [tmp_path / "one", tmp_path / "two"], tmp_path / "base"
    merge_directories(both, tmp_path / "task", base=base, method="task")
    merge_directories(both, tmp_path / "darex", base=base, method="darex", rate=0.0, q=1.0)
    for (name, a), b in zip(stored(tmp_path / "task").items(), stored(tmp_path / "darex").values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_half_precision_is_summed_in_float32_and_stays_half(tmp_path):
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write("llama", tmp_path / name, seed, dtype=torch.bfloat16)
    merge_directories([tmp_path / "one", tmp_path / "two"], tmp_path / "out", base=tmp_path / "base", method="task")
    base, one, two = (stored(tmp_path / name) for name in ("base", "one", "two"))
    for name, out in stored(tmp_path / "out").items():
        b = base[name].float()
        expected = b + 0.5 * (one[name].float() - b) + 0.5 * (two[name].float() - b)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-6)


def test_magnitude_keeps_the_largest_share_of_each_tensor(tmp_path):
    base, tuned = write("llama", tmp_path / "base"), write("llama", tmp_path / "tuned", 1)
    pair = check_pair(tmp_path / "base", tmp_path / "tuned")
    prune_directory(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", pair.names, rate=0.9, method="magnitude")
    out = stored(tmp_path / "out")
    for name in pair.names:
        delta = tuned.get_parameter(name) - base.get_parameter(name)
        kept = out[name] != base.get_parameter(name)
        assert abs(int(kept.sum()) - 0.1 * delta.numel()) <= 1
        assert delta[kept].abs().min() >= delta[~kept].abs().max()


def test_running_statistics_are_averaged_and_counters_kept(tmp_path):
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write("resnet", tmp_path / name, seed)
        tensors = stored(tmp_path / name)
        for key in tensors:
            if key.endswith("running_var"):
                tensors[key] += seed or 0
            if key.endswith("num_batches_tracked"):
                tensors[key] += seed or 0
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    merge_directories(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", base=tmp_path / "base", method="dare", rate=0.9,
        weights=[1, 1],
    )  # fmt: skip
    one, out = stored(tmp_path / "one"), stored(tmp_path / "out")
    for name, value in out.items():
        if name.endswith("running_var"):
            torch.testing.assert_close(value, one[name] + 0.5)
        if name.endswith("num_batches_tracked"):
            assert value == one[name]


def change_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rename(path):
    tensors = stored(path)
    tensors["model.layers.0.mlp.other.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def reshape(path):
    tensors = stored(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def other_words(path):
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {"b": 0, "a": 1, "[UNK]": 2}
    file.write_text(json.dumps(content))


def quantise(path):
    tensors = stored(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (rename, "has no tensor"),
        (reshape, r"has shape .*\(4[78], 32\)"),
        (other_words, "different tokenizers"),
        (lambda path: change_config(path, vocab_size=321), "vocabulary"),
        (lambda path: change_config(path, model_type="mistral"), "architecture"),
        (quantise, "dequantise"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "dare"])
def test_pairs_that_differ_in_one_respect_are_refused_before_anything_is_written(
    change, match, method, tmp_path, tokenizer
):
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write("llama", tmp_path / name, seed, tokenizer)
    change(tmp_path / "two")
    options = {} if method == "linear" else {"base": tmp_path / "base", "method": method}
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=match):
        merge_directories([tmp_path / "one", tmp_path / "two"], tmp_path / "out", **options)
    with pytest.raises(DataError, match=match):
        check_pair(tmp_path / "two", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_base_of_another_kind_is_refused(tmp_path):
    write("llama", tmp_path / "one", 1)
    write("llama", tmp_path / "two", 2)
    write("gpt2", tmp_path / "base")
    with pytest.raises(DataError, match="architecture"):
        merge_directories([tmp_path / "one", tmp_path / "two"], tmp_path / "out", base=tmp_path / "base", method="task")


def test_results_that_are_not_finite_are_refused_with_the_tensor(tmp_path):
    write("llama", tmp_path / "one", 1)
    write("llama", tmp_path / "two", 2)
    tensors = stored(tmp_path / "two")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.inf
    save_file(tensors, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        merge_directories([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
        check_pair(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "out").exists()


def test_grown_vocabularies_keep_their_new_rows(tmp_path):
    write("vit", tmp_path / "base")
    with pytest.raises(DataError, match="shape"):
        tensors = stored(tmp_path / "base")
        name = next(name for name in tensors if tensors[name].ndim == 2 and "classifier" not in name)
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
        shutil.copytree(tmp_path / "base", tmp_path / "wide")
        save_file(tensors, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
        check_pair(tmp_path / "base", tmp_path / "wide")  # not a vocabulary
    from transformers import BertConfig, BertModel

    def bert(size):
        torch.manual_seed(0)
        settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return BertModel(BertConfig(vocab_size=size, **settings))

    base, tuned = bert(20), bert(23)
    base.save_pretrained(tmp_path / "small")
    tuned.save_pretrained(tmp_path / "large")
    pair = check_pair(tmp_path / "small", tmp_path / "large")
    prune_directory(tmp_path / "small", tmp_path / "large", tmp_path / "out", pair.names, rate=0.99)
    words = stored(tmp_path / "out")["embeddings.word_embeddings.weight"]
    assert torch.equal(words[20:], tuned.embeddings.word_embeddings.weight[20:])
    kept = (words[:20] != base.embeddings.word_embeddings.weight).double().mean()
    assert 0 < kept < 0.06
    prune_directory(tmp_path / "small", tmp_path / "large", tmp_path / "top", pair.names, rate=0.99, method="magnitude")
    words = stored(tmp_path / "top")["embeddings.word_embeddings.weight"]
    assert torch.equal(words[20:], tuned.embeddings.word_embeddings.weight[20:])
    with pytest.raises(DataError, match="vocabulary"):
        merge_directories([tmp_path / "small", tmp_path / "large"], tmp_path / "merged")


def test_options(tmp_path):
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        write("gpt2", tmp_path / name, seed)
    both, base = [tmp_path / "one", tmp_path / "two"], tmp_path / "base"
    for arguments, match in (
        ({"models": both[:1]}, "two or more"),
        ({"models": both, "weights": [1.0]}, "weights"),
        ({"models": both, "weights": [1.0, math.nan]}, "weights"),
        ({"models": both, "weights": [1.0, -1.0]}, "zero"),
        ({"models": both, "method": "task"}, "base"),
        ({"models": both, "base": base}, "base"),
        ({"models": both, "base": base, "method": "darex"}, "q: is needed"),
        ({"models": both, "base": base, "method": "dare", "rate": 1.0}, "p: got"),
    ):
        with pytest.raises(InputError, match=match):
            merge_directories(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(MERGED)))
def test_other_families_merge_too(family, tmp_path):
    model = write(family, tmp_path / "one", 1)
    write(family, tmp_path / "two", 1)
    merge_directories([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    out = load(tmp_path / "out").model
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(out.get_parameter(name), parameter, msg=name)


def test_the_result_does_not_depend_on_the_shards(tmp_path):
    for size, name in (("50GB", "whole"), ("20KB", "cut")):
        for each, seed in (("base", None), ("one", 1), ("two", 2)):
            write("llama", tmp_path / name / each, seed, shard_size=size)
        both = [tmp_path / name / "one", tmp_path / name / "two"]
        merge_directories(both, tmp_path / name / "out", base=tmp_path / name / "base", method="dare", seed=3)
    whole, cut = stored(tmp_path / "whole" / "out"), stored(tmp_path / "cut" / "out")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert len(list((tmp_path / "cut" / "out").glob("*.safetensors"))) > 1


def test_the_tuned_model_is_left_alone(tmp_path):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    write("llama", tmp_path / "tuned", 1)
    save("llama", tmp_path / "base")
    pair = check_pair(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(InputError, match="must not contain"):
        prune_directory(tmp_path / "base", tmp_path / "tuned", tmp_path / "base", pair.names, rate=0.5)
    for name, value in stored(tmp_path / "base").items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("name", ["base", "one", "two", "two/inside", "."])
def test_no_input_is_ever_overwritten(name, tmp_path):
    for each, seed in (("base", None), ("one", 1), ("two", 2)):
        write("gpt2", tmp_path / each, seed)
    before = {each: directory_hash(tmp_path / each) for each in ("base", "one", "two")}
    base, one, two = (tmp_path / each for each in ("base", "one", "two"))
    with pytest.raises(InputError, match="must not contain each other"):
        merge_directories([one, two], tmp_path / name, base=base, method="task", overwrite=True)
    if not name.startswith("two"):
        pair = check_pair(base, one)
        for method in ("random", "magnitude"):
            with pytest.raises(InputError, match="must not contain each other"):
                prune_directory(base, one, tmp_path / name, pair.names, rate=0.5, method=method, overwrite=True)
    assert {each: directory_hash(tmp_path / each) for each in before} == before


def bert_or_vit(name):
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if name.startswith("ViT"):
        return getattr(t, name)(t.ViTConfig(image_size=16, patch_size=8, num_labels=3, **small))
    return getattr(t, name)(t.BertConfig(vocab_size=30, num_labels=4, **small))


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        ("BertForPreTraining", "BertForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("BertForMaskedLM", "BertForSequenceClassification",
         {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}),
        ("BertModel", "BertForTokenClassification", {"classifier.weight", "classifier.bias"}),
        ("BertForMaskedLM", "BertModel", {"pooler.dense.weight", "pooler.dense.bias"}),
        ("ViTModel", "ViTForImageClassification", {"classifier.weight", "classifier.bias"}),
    ],
)  # fmt: skip
def test_a_base_may_have_another_head(before, after, added, tmp_path):
    """The paper's own setting: a pre-trained model, and the same body fine-tuned with a new head."""
    base, tuned = bert_or_vit(before), bert_or_vit(after)
    core = {name: value for name, value in getattr(base, base.base_model_prefix, base).state_dict().items()}
    body = getattr(tuned, tuned.base_model_prefix, tuned)
    body.load_state_dict(core, strict=False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    tuned.save_pretrained(tmp_path / "two")
    pair = check_pair(tmp_path / "base", tmp_path / "one")
    assert set(pair.added) == added and pair.stats.std == pytest.approx(0.02, rel=0.1)
    one = stored(tmp_path / "one")
    assert set(pair.names) == one.keys() - added
    prune_directory(tmp_path / "base", tmp_path / "one", tmp_path / "out", pair.names, rate=0.9, q=1.0)
    out = stored(tmp_path / "out")
    for name in added:
        assert torch.equal(out[name], one[name])
    kept = torch.cat([(out[name] == one[name]).flatten() for name in pair.names]).double().mean()
    assert 0.08 < kept < 0.12
    both = [tmp_path / "one", tmp_path / "two"]
    merge_directories(both, tmp_path / "sum", base=tmp_path / "base", method="task", weights=[1, 0])
    for name, value in stored(tmp_path / "sum").items():
        torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-6, msg=name)
    merge_directories(both, tmp_path / "dare", base=tmp_path / "base", method="dare", rate=0.5)
    base, tuned = load(tmp_path / "base").model, load(tmp_path / "one").model
    pruner = DeltaPruner(rate=0.5, method="dare").fit(base, tuned)
    assert len(pruner.names_) == len(pair.names)


def test_a_missing_layer_is_no_head(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertModel

    for name, cls, layers in (("small", BertForMaskedLM, 2), ("large", BertModel, 3)):
        settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
        cls(BertConfig(num_hidden_layers=layers, **settings)).save_pretrained(tmp_path / name)
    for pair in (("small", "large"), ("large", "small")):
        with pytest.raises(DataError, match=r"has no tensor .*layer\.2"):
            check_pair(*(tmp_path / name for name in pair))


def test_tokenizers_are_the_same_however_merges_are_written(tmp_path):
    content = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    for name, seed in (("one", 1), ("two", 2)):
        write("llama", tmp_path / name, seed)
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        content["model"]["merges"] = [["a", "b"]]
    (tmp_path / "one" / "merges.txt").write_text("#version: 0.2\na b\n# #\n")
    (tmp_path / "two" / "merges.txt").write_text("a b\n# #")
    check_pair(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "merges.txt").write_text("a b")
    with pytest.raises(DataError, match="different tokenizers"):
        check_pair(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_added_as_plainly_written(masked):
    draw = np.random.default_rng(0)
    result, base, tuned = (draw.standard_normal(1001).astype(np.float32) for _ in range(3))
    mask = draw.random(1001) < 0.3 if masked else None
    expected = result + (tuned - base) * (1 if mask is None else mask) * np.float32(0.7)
    torch_of = torch.from_numpy
    add_scaled(torch_of(result), torch_of(base), torch_of(tuned), 0.7, mask)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)
    own = base.copy()  # the result may be the base itself
    add_scaled(torch_of(base), torch_of(base), torch_of(tuned), 0.7, mask)
    np.testing.assert_allclose(base, own + (tuned - own) * (1 if mask is None else mask) * 0.7, rtol=1e-6, atol=1e-6)
    if mask is not None:  # what is not finite does not hide behind the mask
        tuned[np.flatnonzero(~mask)[0]] = np.nan
        add_scaled(torch_of(base), torch_of(base), torch_of(tuned), 0.7, mask)
        assert np.isnan(base).sum() == 1


CHILD = """
import sys
from pathlib import Path
from salience.weights.darex.directories import Pair, merge_directories, prune_directory
from salience.weights.darex.measured import _restored, _write_delta
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
what, folder = sys.argv[1], Path(sys.argv[2])
base, tuned, names = folder / "base", folder / "tuned", [f"w{i}" for i in range(12)]
record = {"method": "dare", "rate": 0.5, "q": None, "mask seed": 1}
before = peak()
if what == "write": _write_delta(base, tuned, folder / "d.safetensors", Pair(names, False, None, []), record)
elif what == "read": _restored(folder / "d.safetensors", base, folder / "restored")
elif what == "prune": prune_directory(base, tuned, folder / "pruned", names, rate=0.5, seed=1)
else: merge_directories([base, tuned], folder / "merged")
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path):
    """Models of 12 tensors of 8 MB, and a delta file of as much."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        draw = torch.Generator().manual_seed(len(name))
        tensors = {f"w{i}": torch.randn(2_000_000, generator=draw) for i in range(12)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    for what in ("write", "read", "prune", "merge"):
        done = subprocess.run(
            [sys.executable, "-c", CHILD, what, str(tmp_path)], capture_output=True, check=True, text=True
        )
        assert float(done.stdout) < 72, what  # MB: the models have 96 each, the delta file 96
    assert (tmp_path / "d.safetensors").stat().st_size > 90e6
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "restored"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
