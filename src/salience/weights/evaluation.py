"""How every change of weights is measured on the user's own data: one score per example, compared in pairs.

Three kinds of data: labelled images (accuracy), text for causal language models (bits per token of each document),
and a command of the user's that prints a number. Every model of a comparison is scored on the same examples, so the
differences are paired.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Subset

from salience.errors import DataError, InputError, NothingToDo
from salience.measure.paired import Interval, PairedDifference, bootstrap_interval, paired_difference
from salience.model.at import logits_of, training_mode
from salience.model.batches import map_batches
from salience.model.loading import Loaded, load

_MEASURES = {"images": "accuracy", "text": "bits per token", "command": "figure of the command"}


@dataclass(frozen=True)
class Evaluation:
    """What models are scored on.

    Parameters
    ----------
    data : path-like, optional
        Labelled images: a Parquet file in the Hugging Face image layout with a ``label`` column, or a folder with a
        sub-folder per class. Or text for a causal language model: ``.txt``, ``.jsonl`` or ``.parquet``.
    command : str, optional
        Instead of `data`: a command line with ``{model}`` in it, which the path of each model replaces. It is run
        without a shell; the last word that it prints must be a number.
    lower_is_better : bool
        Of the figure that `command` prints.
    arch : str, optional
        ``package.module:factory`` where models are ``FILE.safetensors`` (see `salience.model.load`).
    limit : int
        Examples at most; of more documents a random sample is taken, of more images what `read_images` takes.
    max_tokens : int
        Longer documents are cut.
    text_column : str
        Field or column that holds the text.
    size, mean, std
        How images are prepared where the model comes without an image processor (see `read_images`).
    batch_size : int
    seed : int
        Of the sample and of the intervals.
    half : {0, 1}, optional
        Only every other example: choose something on one half and measure it on the other.

    Raises
    ------
    InputError
        Neither or both of `data` and `command`, a file of another kind, or a command without ``{model}``.
    """

    data: str | os.PathLike | None = None
    command: str | None = None
    lower_is_better: bool = False
    arch: str | None = None
    limit: int = 1000
    max_tokens: int = 512
    text_column: str = "text"
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    batch_size: int = 32
    seed: int = 0
    half: Literal[0, 1] | None = None
    kind: Literal["images", "text", "command"] = field(init=False)

    def __post_init__(self) -> None:
        if (self.data is None) == (self.command is None):
            raise InputError("evaluation: give either data or a command")
        if self.command is not None and "{model}" not in self.command:
            raise InputError(f"evaluation command: {self.command!r} must hold {{model}}, where each model's path goes")
        if self.command is None and self.lower_is_better:
            raise InputError("lower_is_better: goes with a command; of data it is known which way is better")
        if self.limit < 1 or self.max_tokens < 2:
            raise InputError(f"limit and max_tokens: got {self.limit} and {self.max_tokens}; at least 1 and 2")
        object.__setattr__(self, "kind", "command" if self.data is None else _kind(Path(self.data)))

    @property
    def measure(self) -> str:
        """What a score is: "accuracy", "bits per token" or "figure of the command"."""
        return _MEASURES[self.kind]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return {"images": True, "text": False, "command": not self.lower_is_better}[self.kind]

    def score(self, model: str | os.PathLike | Loaded) -> Float[np.ndarray, " n"]:
        """Score one model: correct or not for each image, bits per token for each document, or one figure.

        Parameters
        ----------
        model : path-like or Loaded
            A model directory, a ``FILE.safetensors``, or what `salience.model.load` returned. A command takes a path.

        Raises
        ------
        InputError
            The command cannot be started, or it was given a model that is not a path.
        DataError
            The model does not fit the data, a score is not finite, or the command failed or printed no number.
        NothingToDo
            No document has two tokens.
        """
        if self.kind == "command":
            if isinstance(model, Loaded):
                raise InputError("model: a command is given the path of a model; save it first")
            return np.array([_run(str(self.command), os.fspath(model))])
        loaded = model if isinstance(model, Loaded) else load(model, arch=self.arch)
        with training_mode(loaded.model, False), torch.no_grad():
            values = self._images(loaded) if self.kind == "images" else self._text(loaded)
        scores = values.double().numpy()
        if not np.isfinite(scores).all():
            raise DataError(
                f"model: the {self.measure} of example {int((~np.isfinite(scores)).argmax())} is not finite"
            )
        return scores

    def inputs(self, loaded: Loaded, rows: int = 256, tokens: int | None = None) -> list[Any]:
        """Batches of model inputs from the first examples: for what needs activations or outputs but no labels.

        Parameters
        ----------
        loaded : Loaded
            Its processor prepares the examples.
        rows : int
            Examples at most.
        tokens : int, optional
            Tokens of each at most; by default `max_tokens`.

        Raises
        ------
        InputError
            A command has no inputs.
        """
        if self.kind == "command":
            raise InputError("evaluation: a command has no inputs to look at; give data")
        if self.kind == "text":
            texts = [row[:tokens] for row in self._tokens(loaded)[:rows]]
            return [self._padded(batch) for batch in _parts(texts, min(self.batch_size, 8))]
        pictures = self._pictures(loaded)[0]
        pixels = [pictures[i][0] for i in range(min(rows, len(pictures)))]
        batches = [torch.stack(batch) for batch in _parts(pixels, self.batch_size)]
        named = hasattr(loaded.model, "config")  # a model of transformers takes pictures by name
        return [{"pixel_values": batch} if named else batch for batch in batches]

    def _pictures(self, loaded: Loaded) -> tuple[Any, Any]:
        from salience.model import read_images

        images = read_images(
            os.fspath(self.data or ""),
            loaded.processor,
            size=self.size,
            mean=self.mean,
            std=self.std,
            limit=self.limit,
        )
        return Subset(images, range(len(images))[self._part]), images

    def _images(self, loaded: Loaded) -> Tensor:
        chosen, images = self._pictures(loaded)
        if images.labels is None:
            raise DataError(f"{self.data}: has no labels, so that accuracy cannot be measured")
        model, device = loaded.model, next(loaded.model.parameters()).device
        labels = matched_labels(torch.as_tensor(images.labels), images.class_names, model)[self._part]
        logits = map_batches(
            lambda batch: logits_of(model(batch[0].to(device))).float(), chosen, batch_size=self.batch_size
        )
        if logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"{self.data}: label {int(labels.max())} is there, but {type(model).__name__} gives "
                f"{tuple(logits.shape[1:])} logits"
            )
        if not torch.isfinite(logits).all():
            raise DataError(f"{type(model).__name__}: logits are not finite")
        return (logits.argmax(1) == labels).float()

    @property
    def _part(self) -> slice:
        return slice(None) if self.half is None else slice(self.half, None, 2)

    def _tokens(self, loaded: Loaded) -> list[Tensor]:
        model: Any = loaded.model
        tokenizer = loaded.processor
        if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise DataError(f"{self.data} is text, and {type(model).__name__} comes without a tokenizer")
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise DataError(f"{self.data} is text, and {type(model).__name__} is no causal language model")
        longest = getattr(model.config, "max_position_embeddings", None) or self.max_tokens
        rows = tokenizer(self._documents(), truncation=True, max_length=min(self.max_tokens, longest))["input_ids"]
        rows = [torch.tensor(row) for row in rows if len(row) > 1]  # of one token nothing is predicted
        if not rows:
            raise NothingToDo(f"{self.data}: no document has two tokens")
        return rows

    def _padded(self, batch: list[Tensor]) -> dict[str, Tensor]:
        ids = pad_sequence(batch, batch_first=True)  # on the right, where no token before it sees it
        lengths = torch.tensor([len(row) for row in batch])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def _text(self, loaded: Loaded) -> Tensor:
        model, device = loaded.model, next(loaded.model.parameters()).device

        def bits(batch: list[Tensor]) -> Tensor:
            inputs = {name: value.to(device) for name, value in self._padded(batch).items()}
            ids, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:].bool()
            logits = logits_of(model(**inputs))[:, :-1].float()
            nats = logits.logsumexp(-1) - logits.gather(-1, ids[..., None])[..., 0]
            return nats.where(mask, 0).double().sum(1) / mask.sum(1) / math.log(2)

        # logits of a vocabulary are large
        return map_batches(bits, self._tokens(loaded), batch_size=min(self.batch_size, 8))

    def _documents(self) -> list[str]:
        from salience.io import Corpus, read

        corpus = Corpus(os.fspath(self.data or ""), self.text_column)
        texts = [text for unit in corpus.units for batch in read(corpus, unit) for text in batch.text.to_pylist()]
        texts = [text for text in texts if text.strip()]
        if len(texts) > self.limit:
            chosen = np.random.default_rng(self.seed).choice(len(texts), self.limit, replace=False)
            texts = [texts[i] for i in sorted(chosen)]
        if not texts:
            raise NothingToDo(f"{self.data}: holds no text")
        return texts[self._part]


@dataclass(frozen=True)
class Comparison:
    """Scores of several models on the same examples.

    Parameters
    ----------
    measure : str
        What a score is.
    higher_is_better : bool
    scores : dict of str to (n,) float
        By model, in the order in which they were given; of a command n is 1.
    seed : int
        Of the intervals.
    """

    measure: str
    higher_is_better: bool
    scores: dict[str, Float[np.ndarray, " n"]]
    seed: int = 0

    @property
    def examples(self) -> int:
        """Number of examples, n."""
        return len(next(iter(self.scores.values())))

    def mean(self, name: str) -> Interval:
        """Mean score of a model, with its 95 % interval."""
        return bootstrap_interval(self.scores[name], random_state=self.seed)

    def gain(self, name: str, over: str) -> PairedDifference:
        """By how much `name` is better than `over`, with its 95 % interval: positive is better, for any measure."""
        sign = 1 if self.higher_is_better else -1
        return paired_difference(sign * self.scores[name], sign * self.scores[over], random_state=self.seed)

    def verdict(self, name: str, over: str) -> bool | None:
        """True if `name` is better than `over` beyond doubt, False if it is not better, None if undecided.

        From 5 examples on the 95 % interval and the p-value decide, both: the interval alone is too narrow where there
        are few. A single figure of a command has neither and decides nothing.
        """
        gain = self.gain(name, over)
        if gain.mean <= 0:
            return False
        return True if gain.n >= 5 and gain.low > 0 and gain.p_value < 0.05 else None

    def as_dict(self, name: str) -> dict[str, Any]:
        """Plain data for ``--json``: each mean, and the gain of `name` over each other model."""
        gains = {other: self.gain(name, other) for other in self.scores if other != name}
        return {
            "measure": self.measure,
            "higher_is_better": self.higher_is_better,
            "examples": self.examples,
            "means": {other: float(values.mean()) for other, values in self.scores.items()},
            "gains": {
                other: {"mean": gain.mean, "low": _finite(gain.low), "high": _finite(gain.high), "p": gain.p_value}
                for other, gain in gains.items()
            },
        }


def compare(evaluation: Evaluation, models: Mapping[str, str | os.PathLike | Loaded]) -> Comparison:
    """Score several models on the same examples, one in memory at a time where paths are given.

    Parameters
    ----------
    evaluation : Evaluation
    models : mapping of str to path-like or Loaded
        By the name under which they are shown, such as "before", "after", "magnitude".

    Raises
    ------
    DataError
        A model gives another number of scores than the first: their tokenisers cut the text differently.
    """
    scores: dict[str, np.ndarray] = {}
    for name, model in models.items():
        scores[name] = evaluation.score(model)
        first = next(iter(scores.values()))
        if len(scores[name]) != len(first):
            raise DataError(
                f"{name}: {len(scores[name])} scores, the first model has {len(first)}: not the same examples"
            )
    return Comparison(evaluation.measure, evaluation.higher_is_better, scores, evaluation.seed)


def _parts(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _kind(path: Path) -> Literal["images", "text"]:
    if path.is_dir():
        return "images"
    if not path.is_file():
        raise InputError(f"evaluation data: {path} is not there")
    endings = {ending.lower() for ending in path.suffixes}
    if ".parquet" in endings:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        structs = [each for each in schema if pa.types.is_struct(each.type)]
        return "images" if any(each.type.get_field_index("bytes") >= 0 for each in structs) else "text"
    if endings & {".txt", ".jsonl", ".json"}:
        return "text"
    raise InputError(f"evaluation data: {path} must be a folder of images, .parquet, .txt or .jsonl")


def matched_labels(labels: Tensor, class_names: Sequence[str] | None, model: nn.Module) -> Tensor:
    """Labels as the model counts its classes: by name where it knows all of these names, else by number."""
    own = getattr(getattr(model, "config", None), "label2id", None) or {}
    if class_names and all(name in own for name in class_names):
        return torch.tensor([int(own[name]) for name in class_names])[labels]
    return labels


def _run(command: str, model: str) -> float:
    parts = [part.replace("{model}", model) for part in shlex.split(command)]
    try:
        done = subprocess.run(parts, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"evaluation command: {parts[0]!r} cannot be started: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
        raise DataError(f"evaluation command: ended with {done.returncode} on {model}: {last}")
    words = done.stdout.split()
    try:
        value = float(words[-1])
    except (IndexError, ValueError):
        raise DataError(
            f"evaluation command: must print a number last; for {model} it printed {' '.join(words[-5:])!r}"
        ) from None
    if not math.isfinite(value):
        raise DataError(f"evaluation command: printed {value} for {model}")
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
