"""Narrowed models save, load and run; a hostile list of shapes is refused with its place."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch import nn

from salience.errors import DataError, InputError
from salience.model import load, logits_of, run, save_narrowed
from salience.model.narrowing import SHAPES, differences, read_shapes, replace_tensors, reshape
from salience.weights import iterative_feature_merging
from tiny import build, directory_hash, example, plain, save

FAMILIES = ["llama", "qwen2", "gpt2", "vit", "resnet"]


def narrowed(family: str):
    model = build(family)
    inputs = example(family)
    return model, iterative_feature_merging(model, example=inputs, beta=2.0, max_ratio=0.25).model, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_back_to_the_bit(family: str, tmp_path, tokenizer) -> None:
    save(family, tmp_path / "in", tokenizer)
    before = directory_hash(tmp_path / "in")
    model, narrow, inputs = narrowed(family)
    listed = save_narrowed(model, narrow, tmp_path / "out", source=tmp_path / "in")
    assert listed is (family == "resnet") and (tmp_path / "out" / SHAPES).exists() is listed
    back = load(tmp_path / "out")
    assert type(back.model) is type(model) and back.processor is not None
    with torch.no_grad():
        assert torch.equal(logits_of(run(back.model, inputs)), logits_of(run(narrow, inputs)))
    assert {n: v.shape for n, v in back.model.state_dict().items()} == {
        n: v.shape for n, v in narrow.state_dict().items()
    }
    if family == "qwen2":
        assert back.model.lm_head.weight is back.model.model.embed_tokens.weight
    if not listed:
        again = type(model).from_pretrained(tmp_path / "out")
        with torch.no_grad():
            assert torch.equal(logits_of(run(again.eval(), inputs)), logits_of(run(narrow, inputs)))
    assert directory_hash(tmp_path / "in") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_widths_that_differ_need_the_list_and_plain_loading_fails_loudly(tmp_path) -> None:
    model, inputs = build("llama"), example("llama")
    narrow = iterative_feature_merging(
        model, example=inputs, beta=2.0, max_ratio=0.25, groups=["model.layers.0.*"]
    ).model
    assert save_narrowed(model, narrow, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(logits_of(run(load(tmp_path / "out").model, inputs)), logits_of(run(narrow, inputs)))
    with pytest.raises(Exception, match=r"gate_proj|mismatch|size"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    half = load(tmp_path / "out", dtype=torch.float16).model
    assert half.dtype == torch.float16


def test_a_file_with_its_architecture(tmp_path) -> None:
    model = plain().eval()
    inputs = torch.randn(2, 3, 16, 16)
    narrow = iterative_feature_merging(model, example=inputs, beta=2.0, max_ratio=0.5).model
    file = tmp_path / "net.safetensors"
    assert save_narrowed(model, narrow, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "net.safetensors.shapes.json"]
    assert torch.equal(load(file, arch="tiny:plain").model(inputs), narrow(inputs))
    with pytest.raises(InputError, match="exists"):
        save_narrowed(model, narrow, file)
    assert not save_narrowed(model, model, file, overwrite=True)  # as wide as before: no list is left behind
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert torch.equal(load(file, arch="tiny:plain").model(inputs), model(inputs))
    with pytest.raises(InputError, match="does not exist"):
        save_narrowed(model, narrow, tmp_path / "nowhere" / "net.safetensors")
    with pytest.raises(InputError, match=r"\.safetensors file"):
        save_narrowed(model, narrow, tmp_path / "folder")


@pytest.mark.parametrize("listed", [True, False])
def test_a_save_that_dies_halfway_is_never_loaded_as_something_else(listed: bool, tmp_path, monkeypatch) -> None:
    model = plain().eval()
    x = torch.randn(2, 3, 16, 16)
    narrow = iterative_feature_merging(model, example=x, beta=2.0, max_ratio=0.5).model
    file = tmp_path / "net.safetensors"
    save_narrowed(model, model if listed else narrow, file)
    real, calls = __import__("os").replace, []

    def dies(source, target):
        calls.append(target)
        if len(calls) == 2 or not listed:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("salience.model.saving.os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save_narrowed(model, narrow if listed else model, file, overwrite=True)
    if listed:  # the new list beside the old weights
        with pytest.raises(DataError):
            load(file, arch="tiny:plain")
    else:  # nothing has changed yet
        assert torch.equal(load(file, arch="tiny:plain").model(x), narrow(x))


def test_saving_refuses_what_it_must_not_replace(tmp_path) -> None:
    model, narrow, _ = narrowed("resnet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for overwrite, text in ((False, "exists"), (True, "not a model directory")):
        with pytest.raises(InputError, match=text):
            save_narrowed(model, narrow, tmp_path / "mine", overwrite=overwrite)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="a directory"):
        save_narrowed(model, narrow, tmp_path / "x.safetensors")


STEM = "resnet.embedder.embedder.convolution.weight"


@pytest.fixture
def folder(tmp_path):
    model, narrow, _ = narrowed("resnet")
    save_narrowed(model, narrow, tmp_path / "out")
    return tmp_path / "out"


def good(folder) -> dict:
    return json.loads((folder / SHAPES).read_text())


HOSTILE = {
    "not json": (lambda c: "{", "JSON"),
    "deep": (lambda c: "[" * 100_000 + "]" * 100_000, "JSON|deep"),
    "a list": (lambda c: [c], "must be an object"),
    "another key": (lambda c: c | {"code": "os.system"}, "nothing else"),
    "another version": (lambda c: c | {"salience_shapes": 2}, "version 2"),
    "true is no version": (lambda c: c | {"salience_shapes": True}, "version True"),
    "shapes is a list": (lambda c: c | {"shapes": []}, "'shapes' must map"),
    "identity of numbers": (lambda c: c | {"identity": [1]}, "'identity' must list"),
    "a size of 0": (lambda c: c | {"shapes": {STEM: [0, 3, 7, 7]}}, "positive sizes"),
    "a negative size": (lambda c: c | {"shapes": {STEM: [-6, 3, 7, 7]}}, "positive sizes"),
    "a huge size": (lambda c: c | {"shapes": {STEM: [2**40, 3, 7, 7]}}, "positive sizes"),
    "a fraction": (lambda c: c | {"shapes": {STEM: [6.0, 3, 7, 7]}}, "positive sizes"),
    "a bool": (lambda c: c | {"shapes": {STEM: [True, 3, 7, 7]}}, "positive sizes"),
    "no sizes": (lambda c: c | {"shapes": {STEM: []}}, "positive sizes"),
    "wider than announced": (lambda c: c | {"shapes": {STEM: [2**30, 3, 7, 7]}}, "must lie within"),
    "other dimensions": (lambda c: c | {"shapes": {STEM: [6, 147]}}, "must lie within"),
    "a stranger": (lambda c: c | {"shapes": {"../../etc/passwd": [1]}}, "no tensor of a layer"),
    "a method": (lambda c: c | {"shapes": {"forward.bias": [1]}}, "no tensor of a layer"),
    "a new bias of a norm": (lambda c: c | {"shapes": {**c["shapes"], "resnet.bias": [6]}}, "no tensor of a layer"),
    "a bias that is too long": (
        lambda c: c | {"shapes": {**c["shapes"], STEM.replace("weight", "bias"): [9]}}, "new bias|fit together"),
    "a bias that does not fit": (
        lambda c: c | {"shapes": {**c["shapes"], STEM.replace("weight", "bias"): [2]}}, "fit together"),
    "a kernel that shrinks": (lambda c: c | {"shapes": {STEM: [8, 3, 3, 3]}}, "fit together"),
    "a convolution as identity": (
        lambda c: c | {"identity": ["resnet.embedder.embedder.convolution"]}, "no batch normalisation"),
    "the model as identity": (lambda c: c | {"identity": [""]}, "no batch normalisation"),
    "narrower than what is stored": (
        lambda c: c | {"shapes": {**c["shapes"], "classifier.1.weight": [3, 2]}}, "cannot be loaded|size"),
    "nothing is narrow": (lambda c: c | {"shapes": {}, "identity": []}, "cannot be loaded|size|no place"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_list_is_refused(case: str, folder) -> None:
    change, text = HOSTILE[case]
    content = change(good(folder))
    (folder / SHAPES).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=text):
        load(folder)


def test_a_list_cannot_ask_for_memory(folder, monkeypatch) -> None:
    """A configuration of a huge network is refused before anything of that size is allocated."""
    config = json.loads((folder / "config.json").read_text())
    config["hidden_sizes"] = [200_000, 400_000]
    config["embedding_size"] = 200_000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="exhaust memory"):
        load(folder)


def test_tied_weights_cannot_be_listed(tmp_path) -> None:
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps({"salience_shapes": 1, "shapes": {"one.weight": [2, 4]}, "identity": []}))
    from tiny import pair

    with pytest.raises(DataError, match="tied"):
        reshape(pair(), read_shapes(file), str(file))


def test_the_list_is_the_difference() -> None:
    model, narrow, _ = narrowed("resnet")
    shapes = differences(model, narrow)
    with torch.device("meta"):
        wide = type(model)._from_config(model.config)
    reshape(wide, shapes)
    assert {n: v.shape for n, v in wide.state_dict().items()} == {n: v.shape for n, v in narrow.state_dict().items()}
    assert differences(model, model) == ({}, ())


def test_sizes_within_a_layer_must_fit() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(InputError, match="'0'"):
        replace_tensors(net, {"0.weight": torch.zeros(2, 3)})
