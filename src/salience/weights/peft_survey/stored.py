"""Save what was trained, put it back on the base, or work it into the base's own weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from salience.errors import DataError, InputError
from salience.io import Output
from salience.weights.peft_survey.attaching import TunedModel, attach
from salience.weights.peft_survey.blocks import hold_statistics, release_statistics, unchanged_on_failure
from salience.weights.peft_survey.cards import REGISTRY, MethodCard, card_of
from salience.weights.peft_survey.peft_types import METHOD, mark
from salience.weights.peft_survey.selective import GradientMask, SparseDiff

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "salience_method.json"  # beside peft's own files, which do not tell LoRA from LoRA-FA
_KEY, _PLACES = METHOD, "salience:places:"
# Fields of peft's configuration by which a file could name code to import, options of a download or a pickle to read.
_REFUSED = ("megatron_config", "tokenizer_kwargs", "corda_config", "prompt_tuning_init_state_dict_path")


def method_of(tuned: nn.Module) -> MethodCard:
    """The card of the method that is on a model.

    Raises
    ------
    InputError
        There is none.
    """
    if isinstance(tuned, TunedModel):
        return tuned.card
    name = getattr(tuned, METHOD, None)
    if name is not None:
        return REGISTRY[name]
    config = getattr(tuned, "active_peft_config", None)
    if config is not None:
        for card in REGISTRY.values():
            if card.via == f"peft:{config.peft_type.value}":
                return card
    raise InputError(f"tuned: {type(tuned).__name__} carries no method; give what attach returned")


def merge_adapter(tuned: nn.Module) -> nn.Module:
    """Work a method into the weights of the base: the result has the base's structure and costs no more than it.

    Parameters
    ----------
    tuned : PeftModel or TunedModel
        Used up: the base inside it is changed.

    Returns
    -------
    nn.Module
        In evaluation mode.

    Raises
    ------
    InputError
        The method cannot be merged; says why.
    """
    card = method_of(tuned)
    if not card.mergeable:
        raise InputError(f"tuned: {card.name} cannot be merged: {card.why_not}")
    release_statistics(tuned)
    if not isinstance(tuned, TunedModel):
        adapted: Any = tuned
        return adapted.merge_and_unload().eval()
    model = tuned.model.eval()
    for _, layer, _ in _diffs(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return model


def save_adapter(tuned: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Write what was trained, and nothing of the base, to a directory; gives the bytes of its weights.

    Members of `peft` are written as peft writes them, so that `PeftModel.from_pretrained` reads them, with the name of
    the method in a file of its own beside. Running statistics are the base's, and are not stored. Of masked
    methods only the entries that may train are stored, with their places; of diff pruning only those that changed.

    Parameters
    ----------
    tuned : PeftModel or TunedModel
    path : path-like
        A new directory.
    overwrite : bool
        Replace an earlier one that `save_adapter` wrote.

    Raises
    ------
    InputError
        `path` exists, or is not one of ours.
    """
    card = method_of(tuned)
    with Output(path, overwrite, folder=True) as output:
        if isinstance(tuned, TunedModel):
            save_file(_stored(tuned), output.file(WEIGHTS))
            config = {_KEY: card.name, "options": tuned.options, "head": list(tuned.head)}
            output.file(CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        else:
            adapted: Any = tuned
            adapted.save_pretrained(str(output.folder))
            (output.folder / "README.md").unlink(missing_ok=True)  # an empty form
            output.file(NAME).write_text(json.dumps({_KEY: card.name}), encoding="utf-8")
        size = output.file(WEIGHTS).stat().st_size
        output.commit({"command": "save_adapter", "method": card.name})
    return size


def load_adapter(base: nn.Module, path: str | os.PathLike[str]) -> Any:
    """Put a saved adapter on its base, in place.

    Parameters
    ----------
    base : nn.Module
        The model that the adapter was trained on.
    path : path-like
        A directory of `save_adapter`, or of peft with weights in safetensors.

    Returns
    -------
    PeftModel or TunedModel
        In evaluation mode; what trained before may train on, but for peft's prompts and diff pruning, which comes back
        merged.

    Raises
    ------
    InputError
        `path` holds no adapter.
    DataError
        Its weights do not fit the base, or its configuration names code, downloads or other files to load.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"path: {folder} holds no {CONFIG} with {WEIGHTS}; give a directory that save_adapter wrote")
    config = _read(folder / CONFIG)
    if _KEY not in config:
        return _load_peft(base, folder, config)
    card, options = card_of(config[_KEY]), config["options"]
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors' own error class is not public in all releases
        raise DataError(f"{folder / WEIGHTS}: not readable as safetensors: {error}") from error
    if card.name in ("fish", "child_tuning_d", "diff_pruning"):
        tuned = TunedModel(base, card, options, config["head"])
        _put_entries(tuned, state, str(folder))
        hold_statistics(tuned)
    else:
        tuned = attach(base, card.name, head=config["head"], **options)
        _put_tensors(tuned, state, str(folder))
    return tuned.eval()


def _stored(tuned: TunedModel) -> dict[str, Tensor]:
    """Tensors to write: whole ones under their names, entries as values and places."""
    model, out = tuned.model, {}
    if tuned.card.name == "diff_pruning":
        diffs = {name: diff for name, _, diff in _diffs(model)}
        for name, diff in diffs.items():
            places = diff.kept().flatten().nonzero()[:, 0]
            training, _ = diff.training, diff.eval()
            change = (diff.gates() * diff.delta).detach().flatten()[places]
            diff.train(training)
            out[f"{name}.weight"], out[f"{_PLACES}{name}.weight"] = change, places
        heads = [name for name, p in model.named_parameters() if p.requires_grad and "parametrizations" not in name]
        out |= {name: model.get_parameter(name).detach() for name in heads}
    else:
        masks = tuned.mask.masks if tuned.mask is not None else {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            out[name] = parameter.detach()
            if name in masks:
                places = masks[name].flatten().nonzero()[:, 0]
                out[name], out[_PLACES + name] = out[name].flatten()[places.to(parameter.device)], places
    shrunk = {name: t.to(torch.int32) if name.startswith(_PLACES) and (not len(t) or int(t.max()) < 2**31) else t
              for name, t in out.items()}  # fmt: skip
    return {name: tensor.contiguous().cpu() for name, tensor in shrunk.items()}


@torch.no_grad()
def _put_tensors(tuned: TunedModel, state: dict[str, Tensor], where: str) -> None:
    parameters = {name: p for name, p in tuned.model.named_parameters() if p.requires_grad}
    if odd := sorted(parameters.keys() ^ state.keys()):
        raise DataError(f"{where}: the adapter and this base differ in {odd[0]!r}; give the base it was trained on")
    for name, parameter in parameters.items():
        _same_shape(where, name, state[name].shape, parameter)
        parameter.copy_(state[name])


@torch.no_grad()
def _put_entries(tuned: TunedModel, state: dict[str, Tensor], where: str) -> None:
    parameters = dict(tuned.model.named_parameters())
    masks: dict[str, Tensor] = {}
    names = [name for name in state if not name.startswith(_PLACES)]
    if odd := sorted(set(names) - set(parameters)):
        raise DataError(f"{where}: this base has no {odd[0]!r}; give the base that the adapter was trained on")
    for name in names:
        parameter, values = parameters[name], state[name]
        if _PLACES + name not in state:
            _same_shape(where, name, values.shape, parameter)
            parameter.copy_(values)
            continue
        places = state[_PLACES + name].long()
        if len(places) and int(places.max()) >= parameter.numel():
            raise DataError(f"{where}: {name!r} has entries beyond the base's {tuple(parameter.shape)}")
        flat = parameter.flatten()
        change = values.to(flat)
        flat[places] = flat[places] + change if tuned.card.name == "diff_pruning" else change
        parameter.copy_(flat.view(parameter.shape))
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[places] = True
        masks[name] = mask.view(parameter.shape)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    tuned.mask = GradientMask(masks)


def _same_shape(where: str, name: str, shape: torch.Size, parameter: Tensor) -> None:
    if shape != parameter.shape:
        raise DataError(f"{where}: {name!r} is {tuple(shape)} there and {tuple(parameter.shape)} in this base")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}; an object of fields is needed")
    return found


def _load_peft(base: nn.Module, folder: Path, config: dict[str, Any]) -> Any:
    import peft

    for key in _REFUSED:
        if config.get(key) is not None:
            raise DataError(f"{folder / CONFIG}: {key} is set, which could load code or files of others; make it null")
    kind = type(base)
    # peft itself notes the base's class there; any other is a module to import
    if config.get("auto_mapping") not in (
        None, {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    ):  # fmt: skip
        raise DataError(f"{folder / CONFIG}: auto_mapping names another class than the base's {kind.__name__}, which "
                        "could load code of others; make it null")  # fmt: skip
    card = None
    if (folder / NAME).is_file():
        name = _read(folder / NAME).get(_KEY)
        card = card_of(name) if isinstance(name, str) else None
        if card is None or card.via != f"peft:{config.get('peft_type')}":
            raise DataError(f"{folder / NAME}: {name!r} is no method of peft's {config.get('peft_type')}")
    try:
        with unchanged_on_failure(base):
            prompt = peft.PeftConfig.from_pretrained(str(folder)).is_prompt_learning
            # peft does not let a loaded prompt train on
            model: Any = base
            tuned = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=not prompt).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: peft cannot put it on {type(base).__name__}: {error}") from error
    if card is not None:
        mark(tuned, card)
    hold_statistics(tuned)
    return tuned


def _diffs(model: nn.Module) -> list[tuple[str, Any, SparseDiff]]:
    found = []
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            parts: Any = layer.parametrizations
            if isinstance(diff := parts["weight"][0], SparseDiff):
                found.append((name, layer, diff))
    return found
