"""Model directories that channels and units were merged in: they load whole, stay tied, and the inputs stay as they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.conftest import tokenizer as tokenizer
from salience.model import load, logits_of, run, save_narrowed
from salience.weights import infer_spec, iterative_feature_merging
from salience.weights.weight_matching.measured import merge_permuted
from tiny import build, directory_hash, example, save

FAMILIES = ["llama", "qwen2", "gpt2", "vit", "resnet"]
SHARDS = ["50GB", "20KB"]


def outputs(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(run(model, example(family)))


def loads_whole(path: Path, family: str) -> torch.nn.Module:
    """The model as `from_pretrained` gives it, with no key missing and none left over."""
    model, info = type(build(family)).from_pretrained(path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    if family in ("qwen2", "gpt2"):
        assert model.lm_head.weight is model.get_input_embeddings().weight
    return model.eval()


def kept_beside(source: Path, out: Path) -> None:
    """What belongs to a model and is not its weights comes along."""
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).exists() == (source / name).exists(), name


@pytest.mark.parametrize("shard_size", SHARDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_families_load_whole(family: str, shard_size: str, tmp_path: Path, tokenizer) -> None:
    save(family, tmp_path / "in", None if family in ("vit", "resnet") else tokenizer, shard_size)
    before, wide = directory_hash(tmp_path / "in"), load(tmp_path / "in").model
    result = iterative_feature_merging(wide, example=example(family), beta=math.inf, max_ratio=0.5)
    listed = save_narrowed(wide, result.model, tmp_path / "out", source=tmp_path / "in")
    assert directory_hash(tmp_path / "in") == before
    # Widths that the configuration cannot tell are listed in a file of ours, which `load` reads.
    back = load(tmp_path / "out").model if listed else loads_whole(tmp_path / "out", family)
    assert listed == (family == "resnet")
    assert {n: v.shape for n, v in back.state_dict().items()} == {
        n: v.shape for n, v in result.model.state_dict().items()
    }
    assert back.dtype == wide.dtype and torch.equal(outputs(back, family), outputs(result.model, family))
    assert sum(p.numel() for p in back.parameters()) < sum(p.numel() for p in wide.parameters())
    stored: set[str] = set()
    for file in (tmp_path / "out").glob("*.safetensors"):
        stored |= set(load_file(file))
    tied = {"lm_head.weight"} if family in ("qwen2", "gpt2") else set()
    if family != "vit":  # stored under other names than in memory
        assert stored == set(result.model.state_dict()) - tied
    kept_beside(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("shard_size", SHARDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_means_of_families_load_whole(family: str, shard_size: str, tmp_path: Path, tokenizer) -> None:
    from salience.weights import apply_permutation

    words = None if family in ("vit", "resnet") else tokenizer
    model = save(family, tmp_path / "one", words, shard_size)
    spec = infer_spec(model, example(family))
    draw = torch.Generator().manual_seed(3)
    orders = {name: torch.randperm(size, generator=draw) for name, size in spec.sizes.items()}
    other = build(family)
    other.load_state_dict(apply_permutation(spec, orders, model.state_dict()))
    other.save_pretrained(tmp_path / "two", max_shard_size=shard_size)
    if words is not None:
        words.save_pretrained(tmp_path / "two")
    hashes = {name: directory_hash(tmp_path / name) for name in ("one", "two")}
    merge_permuted(
        [tmp_path / "one", tmp_path / "two"], tmp_path / "out", evaluation=None, example=example(family), seed=1
    )
    assert {name: directory_hash(tmp_path / name) for name in hashes} == hashes
    back = loads_whole(tmp_path / "out", family)
    # The same network in another order of its units: the mean, lined up, is that network, in its buffers too.
    for name, value in back.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)
    torch.testing.assert_close(outputs(back, family), outputs(model, family), rtol=1e-4, atol=1e-4)
    assert back.dtype == model.dtype
    kept_beside(tmp_path / "one", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype: torch.dtype, tmp_path: Path) -> None:
    save("qwen2", tmp_path / "one", dtype=dtype)
    save("qwen2", tmp_path / "two", dtype=dtype)
    merge_permuted([tmp_path / "one", tmp_path / "two"], tmp_path / "mean", evaluation=None, example=example("qwen2"))
    wide = load(tmp_path / "one").model
    result = iterative_feature_merging(wide, example=example("qwen2"), beta=math.inf, max_ratio=0.5)
    save_narrowed(wide, result.model, tmp_path / "narrow", source=tmp_path / "one")
    for name in ("one", "mean", "narrow"):
        stored = load_file(tmp_path / name / "model.safetensors")
        assert {value.dtype for value in stored.values()} == {dtype}, name
