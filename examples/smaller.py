"""Train a small byte Llama and two fine-tuned copies, take them through `salience compress`, and draw the frontier.

    base/, manual/, tables/     the model; copies tuned to the Python manual and to tables of character sets
    *.jsonl                     text to calibrate on and to measure on

Usage: python examples/smaller.py FOLDER [IMAGE]

All text is that of the running Python's standard library, so figures differ a little between versions of Python.
Models that FOLDER already holds are not trained again.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from salience.cli import app
from salience.model import fit
from salience.reproductions.worlds import text

CODE = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")
LENGTH, BATCH = 128, 12
STEPS, RATE, TUNING_STEPS, TUNING_RATE = 200, 6e-3, 40, 2e-3
MADE = ("sparse-*", "narrow-*", "codes-*", "manual-*", "tables-*", "merged*")  # of an earlier run
CALIBRATION, HELD_OUT = 160, 100  # records of 128 bytes


def pieces(source: str) -> list[str]:
    """Consecutive 128 characters each; what is not ASCII is a question mark."""
    source = source.encode("ascii", "replace").decode("ascii")
    return [source[at : at + LENGTH] for at in range(0, len(source) - LENGTH + 1, LENGTH)]


def corpora() -> dict[str, list[str]]:
    """Code, the manual (prose), and tables of character sets, which none of the code holds."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def source(*parts: str) -> list[str]:
        return pieces("\n".join(document.text for part in parts for document in text.source_passages(root / part)))

    return {"base": source(*CODE), "manual": pieces("\n".join(topics.values())), "tables": source("encodings")}


def tokenizer() -> Any:
    """One token for each ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def build() -> Any:
    """Two layers of 64 units, 4 heads, 128 tokens; embedding and output matrix of their own."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def train(model: nn.Module, texts: list[str], steps: int, rate: float) -> None:
    """AdamW with a warm-up, then half a cosine."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([list(piece.encode()) for piece in texts])
    rows = ids[torch.randint(len(ids), (BATCH * steps,), generator=generator)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)

    def schedule(step: int) -> None:
        if step % 50 == 0:
            print(f"step {step} of {steps}", file=sys.stderr)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2

    def loss(output: Any, ids: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    fit(model, rows, rows, loss=loss, optimizer=optimizer, epochs=1, generator=generator, batch_size=BATCH,
        on_step=schedule)  # fmt: skip


def prepare(folder: Path) -> None:
    """Write models and text; every tenth piece is held out."""
    every = corpora()
    held = {name: [piece for at, piece in enumerate(texts) if at % 10 == 9] for name, texts in every.items()}
    known = {name: [piece for at, piece in enumerate(texts) if at % 10 != 9] for name, texts in every.items()}
    draw = torch.Generator().manual_seed(1)

    def write(name: str, texts: list[str], count: int) -> list[str]:
        chosen = [texts[at] for at in torch.randperm(len(texts), generator=draw)[:count].tolist()]
        (folder / name).write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), encoding="utf-8")
        return chosen

    write("calibration.jsonl", known["base"], CALIBRATION)
    write("held-out.jsonl", held["base"], HELD_OUT)
    manual = write("manual.jsonl", held["manual"], HELD_OUT)
    tables = write("tables.jsonl", held["tables"], HELD_OUT)
    write("both.jsonl", manual + tables, 2 * HELD_OUT)
    torch.manual_seed(0)
    model = build()
    train(model, known["base"], STEPS, RATE)
    for name in ("manual", "tables"):
        tuned = copy.deepcopy(model)
        train(tuned, known[name], TUNING_STEPS, TUNING_RATE)
        tuned.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")


def called(*arguments: object) -> str:
    """What `salience ARGUMENTS` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(args=[str(argument) for argument in arguments], prog_name="salience", standalone_mode=False)
    return printed.getvalue()


def shown(*arguments: object) -> str:
    """Run a command, print it with its output, and give that."""
    print(f"\n$ salience {' '.join(str(argument) for argument in arguments)}")
    printed = called(*arguments)
    print(printed, flush=True)
    return printed


def bits_of(printed: str, model: str) -> float:
    """Bits per token of a model, from the table that a command prints."""
    found = re.search(rf"^{model} +([0-9.]+)", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1])


def figures(*arguments: object) -> dict[str, Any]:
    """The figures of a command as it prints them with ``--json``."""
    return json.loads(called(*arguments, "--overwrite", "--json"))


def size(path: str) -> int:
    """Bytes of a file, or of the weights of a model directory."""
    file = Path(path)
    return (file / "model.safetensors" if file.is_dir() else file).stat().st_size


Point = tuple[str, int, float]  # setting, bytes, bits per token


