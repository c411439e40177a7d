"""Lazy exports of a room (PEP 562): a name is imported when it is first asked for, never before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from salience.errors import MissingExtra

_EXTRA_OF = {
    "torch": "torch", "transformers": "torch", "accelerate": "torch", "captum": "torch", "torchmetrics": "torch",
    "peft": "peft", "diffusers": "diffusion", "openai": "llm", "ray": "ray", "networkx": "demo",
}  # fmt: skip


def missing_extra(error: ModuleNotFoundError, wanted: str) -> MissingExtra | None:
    """The `MissingExtra` that tells which extra brings the module that `error` misses, if one does."""
    module = (error.name or "").split(".")[0]
    if module not in _EXTRA_OF:
        return None
    extra = _EXTRA_OF[module]
    return MissingExtra(
        f"{wanted} needs the package '{module}', which is not installed: pip install 'salience[{extra}]'"
    )


def exports(room: str, where: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Build a room's ``__getattr__`` and ``__dir__`` from ``{public name: module that defines it}``.

    Parameters
    ----------
    room : str
        Full name of the package (its ``__name__``).
    where : mapping of str to str
        Public name to the module below `room` that defines it, such as ``{"DSIR": "dsir"}``.
    """

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{room}.{where[name]}")
        except ModuleNotFoundError as error:
            raise missing_extra(error, f"{room}.{name}") or error from error
        return getattr(module, name)

    return __getattr__, lambda: sorted(where)
