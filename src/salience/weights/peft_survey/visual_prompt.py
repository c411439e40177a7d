"""Visual prompt tuning: trained tokens behind [CLS], in front of the first block or anew in every block."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salience.errors import InputError
from salience.weights.peft_survey.blocks import Block, find_blocks

PROMPT, ROLE = "salience_prompt", "salience_prompt_role"


class VisualPrompt(nn.Module):
    """m trained tokens for a vision transformer, one set for the first block or one for each.

        shallow:  [cls, P, x]_1 -> block 1 -> ... -> block L
        deep:     before block i > 1, the m tokens that came out of block i - 1 are replaced with P_i

    After the last block the tokens are taken out again, so that the output has the base's shape. It has m d
    parameters, deep L m d.

    Parameters
    ----------
    m : int
        Tokens.
    d : int
        Width of the model.
    layers : int
        L, the number of blocks.
    deep : bool
    patch : int
        Pixels of a patch, all channels (for the range of the first values, as the authors have it).
    cls : int
        Tokens in front of the prompt: 1 for [CLS], 0 if the model has none.

    Raises
    ------
    InputError
        A size below 1.

    References
    ----------
    Jia et al., ECCV 2022. Taking the tokens out at the end is ours: what reads the patches keeps its shape.
    """

    def __init__(self, m: int, d: int, layers: int = 1, deep: bool = True, patch: int = 768, cls: int = 1) -> None:
        super().__init__()
        if min(m, d, layers) < 1:
            raise InputError(f"m, d and layers: got {m}, {d} and {layers}; all must be at least 1")
        reach = math.sqrt(6 / (patch + d))
        self.tokens = nn.Parameter(torch.empty(layers if deep else 1, m, d).uniform_(-reach, reach))
        self.deep, self.cls = deep, cls

    def forward(self, hidden: Float[Tensor, "batch token d"], number: int) -> Float[Tensor, "batch longer d"]:
        """What block `number` reads in place of `hidden`."""
        if number and not self.deep:
            return hidden
        tokens = self.tokens[number].to(hidden.dtype).expand(len(hidden), -1, -1)
        rest = self.cls + (len(tokens[0]) if number else 0)  # later blocks find the old tokens there
        return torch.cat([hidden[:, : self.cls], tokens, hidden[:, rest:]], 1)

    def without(self, hidden: Float[Tensor, "batch longer d"]) -> Float[Tensor, "batch token d"]:
        """What came out of the last block, without the prompt's tokens."""
        return torch.cat([hidden[:, : self.cls], hidden[:, self.cls + self.tokens.shape[1] :]], 1)


def add_visual_prompt(model: nn.Module, *, m: int = 10, deep: bool = True) -> None:
    """Prompt a vision transformer of `transformers`, in place.

    Raises
    ------
    InputError
        The model reads no images, or has no one row of blocks.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "patch_size", None)
    blocks = find_blocks(model)
    if not isinstance(size, int) or len({_stem(block) for block in blocks}) != 1:
        raise InputError(
            f"model: visual prompts need a vision transformer with one row of blocks and config.patch_size; "
            f"{type(model).__name__} is none"
        )
    weight: Any = model.get_submodule(blocks[0].attention[0]).weight
    cls = int(any(name.rpartition(".")[2] in ("cls_token", "class_embedding") for name, _ in model.named_parameters()))
    width = int(getattr(config, "hidden_size", weight.shape[1]))
    patch = size * size * int(getattr(config, "num_channels", 3))
    prompt = VisualPrompt(m, width, len(blocks), deep, patch, cls).to(weight.device, weight.dtype)
    setattr(model, PROMPT, prompt)
    for number, block in enumerate(blocks):
        # Hooks find prompt and place through the layer, by a list: a module there would be registered twice.
        object.__setattr__(block.layer, ROLE, ([prompt], number))
        block.layer.register_forward_pre_hook(_enter, with_kwargs=True)
    blocks[-1].layer.register_forward_hook(_leave)


def _enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (prompt,), number = getattr(layer, ROLE)
    if args:
        return (prompt(args[0], number), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": prompt(kwargs["hidden_states"], number)}


def _leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    (prompt,), _ = getattr(layer, ROLE)
    if isinstance(output, tuple):
        return (prompt.without(output[0]), *output[1:])
    return prompt.without(output)


def _stem(block: Block) -> str:
    return block.name.rpartition(".")[0]
