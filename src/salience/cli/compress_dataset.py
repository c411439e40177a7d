"""`salience compress dataset`: a few synthetic images per class in the place of many real ones."""

from __future__ import annotations

import json
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from salience.cli._changed_page import check_paths, progress
from salience.cli._measured import Arch, ImageMean, ImageSize, ImageStd, Limit, channels_of, print_comparison, sentence
from salience.cli._say import say
from salience.cli.verbs import compress
from salience.errors import DataError, InputError, NothingToDo

if TYPE_CHECKING:
    import torch

    from salience.cli._students import StudentComparison
    from salience.data import NRRDD, DistilledSet
    from salience.model import ImageSet, Loaded

_EPILOG = (
    "Examples:\n\n"
    "salience compress dataset train.parquet --teacher my-resnet/ --ipc 10 --evaluate test.parquet -o small/\n\n"
    "salience compress dataset photos/ --teacher net.safetensors --arch mine.nets:build --ipc 5 "
    "--image-mean 0.5,0.5,0.5 --image-std 0.25,0.25,0.25 -o small/\n\n"
    "The output holds images/CLASS/NUMBER.png, labels.safetensors and set.json; train on it with DistilledSet.load and "
    "train_student of salience.data.\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_STAGES, _MEASURING = "Options of nrr-dd", "Measuring"
DISTILLED, RANDOM, UNREFINED, ALONE = "distilled", "random images", "without refinement", "class labels alone"


class Knowledge(StrEnum):
    """What is kept of the teacher."""

    dbr = "dbr"
    soft = "soft"
    hard = "hard"


class Choice(StrEnum):
    """Which patches are kept."""

    low = "low"
    high = "high"
    random = "random"


class Data(NamedTuple):
    """Images with labels as the teacher counts classes: those to compress and those to measure on."""

    images: ImageSet
    labels: torch.Tensor
    rows: torch.Tensor  # of the images, to compress
    test: tuple[torch.Tensor, torch.Tensor]
    names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@compress.command("dataset", epilog=_EPILOG)
def dataset(
    images: Annotated[Path, typer.Argument(help="Labelled images: Parquet, or a folder per class.", show_default=False)],
    teacher: Annotated[Path, typer.Option(help="A model directory trained on them, or FILE.safetensors with --arch.", show_default=False)],
    ipc: Annotated[int, typer.Option(help="Images per class to make.", show_default=False, min=1)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    arch: Arch = None,
    labels: Annotated[Knowledge, typer.Option(help="dbr: two numbers for each view of an image; soft: probabilities of all classes; hard: nothing.")] = Knowledge.dbr,
    views: Annotated[int, typer.Option(help="Views of an image that the teacher labels.", min=1)] = 300,
    factor: Annotated[int | None, typer.Option(help="Patches a side of an image.", rich_help_panel=_STAGES, show_default="1 up to 32 pixels, else 2", min=1)] = None,
    pool: Annotated[int, typer.Option(help="Images of a class to choose patches from.", rich_help_panel=_STAGES, min=1)] = 300,
    crop_from: Annotated[float | None, typer.Option(help="Smallest share of an image's area that a patch shows.", rich_help_panel=_STAGES, show_default="that of a tile")] = None,
    order: Annotated[Choice, typer.Option(help="Patches of low confidence first, as the paper has it, of high, or random ones.", rich_help_panel=_STAGES)] = Choice.low,
    drop_wrong: Annotated[bool, typer.Option("--drop-wrong", help="No patches that the teacher takes for another class.", rich_help_panel=_STAGES)] = False,
    eps: Annotated[float, typer.Option(help="From here on, of 0..1, a pixel is critical and stays.", rich_help_panel=_STAGES)] = 0.6,
    steps: Annotated[int, typer.Option(help="Steps of refinement.", rich_help_panel=_STAGES, min=0)] = 1000,
    alpha_bn: Annotated[float, typer.Option(help="Weight of the statistics of real images.", rich_help_panel=_STAGES)] = 0.05,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the views; not for digits or letters.", rich_help_panel=_STAGES)] = True,
    evaluate: Annotated[Path | None, typer.Option("--evaluate", help="Labelled images to measure on.", rich_help_panel=_MEASURING, show_default="a part of IMAGES that is held out")] = None,
    hold_out: Annotated[float, typer.Option(help="Share of IMAGES to hold out, of every class.", rich_help_panel=_MEASURING)] = 0.2,
    student: Annotated[str | None, typer.Option("--student", help="package.module:factory of another network to train.", rich_help_panel=_MEASURING, show_default="the teacher's architecture")] = None,
    students: Annotated[int, typer.Option(help="Students to train on each set of images.", rich_help_panel=_MEASURING, min=2)] = 3,
    epochs: Annotated[int, typer.Option(help="Passes of a student over its images.", rich_help_panel=_MEASURING, min=1)] = 300,
    limit: Limit = 1000,
    image_mean: ImageMean = None,
    image_std: ImageStd = None,
    image_size: ImageSize = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    report: Annotated[Path | None, typer.Option(help="Report page.", show_default="OUT.report.html")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Distil labelled images into a few per class: critical pixels stay, the others are rewritten (NRR-DD, CVPR 2025).

    Students trained on the result are measured on held-out images against students of as many random real images and
    of the same patches unrefined, and that is printed first.
    """
    from salience.cli._students import correct, fresh
    from salience.data import NRRDD
    from salience.io import Output
    from salience.model import load

    page = check_paths(out, report, overwrite)
    read = [images, teacher, *([] if evaluate is None else [evaluate])]
    with Output(out, overwrite, read, folder=True) as output, progress(as_json) as status, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        told = _told(warnings)
        status.update("reading")
        loaded = load(teacher, arch=arch)
        normal = _normalisation(loaded, channels_of("--image-mean", image_mean), channels_of("--image-std", image_std))
        data = _read(images, evaluate, loaded, normal, image_size, hold_out, limit, seed)
        side = min(data.images[0][0].shape[1:])
        distiller = NRRDD(
            loaded.model, ipc, mean=data.mean, std=data.std, factor=factor or (1 if side <= 32 else 2), pool=pool,
            scale=None if crop_from is None else (crop_from, 1.0), order=order.value, drop_wrong=drop_wrong, eps=eps, steps=steps, alpha_bn=alpha_bn, knowledge=labels.value, views=views,
            flip=flip, random_state=seed,
        )  # fmt: skip
        make = _maker(student) if student else lambda number: fresh(loaded.model, number)
        make(seed)  # what cannot be built is found before anything is computed
        sets, shown = _distil(distiller, data, students, status.update)
        comparison = _compare(sets, make, data, epochs, seed, status.update)
        comparison.scores["teacher"] = correct(loaded.model, *data.test)
        comparison.draws["teacher"] = [comparison.scores["teacher"]]
        made = sets[DISTILLED][0]
        made.save(output.folder)
        facts = _facts(made, distiller, data, output.folder)
        output.commit(
            {"command": "compress dataset", "images": str(images), "teacher": str(teacher), "seed": seed, **facts}
        )
    from salience.cli._compress_dataset_page import write_page

    write_page(page, str(out), facts, comparison, shown, list(told))
    _print(facts, comparison, list(told), out, page, as_json)


def _told(module: Any) -> dict[str, None]:
    """Warnings as sentences, each once; they are printed with the result."""
    told: dict[str, None] = {}
    module.showwarning = lambda message, *rest, **more: told.setdefault(str(message))
    return told


def _normalisation(
    loaded: Loaded, mean: list[float] | None, std: list[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel: of the image processor, or as given."""
    if loaded.processor is None:
        if mean is None or std is None:
            raise InputError("--image-mean and --image-std: the teacher comes without an image processor; give both")
        return tuple(mean), tuple(std)
    if mean is not None or std is not None:
        raise InputError("--image-mean and --image-std: the teacher brings its image processor; leave them out")
    processor = getattr(loaded.processor, "image_processor", loaded.processor)
    if not getattr(processor, "do_normalize", False):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(map(float, processor.image_mean)), tuple(map(float, processor.image_std))


def _read(
    path: Path, evaluate: Path | None, loaded: Loaded, normal: tuple[tuple[float, ...], tuple[float, ...]],
    size: int | None, hold_out: float, limit: int, seed: int,
) -> Data:  # fmt: skip
    import torch
    from sklearn.model_selection import train_test_split

    from salience.model import read_images
    from salience.weights.evaluation import matched_labels

    own: dict[str, Any] = {} if loaded.processor is not None else {"mean": normal[0], "std": normal[1], "size": size}
    images = read_images(path, loaded.processor, **own)
    labels = _labels(path, images)
    numbers = matched_labels(labels, images.class_names, loaded.model)
    names = [str(number) for number in range(int(numbers.max()) + 1)]
    for label, number in zip(labels.tolist(), numbers.tolist(), strict=True):
        names[number] = names[number] if images.class_names is None else images.class_names[label]
    rows = torch.arange(len(images))
    if evaluate is not None:
        others = read_images(evaluate, loaded.processor, **own, limit=limit)
        test_labels = matched_labels(_labels(evaluate, others), others.class_names, loaded.model)
        test = torch.stack([others[i][0] for i in range(len(others))])
        return Data(images, numbers, rows, (test, test_labels), names, *normal)
    if not 0 < hold_out < 1:
        raise InputError(f"--hold-out must lie between 0 and 1, not {hold_out}")
    if int(numbers.bincount().clamp(max=2)[numbers.unique()].min()) < 2:
        raise DataError(f"{path}: a class has one image only, so that none can be held out; give --evaluate")
    kept, held = train_test_split(rows.numpy(), test_size=hold_out, stratify=numbers.numpy(), random_state=seed)
    held = sorted(held.tolist())[:: max(1, -(-len(held) // limit))]
    test = torch.stack([images[i][0] for i in held])
    return Data(images, numbers, torch.as_tensor(sorted(kept.tolist())), (test, numbers[held]), names, *normal)


def _labels(path: Path, images: ImageSet) -> torch.Tensor:
    if images.labels is None:
        raise DataError(f"{path}: has no labels (sub-folders, or a column 'label')")
    if len(images.labels.unique()) < 2:
        raise NothingToDo(f"{path}: holds one class only")
    return images.labels


def _maker(name: str) -> Any:
    import torch

    from salience.model.loading import factory

    build = factory(name)

    def make(seed: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = build()
        if not isinstance(made, torch.nn.Module):
            raise InputError(f"--student: {name} returned a {type(made).__name__}; it must return a torch.nn.Module")
        return made

    return make


def _distil(
    distiller: NRRDD, data: Data, students: int, step: Any
) -> tuple[dict[str, list[DistilledSet]], dict[str, Any]]:
    """The distilled set and those that it is compared with, and what there is to look at."""
    from torch.utils.data import Subset

    from salience.data import HardLabels, class_activation_map
    from salience.data.nrr_dd.distilled import pictures

    step("choosing patches")
    images, labels = Subset(data.images, data.rows.tolist()), data.labels[data.rows]
    x, y = distiller.discover(images, labels)
    step("refining")
    refined = distiller.refine(x, y)
    step("labelling")
    made = distiller.label(refined, y, data.names)
    alone = HardLabels(made.labels.views, _classes(distiller, x))
    draws = [_random(images, labels, y, distiller.random_state + number) for number in range(students)]
    sets = {
        DISTILLED: [made] * students,
        RANDOM: [distiller.label(draw, y, data.names, tiles=1) for draw in draws],
        UNREFINED: [distiller.label(x, y, data.names)] * students,
    }
    if distiller.knowledge != "hard":
        sets[ALONE] = [_with(made, alone)] * students
    view = {name: pictures(part, data.mean, data.std) for name, part in
            (("random", draws[0]), ("before", x), ("after", refined))}  # fmt: skip
    critical = class_activation_map(distiller.teacher, x, y)[:, 0] >= distiller.eps
    return sets, {**view, "critical": critical.numpy(), "names": [data.names[label] for label in y.tolist()]}


def _random(images: Any, labels: torch.Tensor, y: torch.Tensor, seed: int) -> torch.Tensor:
    """A random real image, whole, for each distilled one of its class."""
    import torch

    from salience.data.nrr_dd.discovery import take

    generator, rows = torch.Generator().manual_seed(seed), torch.empty(len(y), dtype=torch.long)
    for label in y.unique():
        own, places = (labels == label).nonzero()[:, 0], (y == label).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator)
        rows[places] = own[order.repeat(-(-len(places) // len(own)))[: len(places)]]
    return take(images, rows)


def _with(made: DistilledSet, labels: Any) -> DistilledSet:
    from dataclasses import replace

    return replace(made, labels=labels)


def _classes(distiller: NRRDD, x: torch.Tensor) -> int:
    import torch

    from salience.model import logits_of

    with torch.no_grad():
        return logits_of(distiller.teacher(x[:1])).shape[1]


def _compare(sets: Any, make: Any, data: Data, epochs: int, seed: int, step: Any) -> StudentComparison:
    from salience.cli._students import compare_students

    return compare_students(sets, make, data.test, epochs=epochs, seed=seed, step=step)


def _facts(made: DistilledSet, distiller: NRRDD, data: Data, folder: Path) -> dict[str, Any]:
    classes = _classes(distiller, made.x)
    views = len(made.labels.views)
    return {
        "classes": len(made.y.unique()), "ipc": distiller.ipc, "factor": distiller.factor, "images": len(made.x),
        "read": len(data.rows), "held_out": len(data.test[0]), "labels": distiller.knowledge, "views": views,
        "bytes_images": sum(file.stat().st_size for file in (folder / "images").rglob("*.png")),
        "bytes_labels": made.labels.nbytes, "bytes_soft_labels": 4 * len(made.x) * views * classes + 8 * views,
        "steps": distiller.steps, "eps": distiller.eps, "alpha_bn": distiller.alpha_bn,
    }  # fmt: skip


def _print(
    facts: dict[str, Any], comparison: StudentComparison, told: list[str], out: Path, page: Path, as_json: bool
) -> None:
    if as_json:
        measured = comparison.as_dict(DISTILLED)
        typer.echo(json.dumps({**facts, "out": str(out), "report": str(page), "notes": told, "evaluation": measured}))
        return
    words = sentence(comparison, DISTILLED, UNREFINED)
    print_comparison(comparison, DISTILLED, RANDOM)
    say(words[0].upper() + words[1:] + ".\n")
    for note in told:
        say(f"note: {note}", err=True)
    say(
        f"images  {facts['read']:,} -> {facts['images']:,} ({facts['ipc']} for each of {facts['classes']} classes), "
        f"{facts['bytes_images'] / 1e3:,.1f} kB\n"
        f"labels  {facts['labels']}, {facts['views']} views: {facts['bytes_labels'] / 1e3:,.1f} kB; soft labels would "
        f"take {facts['bytes_soft_labels'] / 1e3:,.1f} kB"
    )
    say(f"written: {out}\nreport:  {page}")
