"""Which tensor of a base belongs to which of a fine-tuned model, where one has another head than the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def in_names_of(before: Iterable[str], after: Iterable[str]) -> dict[str, str]:
    """The names of a base as its fine-tuned model would call them, each with its own name.

    The body of a model with a head has its names behind one more word (``vit.layernorm`` for ``layernorm``). Of all
    such words that of the most names in common is taken; none where that is as good.
    """
    before, after = list(before), set(after)

    def behind(word: str) -> Callable[[str], str]:
        return lambda name: f"{word}.{name}"

    def without(word: str) -> Callable[[str], str]:
        return lambda name: name.removeprefix(f"{word}.")

    ways: list[Callable[[str], str]] = [lambda name: name]
    ways += [behind(word) for word in sorted({name.partition(".")[0] for name in after})]
    ways += [without(word) for word in sorted({name.partition(".")[0] for name in before})]
    return max(({way(name): name for name in before} for way in ways), key=lambda names: len(names.keys() & after))


def is_own_part(name: str, others: Iterable[str]) -> bool:
    """Whether a tensor belongs to a part that a model without it lacks as a whole: a head, a pooler.

    True where its name parts from all `others` within its first two words, and not at the number of a layer.
    """
    words = name.split(".")
    for depth in (1, 2):
        start = ".".join(words[:depth])
        if not any(other == start or other.startswith(f"{start}.") for other in others):
            return not words[depth - 1].isdigit()
        if depth == len(words):
            break
    return False
