"""`salience explain complexity`: how complex the features of a classifier are, and how much each of them matters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from salience.cli._say import say
from salience.cli.explain_saliency import _bars, _device, _numbers, _size
from salience.cli.verbs import explain
from salience.errors import InputError, NothingToDo

if TYPE_CHECKING:
    from torch import nn

    from salience.concepts.complexity.findings import ComplexityReport
    from salience.model import ImageSet

_EPILOG = (
    "Examples:\n\n"
    "salience explain complexity my-resnet/ photos/ -o complexity\n\n"
    "salience explain complexity net.safetensors test.parquet --arch my_package.models:net --mean 0.485,0.456,0.406 "
    "--std 0.229,0.224,0.225 --checkpoints epoch01.safetensors --checkpoints epoch10.safetensors -o complexity\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_MEASURING = "Measuring"
MOST = 512  # features by default, whatever the width of the network


@explain.command("complexity", epilog=_EPILOG)
def complexity(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="A folder (sub-folders are classes), image files, globs, or .parquet with columns image and label.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: features.jsonl, features.safetensors, report.html.", show_default=False)],
    checkpoints: Annotated[list[str] | None, typer.Option("--checkpoints", help="The same network at an earlier time of its training; repeat in the order of training. MODEL comes last by itself. Without, nothing is said of when features are learned.", show_default=False)] = None,
    layers: Annotated[str | None, typer.Option("--layers", "-l", help="Layers to decode features from, with commas between, by their names in named_modules; also input and penultimate.", show_default="the input, the stem, every residual block (or activation), the penultimate")] = None,
    count: Annotated[int | None, typer.Option("--features", "-k", help="Features to learn.", show_default="two for each penultimate neuron, at most 512 and a quarter of the images they are learned from")] = None,
    scope: Annotated[str, typer.Option(help="Learn features of all images at once (global) or class by class (per_class).")] = "global",
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320.", rich_help_panel=_DATA, show_default="as they are")] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most so many images, evenly spread.", rich_help_panel=_DATA, show_default=False)] = None,
    grid: Annotated[int, typer.Option(help="Places to which maps are averaged each way before they are decoded; complexity depends on it.", rich_help_panel=_MEASURING)] = 4,
    noise: Annotated[str | None, typer.Option(help="Also shake pixels by noise of these deviations, with commas between, in units of the normalised image; each costs 20 passes.", rich_help_panel=_MEASURING, show_default=False)] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run the network, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the features' beginning, of the shuffled control and of intervals.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT/report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read and decoded; write nothing.")] = False,
) -> None:  # fmt: skip
    """Show how complex the features of a classifier are: from which layer on they can be read, and how much they matter.

    Features are parts into which the last layer before the logits is factorised. Linear decoders learn on two thirds of
    the images to read each feature from each layer, and are judged on the other third. First printed is whether
    complex features matter less to the decision here, with its interval, and what shuffled features give.
    """
    if (count is not None and count < 1) or min(grid, batch_size) < 1 or seed < 0:
        raise InputError("--features, --grid and --batch-size must be at least 1, --seed at least 0")
    if report is not None and (report.suffix != ".html" or not report.parent.is_dir() or report.is_dir()):
        raise InputError(f"--report must name a file that ends in .html, in a folder that exists, not {report}")
    if report is not None and report.exists() and not overwrite:
        raise InputError(f"report {report} exists; pass --overwrite to replace it")
    options = {
        "n_features": count, "scope": scope, "grid": grid, "noise": _numbers("--noise", noise) or [],
        "layers": "auto" if layers is None else [name.strip() for name in layers.split(",")],
        "batch_size": batch_size, "random_state": seed,
    }  # fmt: skip
    _run(model, images, out, checkpoints or [], options, arch=arch, size=_size(size), mean=_numbers("--mean", mean),
         std=_numbers("--std", std), limit=limit, device=device, overwrite=overwrite, report=report, as_json=as_json,
         dry_run=dry_run)  # fmt: skip


class _Checkpoints(Mapping[str, "nn.Module"]):
    """Networks by their file, loaded when they are asked for, one at a time."""

    def __init__(self, names: list[str], arch: str | None, device: Any) -> None:
        if len(set(names)) != len(names):
            raise InputError("--checkpoints names one twice; give each once, in the order of training")
        self.names, self.arch, self.device = names, arch, device

    def __getitem__(self, name: str) -> nn.Module:
        from salience.model import load

        return load(name, arch=self.arch, device=self.device).model

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _run(model, images, out, checkpoints, options, *, arch, size, mean, std, limit, device, overwrite, report, as_json,
         dry_run) -> None:  # fmt: skip
    import numpy as np
    from torch.utils.data import Subset

    from salience.cli._explain_complexity_page import write_page
    from salience.concepts.complexity.layers import layer_activations, linear_head
    from salience.concepts.complexity.study import ComplexityStudy
    from salience.io import Output
    from salience.model import load, read_images

    loaded = load(model, arch=arch, device=_device(device))
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    own = size is not None or mean is not None
    pictures = read_images(images, None if own else processor, size=size, mean=mean, std=std, limit=limit)
    if len(pictures) < 3:
        raise NothingToDo(f"images: {len(pictures)} are too few to learn features and to measure them on others")
    held = np.arange(len(pictures)) % 3 == 2
    rows = np.flatnonzero(~held), np.flatnonzero(held)
    if checkpoints:
        checkpoints = [*(name for name in checkpoints if Path(name).resolve() != Path(model).resolve()), model]
    training = _Checkpoints(checkpoints, arch, _device(device))
    if options["n_features"] is None:
        head = linear_head(loaded.model, two_images(pictures))
        options["n_features"] = max(2, min(2 * head.weight.shape[1], MOST, len(rows[0]) // 4))
    if dry_run:
        _print_plan(loaded.model, pictures, rows, options, training, as_json, layer_activations)
        return
    with Output(out, overwrite, [model, *images, *checkpoints], folder=True) as folder:
        with _bars() as advance:
            study = ComplexityStudy(**options, draws=20)
            found = study.run(loaded.model, Subset(pictures, rows[0].tolist()), Subset(pictures, rows[1].tolist()),
                              training, progress=advance)  # fmt: skip
        settings = {
            "command": "explain complexity", "model": model, "images": list(images), "checkpoints": checkpoints,
            **{**options, "layers": list(found.complexity.names)},
        }  # fmt: skip
        tops = top_images(found, rows)
        _write_tensors(folder, found)
        _write_lines(folder, found, pictures, tops)
        page = report or f"{out}/report.html"
        write_page(found, pictures, tops, settings, report or folder.file("report.html"))
        folder.commit({**settings, "counts": {"images": len(pictures), "held out": len(rows[1]),
                                              "features": len(found.complexity.live)}})  # fmt: skip
    _print(found, rows, out, page, as_json)


def two_images(pictures: ImageSet) -> Any:
    """Two images as a batch."""
    import torch

    return torch.stack([pictures[i][0] for i in range(2)])


def top_images(found: ComplexityReport, rows: Any, count: int = 8) -> dict[int, list[int]]:
    """By feature, the images that hold most of it, none that holds nothing."""
    import numpy as np

    codes = np.concatenate([found.train_features, found.features])
    places = np.concatenate(rows)
    ranked = np.argsort(-codes, axis=0, kind="stable")[:count]
    return {i: [int(places[row]) for row in ranked[:, i] if codes[row, i] > 0] for i in range(codes.shape[1])}


def words(found: ComplexityReport) -> tuple[bool | None, str, str]:
    """Whether complex features matter less here: the verdict, in few words and in a sentence."""
    every, readable = found.correlations["importance"], found.correlations["importance, readable features"]
    figures = (
        f"rank correlation of complexity and importance {every.value:+.2f} ({every.low:+.2f} … {every.high:+.2f}) over "
        f"{every.n} features, {readable.value:+.2f} ({readable.low:+.2f} … {readable.high:+.2f}) over the {readable.n} that "
        "the last layer tells"
    )
    if every.n < 3:
        return None, "too few features to tell", figures
    if not every.high < 0 and not every.low > 0:
        return False, "complexity tells nothing of importance here", figures
    if every.low > 0:
        return False, "complex features matter more here, not less", figures
    if readable.high < 0:
        return True, "complex features matter less here", figures
    return None, "complex features matter less here, which may be an artefact of rare features", figures


def record(found: ComplexityReport) -> dict[str, Any]:
    """What was measured, as plain data."""
    import numpy as np

    good, label, _ = words(found)
    live = found.complexity.live
    result: dict[str, Any] = {
        "verdict": label, "complex_matters_less": good,
        "correlations": {name: one._asdict() for name, one in found.correlations.items()},
        "shuffled_complexity": float(found.shuffled.score[found.shuffled.live].mean()),
        "mean_complexity": float(found.complexity.score[live].mean()),
        "features": len(live), "dead": found.complexity.dead, "readable": int(found.readable.sum()),
        "layers": dict(zip(found.complexity.names, found.complexity.information[:, live].mean(1).tolist(), strict=True)),
        "prediction_kept": found.agreement, "relative_error": found.dictionary.relative_error_, "notes": found.notes,
    }  # fmt: skip
    if found.time is not None:
        told = found.time.information[:, found.time.live].mean(1)
        result["checkpoints"] = [
            {"checkpoint": one.name, "final_features_decoded": float(information), "mean_complexity": one.mean,
             "complexity_of_top_1_percent": one.top, "agreement": one.agreement,
             "against_importance": one.against_importance._asdict()}
            for one, information in zip(found.epochs, told, strict=True)
        ]  # fmt: skip
    return _finite(result, np.isfinite)


def _finite(value: Any, is_finite: Any) -> Any:
    """Plain data with null for what is not a number."""
    if isinstance(value, dict):
        return {key: _finite(one, is_finite) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one, is_finite) for one in value]
    return None if isinstance(value, float) and not is_finite(value) else value


def _write_tensors(folder: Any, found: ComplexityReport) -> None:
    """Dictionary, complexity by layer, and codes of both parts."""
    import torch
    from safetensors.torch import save_file

    arrays = {
        "information": found.complexity.information,
        "train_features": found.train_features,
        "features": found.features,
    }
    tensors = {name: torch.from_numpy(array).float().contiguous() for name, array in arrays.items()}
    tensors["dictionary"] = found.dictionary.components_.contiguous()
    save_file(
        tensors, folder.file("features.safetensors"), metadata={"layers": json.dumps(list(found.complexity.names))}
    )


def _write_lines(folder: Any, found: ComplexityReport, images: ImageSet, tops: dict[int, list[int]]) -> None:
    import numpy as np

    with open(folder.file("features.jsonl"), "w", encoding="utf-8") as file:
        for i in [*found.order, *np.flatnonzero(~found.complexity.live)]:
            line: dict[str, Any] = {
                "feature": int(i), "complexity": float(found.complexity.score[i]),
                "importance": float(found.importance.absolute[i]), "signed": float(found.importance.signed[i]),
                "readable": bool(found.readable[i]),
                "decoded": dict(zip(found.complexity.names, found.complexity.information[:, i].tolist(), strict=True)),
                **{name: float(values[i]) for name, values in found.companions.items()},
            }  # fmt: skip
            if found.time is not None:
                line["time to decode"] = float(found.time.score[i])
            line["top_images"] = [images.ids[row] for row in tops[int(i)]]
            file.write(json.dumps(_finite(line, np.isfinite), ensure_ascii=False) + "\n")


def _print_plan(model, images, rows, options, checkpoints, as_json, activations) -> None:
    from salience.concepts.complexity.layers import block_layers

    example = two_images(images)
    names = block_layers(model, example) if options["layers"] == "auto" else options["layers"]
    seen = activations(model, example, names, grid=options["grid"]).layers
    for name in checkpoints:
        checkpoints[name]
    columns = {name: part.shape[1] for name, part in seen.items()}
    plan = {
        "images": len(images), "image_size": list(example[0].shape), "learned_from": len(rows[0]),
        "measured": len(rows[1]), "features": options["n_features"], "layers": columns,
        "checkpoints": list(checkpoints), "activation_bytes": 4 * len(images) * sum(columns.values()),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(plan))
        return
    say(f"images      {plan['images']:,} of {' x '.join(map(str, plan['image_size']))}; {len(rows[1]):,} to measure on")
    typer.echo(f"features    {options['n_features']}")
    for name, wide in columns.items():
        say(f"layer       {name}: {wide:,} columns")
    for name in checkpoints:
        say(f"checkpoint  {name}")
    typer.echo(f"activations {plan['activation_bytes'] / 1e6:,.1f} MB a network\nnothing was written")


def _print(found: ComplexityReport, rows: Any, out: Path, page: Path | str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    result = record(found)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "report": str(page), **result}))
        return
    _, label, figures = words(found)
    say(f"{label[0].upper()}{label[1:]}: {figures}.")
    say(f"Shuffled features, which no layer can tell, have complexity {result['shuffled_complexity']:.3f}; "
        f"these have {result['mean_complexity']:.3f}.\n")  # fmt: skip
    table = Table(box=None, pad_edge=False)
    few = [("simplest", i) for i in found.order[:4]] + [("most complex", i) for i in found.order[::-1][:4]]
    for column in ("", "complexity", "importance", "speaks", "readable at the end"):
        table.add_column(column, justify="right" if column else "left")
    for kind, i in few:
        table.add_row(f"{kind}: feature {i}", f"{found.complexity.score[i]:.3f}", f"{found.importance.absolute[i]:.3f}",
                      "for" if found.importance.signed[i] >= 0 else "against",
                      "yes" if found.readable[i] else "no")  # fmt: skip
    Console(width=100).print(table)
    if found.time is None:
        typer.echo("\nNot measured: when features are learned (no --checkpoints).")
    else:
        when = found.correlations["time to decode"]
        say(f"\ncomplexity and time to decode: {when.value:+.2f} ({when.low:+.2f} … {when.high:+.2f})")
    for note in found.notes:
        say(f"note: {note}", err=True)
    say(f"measured on {len(rows[1]):,} images\nwritten: {out}\nreport:  {page}")
