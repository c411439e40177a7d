"""Every way in which a model directory has run code is refused before a loader sees it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch

from salience.errors import DataError, InputError
from salience.model import check_directory, load
from tiny import save


@pytest.fixture(scope="module")
def good(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("good")
    save("llama", path, tokenizer)
    return path


@pytest.fixture
def directory(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def edit(file, **entries):
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(entries)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that hostile code would create, and the code that would."""
    file = tmp_path / "canary"
    yield file, f"import pathlib; pathlib.Path({str(file)!r}).touch()\n"
    assert not file.exists(), "code from the model directory ran"


def test_a_good_directory_passes_and_loads(good):
    assert check_directory(good) == good.resolve()
    assert type(load(good).model).__name__ == "LlamaForCausalLM"


REMOTE = {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}
HOSTILE = {
    "auto_map": ("config.json", {"auto_map": REMOTE}),
    "auto_map in tokenizer": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}},
    ),
    "auto_map of a processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "modeling_x.X"}}),
    "auto_map of generation": ("generation_config.json", {"deep": [{"auto_map": REMOTE}]}),
    "CVE-2026-4372": ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
    "kernel, plain field": ("config.json", {"attn_implementation": "someone/kernel@main:fn"}),
    "kernel per sub-model": ("config.json", {"_attn_implementation": {"": "sdpa", "text_config": "a/b"}}),
    "kernel in nested config": ("config.json", {"text_config": {"_attn_implementation_internal": "a/b"}}),
    "unknown attention": ("config.json", {"attn_implementation": "registered_by_someone"}),
    "kernel in disguise": ("config.json", {"_attn_implementation": "paged|a/b"}),
    "CVE-2026-5241": ("config.json", {"text_config": {"trust_remote_code": True, "model_type": "llama"}}),
    "trust as a number": ("config.json", {"backbone_kwargs": [{"trust_remote_code": 1}]}),
    "CVE-2026-44513": ("model_index.json", {"_class_name": ["pipeline_x", "X"]}),
    "custom_pipeline": ("model_index.json", {"custom_pipeline": "someone/pipeline"}),
    "custom_pipelines": ("config.json", {"custom_pipelines": {"x": {"impl": "modeling_x.X"}}}),
    "router types": ("router_config.json", {"types": {"0_X": "modeling_x.X"}}),
    "activation": ("2_Dense/config.json", {"activation_function": "modeling_x.X"}),
    "weights elsewhere": ("config.json", {"transformers_weights": "../other/model.safetensors"}),
    "shards elsewhere": ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}),
    "adapter": ("adapter_config.json", {"base_model_name_or_path": "someone/model"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configuration_is_refused_and_runs_nothing(name, directory, canary):
    file, entries = HOSTILE[name]
    (directory / "modeling_x.py").write_text(canary[1])
    edit(directory / file, **entries)
    for loader in (check_directory, load):
        with pytest.raises(DataError, match=file.replace(".", r"\.")):
            loader(directory)


@pytest.mark.parametrize(
    "module",
    [
        {"idx": 0, "name": "0", "path": "", "type": "modeling_x.X"},  # CVE-2026-68770
        {"idx": 0, "name": "0", "path": "../up", "type": "sentence_transformers.models.Pooling"},
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_x.X"},
    ],
)
def test_sentence_transformers_modules_from_the_directory_are_refused(module, directory, canary):
    (directory / "modeling_x.py").write_text(canary[1])
    (directory / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(DataError, match=r"modules\.json"):
        load(directory)


def test_python_files_beside_a_pipeline_are_refused(directory, canary):
    edit(directory / "model_index.json", _class_name="StableDiffusionPipeline", unet=["my_unet", "UNet"])
    (directory / "unet").mkdir()
    (directory / "unet" / "my_unet.py").write_text(canary[1])
    with pytest.raises(DataError, match="Python files"):
        check_directory(directory)


def test_harmless_lookalikes_pass(directory):
    edit(directory / "config.json", auto_map=None, trust_remote_code=False, _attn_implementation="eager")
    edit(directory / "vocab.json", auto_map=7, trust_remote_code=8)  # tokens of a code model
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    edit(directory / "1_Dense" / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    edit(directory / "2" / "config.json", activation_function="gelu_new")
    assert check_directory(directory) == directory


class Bomb:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (open, (self.canary, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pkl", "m.ckpt", "m.pt2", "m.joblib", "m.pth"])
def test_pickles_are_refused_unread(name, directory, canary, tmp_path):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(pickle.dumps(Bomb(canary[0])))
    with pytest.raises(DataError, match="save_pretrained"):
        load(directory)
    with pytest.raises(InputError, match=r"not a \.safetensors"):
        load(directory / name, arch="tiny:plain")


def test_a_numpy_pickle_as_model_file_is_refused(canary, tmp_path):
    np.save(tmp_path / "m.npy", np.array([Bomb(canary[0])], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a \.safetensors"):
        load(tmp_path / "m.npy", arch="tiny:plain")


def test_a_pickle_beside_safetensors_is_left_unread(directory, canary):
    (directory / "training_args.bin").write_bytes(pickle.dumps(Bomb(canary[0])))
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary[0])))
    assert load(directory).model is not None
    assert not canary[0].exists()


def test_a_pickle_called_safetensors_is_refused(directory, canary):
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb(canary[0])))
    with pytest.raises(DataError, match=r"model\.safetensors"):
        load(directory)


def test_links_that_leave_the_directory_are_refused(directory, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    for link, target in [
        ("extra.json", "../secret.json"),
        ("folder", tmp_path),
        ("gone.json", "nowhere"),
    ]:
        (directory / link).symlink_to(target)
        with pytest.raises(DataError, match=link):
            check_directory(directory)
        (directory / link).unlink()
    (directory / "inner.json").symlink_to("config.json")
    check_directory(directory)


def test_the_layout_of_the_hugging_face_cache_loads(good, tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(good.iterdir())):
        shutil.copyfile(file, repo / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    loaded = load(snapshot)
    assert loaded.processor("the cat")["input_ids"] == load(good).processor("the cat")["input_ids"]
    (repo / "other").write_text("{}")  # in the cache, yet no blob
    (snapshot / "more.json").symlink_to("../../other")
    with pytest.raises(DataError, match="outside"):
        check_directory(snapshot)


def test_special_files_are_refused(directory):
    os.mkfifo(directory / "pipe.json")
    with pytest.raises(DataError, match="pipe"):
        check_directory(directory)


@pytest.mark.parametrize("depth", [65, 900, 200_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("pair", [("[", "]"), ('{"attn_implementation":', "}")])
def test_deep_json_is_refused(depth, name, pair, directory):
    (directory / name).write_text(pair[0] * depth + "1" + pair[1] * depth)
    with pytest.raises(DataError, match=name):
        check_directory(directory)


def test_json_up_to_the_limit_passes(directory):
    (directory / "extra.json").write_text("[" * 63 + "1" + "]" * 63)
    assert check_directory(directory) == directory


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b""])
def test_broken_json_is_refused(content, directory):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(DataError, match="not valid JSON"):
        check_directory(directory)


def test_header_bombs_and_cut_off_weights_are_refused(directory):
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:5], (2**40).to_bytes(8, "little") + whole[8:]):
        weights.write_bytes(content)
        with pytest.raises(DataError, match="not a whole"):
            check_directory(directory)
    with open(weights, "wb") as stream:  # a hole: the file claims to be large and occupies nothing
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    with pytest.raises(DataError, match="over the limit"):
        check_directory(directory)
    weights.write_bytes(whole[:-10])
    with pytest.raises(DataError):
        load(directory)


def test_a_large_json_is_refused(directory):
    with open(directory / "big.json", "wb") as stream:
        stream.truncate(100_000_001)
    with pytest.raises(DataError, match="100000000"):
        check_directory(directory)


@pytest.mark.parametrize("name", ["gpt2", "someone/model", "/nowhere/at/all"])
def test_hub_names_are_not_downloaded(name, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(InputError, match="hf download"):
        load(name)


def test_loading_opens_no_socket(good, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert isinstance(load(good).model.lm_head.weight, torch.Tensor)