def alone() -> dict[str, list[Point]]:
    """One model made smaller in three ways."""
    whole, at = size("base"), {}
    measured = ("--evaluate", "held-out.jsonl")
    at["sparsify, with a bit mask"] = []
    for density in (0.7, 0.5, 0.3):
        command = ("compress", "sparsify", "base", "--density", density, *measured, "-o", f"sparse-{density}")
        if density == 0.5:
            shown(*command)
        told = figures(*command)
        stored = whole - told["bytes"]["dense"] + told["bytes"]["bitmask"]
        at["sparsify, with a bit mask"].append((f"{density:g} kept", stored, told["evaluation"]["means"]["after"]))
    at["channels, the file"] = []
    for keep in (0.9, 0.8, 0.6):
        command = ("compress", "channels", "base", "--keep", keep, *measured, "-o", f"narrow-{keep}")
        printed = (shown if keep == 0.8 else called)(*command)
        at["channels, the file"].append((f"{keep:g} kept", size(f"narrow-{keep}"), bits_of(printed, "after")))
    at["quantize, the codes"] = []
    for bits in (4, 3, 2):
        command = ("compress", "quantize", "base", "--bits", bits, "--calibration", "calibration.jsonl", *measured,
                   "-o", f"codes-{bits}")  # fmt: skip
        if bits == 3:
            shown(*command)
        told = figures(*command, "--no-baselines")
        stored = told["codes_bytes"] + told["rest_bytes"]
        at["quantize, the codes"].append((f"{bits} bits", stored, told["evaluation"]["means"]["after"]))
    return {"as trained": [("", whole, told["evaluation"]["means"]["before"])], **at}


def tuned() -> dict[str, list[Point]]:
    """What two tuned copies cost: bytes of all there is to keep, and bits per token of both texts."""
    from salience.weights import compare
    from salience.weights.evaluation import Evaluation

    whole, names = size("base"), ("manual", "tables")
    own = [float(compare(Evaluation(f"{name}.jsonl"), {name: name}).scores[name].mean()) for name in names]
    at = {"two full copies, each on its own text": [("", 2 * whole, sum(own) / 2)]}
    deltas = at["base and two deltas, each on its own text"] = []
    for rate in (0.8, 0.95):
        cost, bits = whole, 0.0
        for name in names:
            file = f"{name}-{rate}.safetensors"
            command = ("compress", "delta", "base", name, "--rate", rate, "--evaluate", f"{name}.jsonl", "-o", file)
            printed = (shown if (rate, name) == (0.95, "manual") else called)(*command)
            cost, bits = cost + size(file), bits + bits_of(printed, "darex") / 2
        deltas.append((f"{rate:g} dropped", cost, bits))
    end = ("--base", "base", "--evaluate", "both.jsonl")
    printed = shown("merge", "delta", *names, *end, "-o", "merged")
    at["base alone"] = [("", whole, float(compare(Evaluation("both.jsonl"), {"base": "base"}).scores["base"].mean()))]
    merged = at["one merged model"] = [("0.5 each", whole, bits_of(printed, "task"))]
    for weight in (1,):
        printed = called("merge", "delta", *names, *end, "--weights", f"{weight},{weight}", "-o", f"merged-{weight}")
        merged.append((f"{weight:g} each", whole, bits_of(printed, "task")))
    files = [f"{name}-0.95.safetensors" for name in names]
    printed = called("merge", "delta", *files, *end, "--weights", "1,1", "-o", "merged-deltas")
    at["one model, merged from the deltas at 0.95"] = [("1 each", whole, bits_of(printed, "task"))]
    return at


def draw(panels: dict[str, dict[str, list[Point]]], image: Path) -> None:
    """Perplexity against bytes, a panel each."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from salience.report.images import style

    with mpl.style.context(["default", style(dark=False)]):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            for number, (name, points) in enumerate(series.items()):
                points = sorted(points, key=lambda point: point[1:])
                x, y = [point[1] / 1e6 for point in points], [2 ** point[2] for point in points]
                axes.plot(x, y, "osD^vPX*"[number], linestyle="-" if len({*x}) > 1 else "", label=name)
                for (setting, *_), left, up in zip(points, x, y, strict=True):
                    axes.annotate(
                        setting, (left, up), xytext=(3, 6), textcoords="offset points", fontsize=8, rotation=50
                    )
            axes.set(title=title, xlabel="MB", ylabel="perplexity per byte", yscale="log")
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%.3g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%.3g"))
            axes.grid(axis="y", which="both")
            axes.margins(x=0.18, y=0.12)
            axes.legend(fontsize=8)
        figure.savefig(image, dpi=130, facecolor="white")


def main(folder: Path, image: Path | None) -> None:
    """Train, run every command, print what it printed and a table of all settings."""
    image = image and image.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        prepare(folder)
    with contextlib.chdir(folder):
        for old in (path for pattern in MADE for path in Path().glob(pattern)):
            (shutil.rmtree if old.is_dir() else Path.unlink)(old)
        panels = {"One model, on code": alone(), "One base, two skills": tuned()}
    for title, series in panels.items():
        print(f"\n{title}")
        for name, points in series.items():
            for setting, stored, bits in points:
                print(f"{name:40} {setting:12} {stored / 1e6:6.2f} MB  perplexity {2**bits:7.2f}")
    if image is not None:
        image.parent.mkdir(parents=True, exist_ok=True)
        draw(panels, image)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
