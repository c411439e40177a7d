"""`salience compress quantize`: store the weights of a language model in a few bits each."""

from __future__ import annotations

import json
import math
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from salience.cli._changed_page import check_paths, plan, progress
from salience.cli._measured import Evaluate, EvaluateCommand, Limit, LowerIsBetter, evaluation_of, print_comparison
from salience.cli._say import say
from salience.cli.verbs import compress
from salience.errors import DataError, InputError, NothingToDo

if TYPE_CHECKING:
    from salience.weights.evaluation import Comparison, Evaluation
    from salience.weights.rsq.calibration import Calibration
    from salience.weights.rsq.directories import QuantizedDirectory
    from salience.weights.rsq.quantizer import RSQQuantizer

_EPILOG = (
    "Examples:\n\n"
    "salience compress quantize my-llama/ --bits 4 --calibration some.txt -o small/\n\n"
    "salience compress quantize my-qwen/ --bits 3 --group-size 128 --calibration chat.jsonl --skip-special "
    "--evaluate held-out.txt -o small/\n\n"
    "salience compress quantize my-mistral/ --bits 3 --calibration some.txt --token-weights scores.parquet --packed "
    "-o packed/\n\n"
    "Without --evaluate a fifth of the calibration documents is held out and measured on.\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_TOKENS, _ROUNDING = "Which tokens matter", "Grid and rotation"
_HELD_OUT = 5  # every fifth document


class Rotate(StrEnum):
    """Kind of the rotation."""

    hadamard = "hadamard"
    random = "random"
    none = "none"


class Kind(StrEnum):
    """Values that weights may take."""

    uniform = "uniform"
    nf = "nf"


class Texts(NamedTuple):
    """Documents to calibrate on with their numbers in the file, and documents held out."""

    texts: list[str]
    numbers: list[int]
    held_out: list[str]


@compress.command("quantize", epilog=_EPILOG)
def quantize(
    model: Annotated[Path, typer.Argument(help="Directory of a Llama-, Mistral- or Qwen-type language model.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the quantised model.", show_default=False)],
    calibration: Annotated[Path, typer.Option("--calibration", "-c", help="Text like that which the model will see (.txt, .jsonl, .parquet).", show_default=False)],
    bits: Annotated[int, typer.Option("--bits", "-b", help="Bits of a weight, 2..8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Consecutive inputs that share a scale; -1 for all.", rich_help_panel=_ROUNDING)] = -1,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Zero in the middle of the grid, or a zero point of its own.", rich_help_panel=_ROUNDING)] = True,
    clip: Annotated[bool, typer.Option("--clip/--no-clip", help="Search for the best clip of each row.", rich_help_panel=_ROUNDING)] = True,
    grid: Annotated[Kind, typer.Option(help="Even steps, or NormalFloat.", rich_help_panel=_ROUNDING)] = Kind.uniform,
    rotate: Annotated[Rotate, typer.Option(help="Rotate before rounding, so that no weight stands out.", rich_help_panel=_ROUNDING)] = Rotate.hadamard,
    online: Annotated[bool, typer.Option("--online", help="Rotate activations inside layers as well; only with --packed.", rich_help_panel=_ROUNDING)] = False,
    act_order: Annotated[bool, typer.Option("--act-order", help="Inputs with the largest activations first.", rich_help_panel=_ROUNDING)] = False,
    percdamp: Annotated[float, typer.Option(help="Damping of the Hessian, share of its mean diagonal.", rich_help_panel=_ROUNDING)] = 0.01,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Leave linear layers with this name or pattern as they are, as in down_proj; may be repeated.", show_default=False)] = None,
    importance: Annotated[str | None, typer.Option(help="attncon, actnorm, actdiff, tokensim, tokenfreq, first, firstlast, chunks such as 0_8, or uniform.", rich_help_panel=_TOKENS, show_default="attncon")] = None,
    r_min: Annotated[float, typer.Option(help="Weight of the least important token; that of the most important is 1.", rich_help_panel=_TOKENS)] = 0.005,
    token_weights: Annotated[Path | None, typer.Option(help="Instead: a Scores file of tokens, with ids DOCUMENT:POSITION from 0.", rich_help_panel=_TOKENS, show_default=False)] = None,
    skip_special: Annotated[bool, typer.Option("--skip-special", help="Special tokens, as of a chat template, get weight 0.", rich_help_panel=_TOKENS)] = False,
    sequences: Annotated[int, typer.Option(help="Sequences to calibrate on at most.", rich_help_panel=_TOKENS)] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=_TOKENS)] = 512,
    expand: Annotated[int, typer.Option(help="Rolled copies of each sequence.", rich_help_panel=_TOKENS)] = 1,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.", rich_help_panel=_TOKENS)] = "text",
    packed: Annotated[bool, typer.Option("--packed", help="Write codes only, for salience.weights.load_packed; by default weights that from_pretrained loads, and the codes beside them.")] = False,
    evaluate: Evaluate = None,
    evaluate_command: EvaluateCommand = None,
    lower_is_better: LowerIsBetter = False,
    limit: Limit = 200,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Also quantise by rounding, with all tokens alike and with random weights, and compare; each takes as long again.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the rotation, of the sample and of intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the inputs and say what would be done; write nothing.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Store the weights of a language model in a few bits, fitted to the tokens that matter.

    RSQ: the model is rotated, and each layer is rounded so that its outputs on the calibration text move little, most of
    all at tokens that receive much attention. Embedding and output matrix stay as they are. One decoder layer is in
    memory at a time. Bits per token of held-out text are measured before and after, and printed first.
    """
    page = check_paths(out, report, overwrite or dry_run)
    if online and not packed:
        raise InputError("--online: activations are rotated while the model runs, which needs --packed")
    if packed and evaluate_command is not None:
        raise InputError("--evaluate-command: a command cannot load what --packed writes; use --evaluate")
    if importance is not None and token_weights is not None:
        raise InputError("--importance: --token-weights gives the importance of tokens; leave one of the two out")
    from salience.weights import RSQQuantizer
    from salience.weights.model_output import model_output, put_directory, work_folder

    quantizer = RSQQuantizer(
        bits=bits, group_size=group_size, sym=sym, clip=clip, grid=grid.value, importance=importance or "attncon", r_min=r_min,
        rotate=None if rotate is Rotate.none else rotate.value,  # type: ignore[arg-type]
        online=online, expand=expand, percdamp=percdamp,
        act_order=act_order, exclude=tuple(exclude or ()), random_state=seed,
    )  # fmt: skip
    quantizer.check()
    evaluation = evaluation_of(evaluate, evaluate_command, lower_is_better, seed=seed, limit=limit)
    texts = _texts(calibration, text_column, hold_out=evaluation is None)
    tokens = _tokens(model, texts, length, sequences, quantizer, token_weights, skip_special)
    if dry_run:
        plan(_planned(model, tokens, quantizer, texts, evaluation), as_json)
        return
    with (
        model_output(out, overwrite, [model, calibration, *([token_weights] if token_weights else [])], evaluation) as output,
        progress(as_json) as status, warnings.catch_warnings(),
    ):  # fmt: skip
        work = work_folder(output)
        if evaluation is None:
            evaluation = _held_out(work, texts.held_out, seed, limit)
        done = _quantised(model, work / "model", tokens, quantizer, packed, status)
        others = _baselines(model, work, tokens, quantizer, packed, status) if baselines else {}
        status.update("measuring")
        comparison = _compared(evaluation, model, {"after": work / "model", **others}, packed)
        facts = _facts(done, quantizer, tokens, comparison)
        put_directory(output, work / "model")
        output.commit({
            "command": "compress quantize", "model": str(model), "calibration": str(calibration), "packed": packed,
            "token_weights": token_weights and str(token_weights), "seed": seed,
            "quantizer": vars(quantizer) | ({"importance": "given"} if token_weights else {}),
        })  # fmt: skip
    against = next(iter(others), "before")
    from salience.cli._compress_quantize_page import write_page

    write_page(page, str(out), facts, done, comparison, against)
    _print(facts, comparison, against, out, page, packed, as_json)


def _texts(path: Path, column: str, hold_out: bool) -> Texts:
    """The documents of the calibration file; every fifth is held out if need be."""
    from salience.io import Corpus, read

    if not path.is_file():
        raise InputError(f"--calibration: {path} is not there")
    corpus = Corpus(os.fspath(path), column)
    every = [text for unit in corpus.units for batch in read(corpus, unit) for text in batch.text.to_pylist()]
    numbered = [(number, text) for number, text in enumerate(every) if text.strip()]
    if not numbered:
        raise NothingToDo(f"--calibration: {path} holds no text")
    held = [text for _, text in numbered[_HELD_OUT - 1 :: _HELD_OUT]] if hold_out else []
    if hold_out and not held:
        raise NothingToDo(
            f"--calibration: {path} has fewer than {_HELD_OUT} documents to hold one out; give --evaluate"
        )
    kept = [pair for place, pair in enumerate(numbered) if not hold_out or place % _HELD_OUT != _HELD_OUT - 1]
    return Texts([text for _, text in kept], [number for number, _ in kept], held)


def _tokens(
    model: Path,
    texts: Texts,
    length: int,
    sequences: int,
    quantizer: RSQQuantizer,
    weights: Path | None,
    skip_special: bool,
) -> Calibration:
    import torch

    from salience.model.loading import load_processor, skeleton
    from salience.scores import Scores
    from salience.weights.rsq.calibration import calibration_from_texts, check_length
    from salience.weights.rsq.rotating import check_supported

    if length < 2 or sequences < 1:
        raise InputError(f"--length and --sequences: got {length} and {sequences}; at least 2 and 1")
    net: Any = skeleton(model)
    check_supported(net)
    quantizer.check_exclude(net.config)
    tokenizer = load_processor(model)
    if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(f"model: {model} comes without a tokenizer")
    tokens = calibration_from_texts(
        tokenizer, texts.texts, numbers=texts.numbers, sequences=sequences, skip_special=skip_special,
        length=min(length, getattr(net.config, "max_position_embeddings", None) or length),
        generator=torch.Generator().manual_seed(quantizer.random_state), weights=None if weights is None else Scores.load(weights),
    )  # fmt: skip
    check_length(tokens, net.config)
    return tokens


def _held_out(work: Path, texts: list[str], seed: int, limit: int) -> Evaluation:
    from salience.weights.evaluation import Evaluation

    file = work / "held-out.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Evaluation(file, limit=limit, seed=seed)


def _quantised(
    model: Path, out: Path, tokens: Calibration, quantizer: RSQQuantizer, packed: bool, status: Any, what: str = ""
) -> QuantizedDirectory:
    from salience.weights import quantize_directory

    return quantize_directory(
        model, out, tokens, quantizer, packed=packed, progress=lambda name: status.update(f"{what}quantising {name}")
    )


def _baselines(
    model: Path, work: Path, tokens: Calibration, quantizer: RSQQuantizer, packed: bool, status: Any
) -> dict[str, Path]:
    """The same bits with all tokens alike, by rounding to nearest, and with weights drawn at random."""
    from dataclasses import replace

    import torch

    draw = torch.Generator().manual_seed(quantizer.random_state + 1)
    random = tokens._replace(given=torch.rand(tokens.ids.shape, generator=draw))
    plain = tokens._replace(given=None)
    ways = {
        "tokens alike": (plain, replace(quantizer, importance="uniform")),
        "rounding": (plain, replace(quantizer, rounding="nearest", rotate=None, online=False)),
        "random weights": (random, quantizer),
    }
    if quantizer.importance == "uniform" and tokens.given is None:
        del ways["tokens alike"]
    for name, (text, how) in ways.items():
        try:
            _quantised(model, work / name, text, how, packed, status, f"{name}: ")
        except DataError as error:
            raise DataError(f"the baseline {name!r}: {error}; --no-baselines does without") from error
    return {name: work / name for name in ways}


def _compared(evaluation: Evaluation, model: Path, made: dict[str, Path], packed: bool) -> Comparison:
    from salience.model import Loaded
    from salience.model.loading import load_processor
    from salience.weights import compare, load_packed

    if not packed:
        return compare(evaluation, {"before": model, **made})
    models = {name: Loaded(load_packed(path), load_processor(path)) for name, path in made.items()}
    return compare(evaluation, {"before": model, **models})


def _planned(
    model: Path, tokens: Calibration, quantizer: RSQQuantizer, texts: Texts, evaluation: Evaluation | None
) -> dict[str, object]:
    from salience.model import TensorStore
    from salience.model.loading import skeleton

    net: Any = skeleton(model)
    with TensorStore(model) as store:
        size = sum(entry.size * entry.dtype.itemsize for entry in store.entries.values())
    states = tokens.ids.numel() * quantizer.expand * net.config.hidden_size * 4
    return {
        "model": str(model),
        "model, MB": size / 1e6,
        "bits": quantizer.bits,
        "calibration tokens": int(tokens.weighed().sum()),
        "sequences": len(tokens.ids),
        "file of hidden states, MB at most": states / 1e6,
        "documents held out": len(texts.held_out) if evaluation is None else 0,
    }


def _facts(
    done: QuantizedDirectory, quantizer: RSQQuantizer, tokens: Calibration, comparison: Comparison
) -> dict[str, Any]:
    ratios = {name: error / near if near else 1.0 for name, (error, near) in done.errors.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    perplexity = {}
    if comparison.measure == "bits per token":
        perplexity = {name: 2 ** float(values.mean()) for name, values in comparison.scores.items()}
    return {
        "bits": quantizer.bits,
        "bits_per_weight": done.bits_per_weight,
        "weights": done.weights,
        "dense_bytes": done.dense_bytes,
        "codes_bytes": done.codes_bytes,
        "rest_bytes": done.rest_bytes,
        "calibration_tokens": int(tokens.weighed().sum()),
        "sequences": len(tokens.ids),
        "mean_error_over_rounding": math.fsum(ratios.values()) / len(ratios),
        "worst_error_over_rounding": [worst, ratios[worst]],
        "perplexity": perplexity,
    }


def _print(
    facts: dict[str, Any], comparison: Comparison, against: str, out: Path, page: Path, packed: bool, as_json: bool
) -> None:
    if as_json:
        result = facts | {"out": str(out), "report": str(page), "packed": packed}
        typer.echo(json.dumps(result | {"evaluation": comparison.as_dict("after")}))
        return
    print_comparison(comparison, "after", against)
    if facts["perplexity"]:
        before, after = facts["perplexity"]["before"], facts["perplexity"]["after"]
        say(f"perplexity {before:.3f} before, {after:.3f} after")
    small = facts["codes_bytes"] + facts["rest_bytes"]
    worst, ratio = facts["worst_error_over_rounding"]
    say(
        f"weights    {facts['weights']:,} in {facts['bits_per_weight']:.2f} bits each, scales included\n"
        f"size       {facts['dense_bytes'] / 1e6:,.2f} MB before; codes {facts['codes_bytes'] / 1e6:,.2f} MB and the rest "
        f"{facts['rest_bytes'] / 1e6:,.2f} MB, {small / facts['dense_bytes']:.1%} of it\n"
        f"errors     {facts['mean_error_over_rounding']:.1%} of those of rounding on average; the worst is {worst} with {ratio:.1%}"
    )
    if packed:
        say("load it with salience.weights.load_packed")
    else:
        say("its files hold the weights that the codes stand for, in the type of before; the codes alone with --packed")
    say(f"written: {out}\nreport:  {page}")
