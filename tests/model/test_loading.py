from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

from salience.errors import DataError, InputError
from salience.model import load, logits_of, run
from tiny import FAMILIES, Pair, Plain, build, example, save


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_gives_back_the_same_model(family, tmp_path):
    model = save(family, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.model) is type(model)
    assert not loaded.model.training
    assert loaded.processor is None
    inputs = example(family)
    with torch.no_grad():
        assert torch.equal(logits_of(run(loaded.model, inputs)), logits_of(run(model, inputs)))


def test_the_processor_comes_along(tmp_path, tokenizer):
    save("llama", tmp_path / "text", tokenizer)
    assert load(tmp_path / "text").processor("what counts")["input_ids"] == tokenizer("what counts")["input_ids"]
    save("vit", tmp_path / "image")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "image" / "preprocessor_config.json").write_text(json.dumps(settings))
    import numpy as np

    pixels = load(tmp_path / "image").processor(np.zeros((40, 30, 3), np.uint8), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 16, 16)


def test_dtype_is_that_of_the_directory_unless_said(tmp_path):
    save("llama", tmp_path, dtype=torch.bfloat16)
    assert load(tmp_path).model.dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).model.dtype == torch.float32
    with pytest.raises(InputError, match="dtype"):
        load(tmp_path, dtype="float32")


def test_attention_is_set_explicitly(tmp_path):
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    assert load(tmp_path).model.config._attn_implementation == "sdpa"


def test_every_safe_setting_is_said_aloud(tmp_path, tokenizer, monkeypatch):
    """Defaults of other libraries, and fields of the directory, decide nothing."""
    save("llama", tmp_path, tokenizer)
    said = {}
    for cls in (transformers.AutoConfig, transformers.LlamaForCausalLM, transformers.AutoProcessor):

        def spy(path, original=cls.from_pretrained, name=cls.__name__, **settings):
            said[name] = settings
            return original(path, **settings)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    load(tmp_path)
    assert set(said) == {"AutoConfig", "LlamaForCausalLM", "AutoProcessor"}
    for settings in said.values():
        assert settings["trust_remote_code"] is False and settings["local_files_only"] is True
    assert said["LlamaForCausalLM"]["use_safetensors"] is True
    assert said["LlamaForCausalLM"]["attn_implementation"] == "sdpa"


def test_missing_weights_are_an_error_not_noise(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"extra\.weight"):
        load(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        load(tmp_path)


def test_weights_of_another_shape_are_an_error(tmp_path):
    save("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight|mismatch"):
        load(tmp_path)


def test_a_directory_that_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody-knows-it"}')
    with pytest.raises(DataError, match="nobody-knows-it"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["os"]}')
    with pytest.raises(DataError, match="'os'"):
        load(tmp_path)
    for config in ('{"model_type": "llama", "hidden_size": "wide"}', "[]", '{"model_type": ["llama"]}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(DataError, match="no transformers model"):
            load(tmp_path)


@pytest.mark.parametrize(("arch", "network"), [("tiny:plain", Plain), ("tiny:pair", Pair)])
def test_a_file_with_its_architecture(arch, network, tmp_path):
    torch.manual_seed(3)
    model = network().eval()
    save_model(model, str(tmp_path / "net.safetensors"))
    loaded = load(tmp_path / "net.safetensors", arch=arch, dtype=torch.float64)
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        same = loaded.model.state_dict()[name]
        assert torch.equal(same, tensor.to(same.dtype))
    assert next(loaded.model.parameters()).dtype == torch.float64
    if network is Pair:
        assert loaded.model.one.weight is loaded.model.two.weight


def test_a_file_must_fit_its_architecture(tmp_path):
    state = build("plain").state_dict()
    file = tmp_path / "net.safetensors"
    for broken, text in [
        ({k: v for k, v in state.items() if k != "conv.bias"}, r"no weights for conv\.bias"),
        (state | {"conv3.bias": torch.ones(1)}, r"no place for conv3\.bias"),
        (state | {"conv.bias": torch.ones(9)}, r"conv\.bias"),
    ]:
        save_file(broken, file)
        with pytest.raises(DataError, match=text):
            load(file, arch="tiny:plain")


def test_bad_architectures_are_named(tmp_path):
    file = tmp_path / "net.safetensors"
    save_file(build("plain").state_dict(), file)
    for arch, text in [
        (None, "package.module:factory"),
        ("tiny", "package.module:factory"),
        ("nobody_has_this:x", "nobody_has_this"),
        ("tiny:plian", "nearest names: 'plain'"),
        ("builtins:dict", "must return a torch.nn.Module"),
    ]:
        with pytest.raises(InputError, match=text):
            load(file, arch=arch)
    with pytest.raises(InputError, match="arch: goes with"):
        load(tmp_path, arch="tiny:plain")
