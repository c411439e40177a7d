"""The registry: every method of the survey with the fields of its overview table, and what runs it.

The survey (Zhang et al., arXiv 2501.13787) sorts methods into five families and gives of each its venue, the kind of
model it was made for, whether the network's structure changes, where the tuned parameters sit, and what inference pays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from salience.errors import InputError, nearest

CATEGORIES = ("selective", "additive", "prompt", "reparameterisation", "hybrid")
MODALITIES = ("language", "vision", "vision-language", "multimodal", "generation")
_ANY = MODALITIES
_LV = ("language", "vision")


@dataclass(frozen=True)
class MethodCard:
    """One method of the survey.

    Parameters
    ----------
    name : str
        By which `attach` knows it.
    category, sub : str
        Family of the survey, and the group inside it.
    modality : tuple of str
        Kinds of foundation model: "language" (LLM), "vision" (VFM), "vision-language" (VLM), "multimodal" (MFM),
        "generation" (VGM).
    via : str
        ``"peft:TYPE"`` (the type of Hugging Face's `peft`), ``"own"``, or ``"listed"``: named by the survey, no part
        that runs here.
    position : str
        Where the tuned parameters sit.
    structure : bool
        Whether the network's structure changes while it trains.
    inference : str
        What inference pays.
    source : str
        Authors and venue.
    mergeable : bool
        Whether `merge_adapter` gives back a network of the base's own structure.
    why_not : str
        Why it cannot be merged, or how it can be run although it is only listed.
    zero_start : bool
        Whether the network computes the same as the base before the first step.
    size : str
        Option that the number of parameters grows with ("" where there is none); what a budget sets.
    learning_rates : tuple of float
        A grid to begin with for AdamW. One common rate makes an unfair table: prompts want ten times LoRA's.
    on_quantised : bool
        Whether it can sit on a base with integer weights.
    defaults : mapping
        Options that `attach` gives unless told otherwise.
    """

    name: str
    category: str
    sub: str
    modality: tuple[str, ...]
    via: str
    position: str
    structure: bool
    inference: str
    source: str
    mergeable: bool = False
    why_not: str = ""
    zero_start: bool = True
    size: str = ""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    on_quantised: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether `attach` can build it."""
        return self.via != "listed"


_FREE = "none: the weights are the base's own, changed"
_MERGED = "none once merged"
_LAYER = "two small products more per adapter"
_LONGER = "a longer input"


def _selective(name: str, sub: str, modality: tuple[str, ...], via: str, position: str, source: str,
               **more: Any) -> MethodCard:  # fmt: skip
    more = {"structure": False, "inference": _FREE, "mergeable": True, **more}
    return MethodCard(name, "selective", sub, modality, via, position, source=source, **more)


def _adapter(name: str, modality: tuple[str, ...], via: str, position: str, source: str, **more: Any) -> MethodCard:
    more = {"structure": True, "inference": _LAYER, "why_not": "there is a nonlinearity inside the adapter",
            "size": "r", **more}  # fmt: skip
    return MethodCard(name, "additive", "adapter", modality, via, position, source=source, **more)


def _prompt(name: str, modality: tuple[str, ...], via: str, position: str, source: str, **more: Any) -> MethodCard:
    more = {"structure": True, "inference": _LONGER, "why_not": "what is trained are inputs, not weights",
            "zero_start": False, "size": "num_virtual_tokens", "learning_rates": (1e-2, 3e-2, 1e-1),
            **more}  # fmt: skip
    return MethodCard(name, "prompt", "soft", modality, via, position, source=source, **more)


def _low_rank(name: str, peft_type: str, source: str, **more: Any) -> MethodCard:
    more = {"structure": True, "inference": _MERGED, "mergeable": True, "size": "r", "defaults": {"r": 8}, **more}
    sub = more.pop("sub", "low rank")
    return MethodCard(
        name, "reparameterisation", sub, _ANY, f"peft:{peft_type}", "linear layers of the blocks", source=source, **more
    )


def _listed(name: str, category: str, sub: str, modality: tuple[str, ...], position: str, source: str,
            how: str = "") -> MethodCard:  # fmt: skip
    return MethodCard(name, category, sub, modality, "listed", position, category != "selective", "", source,
                      why_not=how, zero_start=False)  # fmt: skip


_CARDS = [
    # selective, specific
    _selective("bitfit", "specific", _ANY, "own", "every bias", "Ben Zaken et al., ACL 2022"),
    _selective("ln_tuning", "specific", _ANY, "peft:LN_TUNING", "gains and biases of normalisation",
               "Zhao et al., ICLR 2024"),
    _selective("last_layers", "specific", _ANY, "own", "the last k blocks", "common practice",
               size="k", defaults={"k": 1}, learning_rates=(3e-4, 1e-3, 3e-3)),
    _selective("trainable_tokens", "specific", ("language",), "peft:TRAINABLE_TOKENS", "chosen rows of the embedding",
               "peft; as PASTA's special tokens, Yang et al., EACL 2023", learning_rates=(1e-2, 3e-2, 1e-1)),
    # selective, automatic
    _selective("fish", "automatic", _ANY, "own", "the entries of all parameters with the most Fisher information",
               "Sung et al., NeurIPS 2021", size="keep", defaults={"keep": 0.005}),
    _selective("child_tuning_d", "automatic", _ANY, "own",
               "the entries of all parameters with the most Fisher information", "Xu et al., EMNLP 2021",
               size="keep", defaults={"keep": 0.3}, learning_rates=(3e-4, 1e-3, 3e-3)),
    _selective("child_tuning_f", "automatic", _ANY, "own", "a new random share of all weights at every step",
               "Xu et al., EMNLP 2021", defaults={"p": 0.3}, learning_rates=(3e-4, 1e-3, 3e-3)),
    _selective("diff_pruning", "automatic", _ANY, "own", "a sparse difference to the linear weights of the blocks",
               "Guo et al., ACL 2021", learning_rates=(3e-4, 1e-3, 3e-3), inference=_MERGED, structure=True),
    _selective("shira", "automatic", _ANY, "peft:SHIRA", "a fixed random share of the linear weights",
               "Bhardwaj et al., NeurIPS 2024", size="r", inference=_MERGED, structure=True, defaults={"r": 8}),
    # additive
    _adapter("houlsby", _LV, "own", "after attention and after the feed-forward layer", "Houlsby et al., ICML 2019",
             defaults={"r": 16}),
    _adapter("pfeiffer", _LV, "own", "after the feed-forward layer", "Pfeiffer et al., EACL 2021", defaults={"r": 16}),
    _adapter("adapterdrop", _LV, "own", "after the feed-forward layer, none in the first k blocks",
             "Rückle et al., EMNLP 2021", defaults={"r": 16, "skip": 1}),
    _adapter("parallel_adapter", _LV, "own", "beside the feed-forward layer", "He et al., ICLR 2022",
             defaults={"r": 16, "scale": 4.0}),
    _adapter("adaptformer", ("vision",), "own", "beside the feed-forward layer", "Chen et al., NeurIPS 2022",
             defaults={"r": 16, "scale": 0.1}, learning_rates=(3e-3, 1e-2, 3e-2)),
    _adapter("ia3", _ANY, "peft:IA3", "gains on keys, values and the feed-forward layer", "Liu et al., NeurIPS 2022",
             inference=_MERGED, mergeable=True, size="", why_not="", learning_rates=(1e-2, 3e-2, 1e-1)),
    _adapter("llama_adapter", ("language",), "peft:ADAPTION_PROMPT", "gated prompts in the upper layers' attention",
             "Zhang et al., ICLR 2024", inference="a longer attention", size="adapter_len",
             why_not="what is trained are inputs of attention, not weights",
             learning_rates=(1e-2, 3e-2, 1e-1), defaults={"adapter_len": 10}),
    # prompt
    _prompt("prompt_tuning", ("language",), "peft:PROMPT_TUNING", "embeddings in front of the input",
            "Lester et al., EMNLP 2021", defaults={"num_virtual_tokens": 10}),
    _prompt("p_tuning", ("language",), "peft:P_TUNING", "embeddings in front of the input, through an encoder",
            "Liu et al., 2021", defaults={"num_virtual_tokens": 10}, learning_rates=(3e-3, 1e-2, 3e-2)),
    _prompt("prefix_tuning", ("language",), "peft:PREFIX_TUNING", "keys and values of every attention",
            "Li and Liang, ACL 2021", defaults={"num_virtual_tokens": 10}),
    _prompt("vpt_shallow", ("vision",), "own", "tokens after [CLS] of the first block", "Jia et al., ECCV 2022",
            size="m", defaults={"m": 10}),
    _prompt("vpt_deep", ("vision",), "own", "tokens after [CLS], new ones in every block", "Jia et al., ECCV 2022",
            size="m", defaults={"m": 10}),
    # reparameterisation
    _low_rank("lora", "LORA", "Hu et al., ICLR 2022", on_quantised=True),
    _low_rank("rslora", "LORA", "Kalajdzievski, 2023", on_quantised=True, defaults={"r": 8, "use_rslora": True},
              sub="LoRA derivative"),
    _low_rank("dora", "LORA", "Liu et al., ICML 2024", on_quantised=True, defaults={"r": 8, "use_dora": True},
              sub="LoRA derivative"),
    _low_rank("lora_fa", "LORA", "Zhang et al., 2023", on_quantised=True, sub="LoRA derivative"),
    _low_rank("adalora", "ADALORA", "Zhang et al., ICLR 2023", size="init_r", sub="LoRA derivative",
              defaults={"init_r": 12, "target_r": 8}),
    _low_rank("vera", "VERA", "Kopiczko et al., ICLR 2024", sub="LoRA derivative", defaults={"r": 32},
              learning_rates=(1e-2, 3e-2, 1e-1)),
    _low_rank("randlora", "RANDLORA", "Albert et al., ICLR 2025", sub="LoRA derivative", size=""),
    _low_rank("loha", "LOHA", "Hyeon-Woo et al., ICLR 2022; LyCORIS, ICLR 2024"),
    _low_rank("lokr", "LOKR", "LyCORIS, Yeh et al., ICLR 2024"),
    _low_rank("oft", "OFT", "Qiu et al., NeurIPS 2023", sub="orthogonal", size="oft_block_size",
              defaults={"oft_block_size": 8, "r": 0}),
    _low_rank("boft", "BOFT", "Liu et al., ICLR 2024", sub="orthogonal", size="boft_block_size",
              defaults={"boft_block_size": 4}),
    # hybrid
    MethodCard("unipelt", "hybrid", "gated", _LV, "own", "adapter, prefix and LoRA in every block, each behind a gate",
               True, "adapter, longer attention and gates; no encoder-decoders", "Mao et al., ACL 2022", False,
               "its gates depend on the sample", False, "r", defaults={"r": 8, "m": 10}),
    MethodCard("mam", "hybrid", "unified view", _LV, "own", "prefix in attention, parallel adapter beside the "
               "feed-forward layer", True, "adapter and longer attention", "He et al., ICLR 2022", False,
               "prefix and adapter are no weights of the base", False, "r", defaults={"r": 16, "m": 10, "scale": 4.0}),
    # listed by the survey, without a part that runs here
    _listed("pasta", "selective", "specific", ("language",), "special tokens", "Yang et al., EACL 2023",
            "trainable_tokens with the ids of your special tokens comes close"),
    _listed("autofreeze", "selective", "automatic", ("language",), "blocks chosen while training", "Liu et al., 2021"),
    _listed("masking", "selective", "automatic", ("language",), "a learned binary mask", "Zhao et al., EMNLP 2020"),
    _listed("sparse_adapter", "additive", "adapter", ("language",), "pruned adapters", "He et al., EMNLP 2022"),
    _listed("adamix", "additive", "adapter", ("language",), "mixture of adapters", "Wang et al., EMNLP 2022"),
    _listed("lst", "additive", "adapter", ("language",), "a ladder beside the network", "Sung et al., NeurIPS 2022"),
    _listed("convpass", "additive", "adapter", ("vision",), "convolutional bypass", "Jie and Deng, 2022"),
    _listed("clip_adapter", "additive", "adapter", ("vision-language",), "after the encoders", "Gao et al., 2021"),
    _listed("tip_adapter", "additive", "adapter", ("vision-language",), "a cache of the examples",
            "Zhang et al., ECCV 2022"),
    _listed("t2i_adapter", "additive", "adapter", ("generation",), "beside the U-Net", "Mou et al., AAAI 2024",
            "diffusers has it: T2IAdapter"),
    _listed("ip_adapter", "additive", "adapter", ("generation",), "cross-attention", "Ye et al., 2023",
            "diffusers has it: load_ip_adapter"),
    _listed("controlnet", "additive", "adapter", ("generation",), "a copy of the encoder", "Zhang et al., ICCV 2023",
            "diffusers has it: ControlNetModel"),
    _listed("pet", "prompt", "hard", ("language",), "cloze questions", "Schick and Schütze, EACL 2021"),
    _listed("autoprompt", "prompt", "automatic", ("language",), "searched words", "Shin et al., EMNLP 2020"),
    _listed("multitask_prompt", "prompt", "soft", ("language",), "embeddings in front of the input",
            "Wang et al., ICLR 2023", "peft's MULTITASK_PROMPT_TUNING, which needs task_ids in every call"),
    _listed("coop", "prompt", "soft", ("vision-language",), "context of the class names", "Zhou et al., IJCV 2022"),
    _listed("textual_inversion", "prompt", "soft", ("generation",), "one word's embedding", "Gal et al., ICLR 2023",
            "diffusers loads such words; the catalogue's neti trains them"),
    _listed("delta_lora", "reparameterisation", "LoRA derivative", ("language",), "linear layers", "Zi et al., 2023"),
    _listed("diffusekrona", "reparameterisation", "low rank", ("generation",), "attention", "Marjit et al., WACV 2025",
            "lokr is the same factorisation"),
    _listed("compacter", "hybrid", "low rank", ("language",), "adapters of Kronecker sums",
            "Mahabadi et al., NeurIPS 2021"),
    _listed("s4", "hybrid", "design spaces", ("language",), "a searched assignment", "Chen et al., ICLR 2023"),
    _listed("noah", "hybrid", "searched", ("vision",), "a searched mix", "Zhang et al., 2022"),
    _listed("difffit", "hybrid", "selective and scales", ("generation",), "biases, norms and scales of the blocks",
            "Xie et al., ICCV 2023", "bitfit and ln_tuning train its biases and norms"),
]  # fmt: skip

REGISTRY: Mapping[str, MethodCard] = MappingProxyType({card.name: card for card in _CARDS})


def peft_methods(category: str | None = None, modality: str | None = None, *, listed: bool = False) -> list[MethodCard]:
    """The methods that run here and now, or all that the survey lists.

    Parameters
    ----------
    category : str, optional
        "selective", "additive", "prompt", "reparameterisation" or "hybrid".
    modality : str, optional
        "language", "vision", "vision-language", "multimodal" or "generation".
    listed : bool
        Also those that the survey names and that do not run here, and those that the installed `peft` is too old for.

    Raises
    ------
    InputError
        An unknown family or modality.
    """
    for option, value, allowed in (("category", category, CATEGORIES), ("modality", modality, MODALITIES)):
        if value is not None and value not in allowed:
            raise InputError(f"{option}: got {value!r}; {nearest(value, allowed)}")
    gone = skipped()
    return [
        card
        for card in REGISTRY.values()
        if category in (None, card.category)
        and (modality is None or modality in card.modality)
        and (listed or (card.runs and card.name not in gone))
    ]


def skipped() -> dict[str, str]:
    """Methods that the installed `peft` does not have, and why: by name of the method."""
    try:
        import peft

        known = {kind.value for kind in peft.PeftType}
        reason = f"peft {peft.__version__} has no {{}}; a newer peft may"
    except ModuleNotFoundError:
        known, reason = set(), "{} needs the package 'peft', which is not installed: pip install 'salience[peft]'"
    return {
        card.name: reason.format(card.via[5:])
        for card in REGISTRY.values()
        if card.via.startswith("peft:") and card.via[5:] not in known
    }


def card_of(name: str) -> MethodCard:
    """The card of a method that runs.

    Raises
    ------
    InputError
        There is no such method, the survey only lists it, or the installed `peft` lacks it.
    """
    if name not in REGISTRY:
        raise InputError(
            f"method: got {name!r}; {nearest(name, [card.name for card in REGISTRY.values() if card.runs])}"
        )
    card = REGISTRY[name]
    if not card.runs:
        instead = card.why_not or f"others of its family: {', '.join(c.name for c in peft_methods(card.category))}"
        raise InputError(f"method: {name!r} is listed by the survey and does not run here; {instead}")
    if card.via != "own" and name in (gone := skipped()):
        raise InputError(f"method: {gone[name]}")
    return card
