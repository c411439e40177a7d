"""Members that Hugging Face's `peft` owns: which layers they get, what their configuration needs, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from salience.errors import InputError, nearest
from salience.model.narrowing import is_conv1d
from salience.weights.bn_only.layers import norm_layers
from salience.weights.peft_survey.blocks import find_blocks, linear_layers
from salience.weights.peft_survey.cards import MethodCard
from salience.weights.peft_survey.selective import FreezeSelector

METHOD = "salience_method"  # attribute with the method's name
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS", "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


def build_peft(model: nn.Module, card: MethodCard, options: Mapping[str, Any], head: Sequence[str]) -> Any:
    """Put a member of `peft` on a model: the same as `get_peft_model` with the same configuration.

    Raises
    ------
    InputError
        The model lacks what the method trains, an option is missing or unknown, or peft refuses the model.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = card.via.removeprefix("peft:")
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    given = dict(options)
    target = given.pop("target", "auto")
    settings = _settings(model, card, kind, target, given, head)
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    for name in given:
        if name not in fields:
            raise InputError(f"{name}: {card.name} has no such option; {nearest(name, fields)}")
    try:
        config = cls(**{**settings, **given})
        base: Any = model  # any module will do, whatever peft declares
        tuned: Any = peft.get_peft_model(base, config)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"method: peft cannot put {card.name} on {type(model).__name__}: {error}") from error
    mark(tuned, card)
    return tuned


def mark(tuned: Any, card: MethodCard) -> None:
    """What peft does not know of a method: its name, LoRA-FA's frozen A, and what inputs a prompt can take."""
    if card.name == "lora_fa":
        for name, parameter in tuned.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    object.__setattr__(tuned, METHOD, card.name)
    if card.via in ("peft:PROMPT_TUNING", "peft:P_TUNING"):
        tuned.register_forward_pre_hook(_check_prompted, with_kwargs=True)


def _settings(
    model: nn.Module, card: MethodCard, kind: str, target: Any, given: dict[str, Any], head: Sequence[str]
) -> dict[str, Any]:
    """What the configuration needs besides what the user gave."""
    if kind in PROMPTS:
        return _prompt_settings(model, card, kind, given, head)
    settings: dict[str, Any] = {"modules_to_save": list(head)} if head else {}
    if kind == "LN_TUNING":
        FreezeSelector("layernorm").names(model)  # raises where there is none
        return settings | {"target_modules": list(norm_layers(model))}
    if kind == "TRAINABLE_TOKENS":
        if not given.get("token_indices"):
            raise InputError("token_indices: trainable_tokens needs the ids of the tokens to train")
        return settings
    if kind == "ADAPTION_PROMPT":
        if head:
            raise InputError("head: peft's adaption prompts train no head")
        return {"task_type": "CAUSAL_LM", "adapter_layers": max(1, len(find_blocks(model)) - 1)}
    if kind == "IA3":
        blocks = find_blocks(model)
        last = [block.feed_forward[-1] for block in blocks]
        keys = [name for block in blocks for part in ("key", "value") for name in block.projection(part)]
        if target != "auto":
            layers = linear_layers(model, target)
            last, keys = [n for n in last if n in layers], [n for n in layers if n not in last]
        settings |= {"target_modules": list(dict.fromkeys(keys + last)), "feedforward_modules": last}
        return settings | _stored_turned(model, settings["target_modules"], kind)
    layers = linear_layers(model, target)
    settings["target_modules"] = layers
    if kind == "ADALORA" and not given.get("total_step"):
        raise InputError("total_step: adalora shares out its ranks over the training; give the number of steps")
    if kind in ("LORA", "ADALORA") and not given.get("use_rslora"):
        settings["lora_alpha"] = 2 * given.get("r", given.get("init_r", 8))
    if kind in ("LOHA", "LOKR"):
        settings["alpha"] = 2 * given.get("r", 8)
    if kind in ("VERA", "RANDLORA"):
        settings["save_projection"] = False  # both are drawn anew from projection_prng_key, and need not be stored
    return settings | _stored_turned(model, layers, kind)


def _stored_turned(model: nn.Module, layers: Sequence[str], kind: str) -> dict[str, Any]:
    """GPT-2 keeps its weights as (in, out), which some members have to be told."""
    turned = [is_conv1d(model.get_submodule(name)) for name in layers]
    if any(turned) and kind in ("LOHA", "LOKR", "OFT", "BOFT", "RANDLORA", "SHIRA"):
        raise InputError(f"model: {type(model).__name__} stores its linear weights as (in, out), which peft's {kind} "
                         "does not take; lora, dora, vera and ia3 do")  # fmt: skip
    return {"fan_in_fan_out": True} if any(turned) else {}


def _prompt_settings(
    model: nn.Module, card: MethodCard, kind: str, given: dict[str, Any], head: Sequence[str]
) -> dict[str, Any]:
    name, config = type(model).__name__, getattr(model, "config", None)
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    if task is None or config is None:
        raise InputError(f"model: {card.name} needs a language model of transformers; {name} is none")
    if kind == "PREFIX_TUNING" and task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise InputError(f"model: {name} keeps no past keys, which peft's prefixes are; mam and unipelt have their own")
    if task == "SEQ_CLS" and not head:
        raise InputError("head: peft trains a classifier's head along with prompts; give head for all methods")
    if task != "SEQ_CLS" and head:
        raise InputError("head: peft's prompts train no head of such a model; leave it out for all methods")
    tokens = given.get("num_virtual_tokens")
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"num_virtual_tokens: got {tokens!r}; at least 1 is needed")
    if limit is not None and tokens >= limit:
        raise InputError(f"num_virtual_tokens: {tokens} leave no place in the {limit} positions of {name}")
    settings: dict[str, Any] = {"task_type": task}
    if kind == "P_TUNING":
        settings["encoder_hidden_size"] = int(getattr(config, "hidden_size", 128))
    return settings


def _check_prompted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that would run out of positions, or training with padding between prompt and text."""
    tokens = args[0] if args else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    config: Any = model.active_peft_config
    base = model.get_base_model().config
    limit = getattr(base, "max_position_embeddings", None) or getattr(base, "n_positions", None)
    if isinstance(tokens, torch.Tensor) and limit is not None and tokens.shape[-1] + config.num_virtual_tokens > limit:
        raise InputError(
            f"input_ids: {tokens.shape[-1]} tokens and {config.num_virtual_tokens} of the prompt exceed the model's "
            f"{limit} positions; shorten the text or the prompt"
        )
    if model.training and isinstance(mask, torch.Tensor) and mask.ndim == 2 and not bool(mask[:, 0].all()):
        raise InputError(
            "attention_mask: rows are padded on the left, between prompt and text; pad on the right to train"
        )
