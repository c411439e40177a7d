"""Tiny random models of the families that salience supports, made on the spot (`from tiny import build`)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import transformers
from torch import nn

torch.set_num_threads(1)

VOCABULARY = 320


class Plain(nn.Module):
    """A CNN as people write it: ReLU in place, and batch normalisation with its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = self.relu2(self.conv2(x))
        return self.head(x.mean((2, 3)))


def plain() -> Plain:
    """What `load(file, arch=...)` calls in the tests; random on purpose, the file must decide."""
    return Plain()


class Pair(nn.Module):
    """Two linear maps with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def pair() -> Pair:
    return Pair()


def build(family: str) -> nn.Module:
    """A tiny random model in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    t = transformers
    text = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    llama = {
        **text, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    if family == "plain":
        return Plain().eval()
    if family == "gpt2":
        config = t.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=128, **text)
        model = t.GPT2LMHeadModel(config)
    elif family == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**llama))
    elif family == "qwen2":
        model = t.Qwen2ForCausalLM(t.Qwen2Config(tie_word_embeddings=True, **llama))
    elif family == "moe":
        config = t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **llama)
        model = t.MixtralForCausalLM(config)
    elif family == "t5":
        config = t.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = t.T5ForConditionalGeneration(config)
    elif family == "vit":
        config = t.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16,
            patch_size=8, num_labels=3,
        )  # fmt: skip
        model = t.ViTForImageClassification(config)
    elif family == "resnet":
        config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
        model = t.ResNetForImageClassification(config)
        for name, buffer in model.named_buffers():  # running statistics that a lost buffer would betray
            if name.endswith("running_mean"):
                buffer.uniform_(-0.1, 0.1)
    else:
        raise ValueError(family)
    # Default initialisation is so small that a broken model gives almost the same logits.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


TEXT = ["gpt2", "llama", "qwen2"]
FAMILIES = [*TEXT, "moe", "t5", "vit", "resnet"]
LAYER = {
    "plain": "conv", "gpt2": "transformer.h.1", "llama": "model.layers.1", "qwen2": "model.layers.1",
    "moe": "model.layers.1",
    "t5": "encoder.block.0", "vit": "vit.layers.1", "resnet": "resnet.encoder.stages.0",
}  # fmt: skip


def example(family: str, rows: int = 3, seed: int = 1):
    """Inputs that the model of `family` takes."""
    generator = torch.Generator().manual_seed(seed)
    if family in ("plain", "vit", "resnet"):
        images = torch.randn(rows, 3, 16, 16, generator=generator)
        return images if family == "plain" else {"pixel_values": images}
    tokens = torch.randint(1, VOCABULARY, (rows, 9), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family == "t5":
        inputs["decoder_input_ids"] = tokens[:, :4]
    return inputs


def state_hash(model: nn.Module) -> str:
    """Parameters, buffers, gradients, training flags and hooks, in one hash."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.requires_grad}{parameter.grad is None}".encode())
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        digest.update(f"{name}{module.training}{hooks}".encode())
    return digest.hexdigest()


def directory_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        digest.update(str(file.relative_to(path)).encode())
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def save(family: str, path: Path, tokenizer=None, shard_size: str = "50GB", dtype=None) -> nn.Module:
    """Write the tiny model of `family` to `path`, as users have it, and return it."""
    model = build(family)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return model
