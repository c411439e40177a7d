"""`salience verify concepts`: may a concept explanation of the user's model be trusted, and can people use it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from salience.cli._say import say
from salience.cli.verbs import verify
from salience.errors import InputError, SalienceError

if TYPE_CHECKING:
    import numpy as np

    from salience.concepts import AuditReport
    from salience.concepts.concept_audit.reading import ProbeFiles

_EPILOG = (
    "Examples:\n\n"
    "salience verify concepts my-resnet/ street.parquet indoor.parquet --generic resnet-imagenet/ -o audit\n\n"
    "salience verify concepts net.safetensors own=photos/ other=scans/ --arch my_package.models:net --generic "
    "other.safetensors --generic-arch my_package.models:other --size 32 --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 -o audit\n\n"
    "Exit codes: 0 done, 2 usage, 3 bad data, 4 nothing to do, 130 interrupted."
)
_DATA = "Images"
_STUDY = "Study with people"
_CLASSES = 4  # of the study, as in the paper


@verify.command("concepts", epilog=_EPILOG)
def concepts(
    model: Annotated[str, typer.Argument(help="A transformers directory of an image classifier, or FILE.safetensors with --arch.", show_default=False)],
    probes: Annotated[list[str], typer.Argument(help="Probe sets, the one closest to the training data first, as PATH or NAME=PATH: .parquet with columns image, label and one of 0 and 1 for each concept; or a folder of images with concepts.csv (column file, and one for each concept).", show_default=False)],
    generic: Annotated[str, typer.Option("--generic", "-g", help="A network trained on something else, from whose features concepts are learned.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder: report.html, report.md, concepts.jsonl, study.html, study-key.json.", show_default=False)],
    concept: Annotated[list[str] | None, typer.Option("--concept", help="Column of a concept; may be repeated.", show_default="all columns of 0 and 1")] = None,
    control: Annotated[str | None, typer.Option(help="Probe set of the same distribution as the first.", show_default="halves of the first")] = None,
    threshold: Annotated[float | None, typer.Option(help="Normalised average precision that a concept must reach.", show_default="the model's median class")] = None,
    layer: Annotated[str | None, typer.Option("--layer", "-l", help="Layer to look at.", show_default="what goes into the last linear layer")] = None,
    generic_layer: Annotated[str | None, typer.Option(help="Layer of the generic network, likewise.", show_default=False)] = None,
    arch: Annotated[str | None, typer.Option(help="For a .safetensors file: package.module:factory that builds the network.", show_default=False)] = None,
    generic_arch: Annotated[str | None, typer.Option(help="The same for the generic network.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(help="Without a processor: size of the images, as in 224 or 224x320.", rich_help_panel=_DATA, show_default="as they are")] = None,
    mean: Annotated[str | None, typer.Option(help="Without a processor: mean of each channel of 0..1, as in 0.485,0.456,0.406.", rich_help_panel=_DATA, show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Without a processor: standard deviation of each channel.", rich_help_panel=_DATA, show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Take at most so many images of a set, evenly spread.", rich_help_panel=_DATA, show_default=False)] = None,
    study_concepts: Annotated[int, typer.Option(help="Concepts of the explanation that people get, at most.", rich_help_panel=_STUDY)] = 16,
    study_tasks: Annotated[int, typer.Option(help="Images to ask about.", rich_help_panel=_STUDY)] = 10,
    study_arm: Annotated[str, typer.Option(help="concepts, or examples for a control group that sees none.", rich_help_panel=_STUDY)] = "concepts",
    batch_size: Annotated[int, typer.Option(help="Images at once; halved when memory runs out.")] = 64,
    device: Annotated[str, typer.Option(help="Where to compute, as in cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the splits and of the study.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of this command.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Find out whether a concept explanation of your model can be trusted, before anybody believes it.

    Printed first: do probe sets agree, against two halves of the first; can the concepts be learned, against how well
    the model knows its classes; how many concepts are needed, against the 32 that people can use. The folder also gets
    a page to try the explanation on people, which works offline.
    """
    if min(1 if limit is None else limit, study_concepts, study_tasks, batch_size) < 1 or seed < 0:
        raise InputError(
            "--limit, --study-concepts, --study-tasks and --batch-size must be at least 1, --seed at least 0"
        )
    if study_arm not in ("concepts", "examples"):
        raise InputError(f"--study-arm: must be concepts or examples, not {study_arm!r}")
    sources = _sources(probes)
    if control is not None and control not in list(sources)[1:]:
        raise InputError(
            f"--control: must name a probe set after the first, not {control!r}; there are {', '.join(sources)}"
        )
    _run(model, sources, generic, out, concept, {"control": control, "threshold": threshold, "layer": layer},
         generic_layer=generic_layer, arch=arch, generic_arch=generic_arch, size=size, mean=mean, std=std, limit=limit,
         study=(study_arm, study_concepts, study_tasks), batch_size=batch_size, device=device, seed=seed,
         overwrite=overwrite, as_json=as_json)  # fmt: skip


def _sources(written: list[str]) -> dict[str, str]:
    """Paths by name: NAME=PATH, or the path's own stem."""
    found: dict[str, str] = {}
    for each in written:
        name, path = each.split("=", 1) if "=" in each and not Path(each).exists() else (Path(each).stem, each)
        if not name or name in found:
            raise InputError(f"probe sets: two are called {name!r}; give them names, as in NAME={path}")
        found[name] = path
    return found


def _run(model, sources, generic, out, wanted, options, *, generic_layer, arch, generic_arch, size, mean, std, limit,
         study, batch_size, device, seed, overwrite, as_json) -> None:  # fmt: skip
    import torch
    from rich.console import Console

    from salience.cli._verify_concepts_page import write_page
    from salience.cli.explain_concepts import _class_names
    from salience.cli.explain_saliency import _device, _numbers, _size
    from salience.concepts import audit
    from salience.io import Output
    from salience.model import load

    own = {"size": _size(size), "mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    loaded, other = (load(path, arch=code, device=_device(device))
                     for path, code in ((model, arch), (generic, generic_arch)))  # fmt: skip
    files = {name: _opened(path, loaded.processor, wanted, own) for name, path in sources.items()}
    first = next(iter(files))
    names = _class_names(loaded.model, files[first].images)
    rows = {name: _spread(len(one.images), limit) for name, one in files.items()}
    with Output(out, overwrite, [model, generic, *sources.values()], folder=True) as folder:
        with Console(stderr=True).status("reading") as status:
            status.update(f"running the generic network on {first}")
            features = _generic_features(other, sources[first], wanted, own, rows[first], generic_layer, batch_size)
            found = audit(
                loaded.model, {name: _probe(one, rows[name], names) for name, one in files.items()}, features,
                class_names=dict(enumerate(names or ())), batch_size=batch_size, progress=status.update,
                generator=torch.Generator().manual_seed(seed), **options,
            )  # fmt: skip
        made = _write_study(folder, found, files[first], rows[first], study, seed)
        settings = {
            "command": "verify concepts", "model": model, "generic": generic, "probes": sources, **options,
            "generic_layer": generic_layer, "seed": seed, "study": list(study),
        }  # fmt: skip
        _write_lines(folder, found)
        folder.file("report.md").write_text(found.to_markdown(), encoding="utf-8")
        write_page(found, settings, made, folder.file("report.html"))
        folder.commit({**settings, "counts": {name: len(one) for name, one in rows.items()}})
    _print(found, out, made, as_json)


def _opened(path: str, processor: Any, wanted: list[str] | None, own: dict[str, Any]) -> ProbeFiles:
    from salience.concepts import read_probe

    processor = getattr(processor, "image_processor", processor)
    if any(value is not None for value in own.values()):
        return read_probe(path, concepts=wanted, **own)
    return read_probe(path, processor, concepts=wanted)


def _spread(n: int, limit: int | None) -> np.ndarray:
    import numpy as np

    return np.linspace(0, n - 1, min(n, limit or n)).round().astype(int)


def _generic_features(other, path, wanted, own, rows, layer, batch_size) -> np.ndarray:
    from torch.utils.data import Subset

    from salience.concepts.concept_audit.observing import observe

    images = Subset(_opened(path, other.processor, wanted, own).images, rows.tolist())
    return observe(other.model, images, layer, batch_size=batch_size).features


def _probe(one: ProbeFiles, rows: np.ndarray, names: list[str] | None) -> Any:
    """A probe set as `audit` takes it; classes that are folders are numbered as the model names them."""
    import numpy as np
    from torch.utils.data import Subset

    from salience.concepts import ProbeSet

    labels, own = one.labels, one.images.class_names
    if labels is not None and own and names and set(own) <= set(names):
        labels = np.array([names.index(name) for name in own])[labels]
    return ProbeSet(
        Subset(one.images, rows.tolist()), one.concepts[rows], one.names, None if labels is None else labels[rows]
    )


class _Pictures:
    """Pictures of some rows, decoded when asked for."""

    def __init__(self, one: ProbeFiles, rows: np.ndarray) -> None:
        self._images, self._rows = one.images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._images.picture(int(self._rows[i]))


def _write_study(folder: Any, found: AuditReport, one: ProbeFiles, rows: np.ndarray, study: tuple[str, int, int],
                 seed: int) -> str:  # fmt: skip
    """The page for people and its key; what was left undone and why, or nothing."""
    import numpy as np

    from salience.concepts import UserStudyKit, capacity_path
    from salience.concepts.concept_audit.explaining import STUDY_KS

    arm, k, tasks = study
    labels, predicted = one.concepts[rows], found.predictions
    classes, counts = np.unique(predicted, return_counts=True)
    chosen = classes[np.argsort(-counts, kind="stable")[:_CLASSES]]
    own = np.isin(predicted, chosen)
    try:
        path = capacity_path(labels[own].astype(float), predicted[own], (*STUDY_KS, k), names=one.names)
        explanation = next(each.explanation for each in path if each.k >= k and each.names)
        kit = UserStudyKit(arm=arm, random_state=seed)
        page = kit.make_tasks(cast(Any, _Pictures(one, rows)), labels, predicted, explanation, tasks, class_names=found.class_names,
                              path=[each for each in path if each.k in STUDY_KS])  # fmt: skip
    except (SalienceError, StopIteration) as error:
        return f"no study was made: {error}" if str(error) else "no study was made: no explanation uses a concept"
    folder.file("study.html").write_text(page, encoding="utf-8")
    kit.save(folder.file("study-key.json"))
    return ""


def _write_lines(folder: Any, found: AuditReport) -> None:
    shift, learn = found.shift, found.learn
    with open(folder.file("concepts.jsonl"), "w", encoding="utf-8") as file:
        for name in dict.fromkeys([*shift.concepts, *learn.nap, *shift.skipped, *learn.skipped]):
            line = {
                "concept": name, "nap": learn.nap.get(name), "learnable": learn.keep.get(name),
                "cosines": {other: values[name] for other, values in shift.cosines.items() if name in values},
                "aucs": {which: values[name] for which, values in shift.aucs.items() if name in values},
                "left_out": shift.skipped.get(name) or learn.skipped.get(name),
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def record(found: AuditReport) -> dict[str, Any]:
    """What was found, as plain data."""
    shift, learn = found.shift, found.learn

    def mean(values: dict) -> float | None:
        return sum(values.values()) / len(values) if values else None

    return {
        "findings": [one._asdict() for one in found.findings], "notes": found.notes, "reference": shift.reference,
        "control": shift.control, "rows": shift.rows,
        "mean_cosine": {name: mean(values) for name, values in shift.cosines.items()},
        "gap": {name: list(shift.gap(name)[:3]) for name in shift.others if len(shift.concepts) > 1},
        "fidelity": shift.fidelity, "transfer": shift.transfer,
        "overlap": {name: mean(values) for name, values in shift.overlap.items()},
        "learnable": sum(learn.keep.values()), "concepts": len(learn.nap), "threshold": learn.threshold,
        "capacity": [{"k": one.k, "used": len(one.names), "fidelity": one.fidelity} for one in found.path],
        "left_out": {**shift.skipped, **learn.skipped},
    }  # fmt: skip


def _print(found: AuditReport, out: Path, missing: str, as_json: bool) -> None:
    study = None if missing else str(out / "study.html")
    if as_json:
        typer.echo(json.dumps({"out": str(out), "report": str(out / "report.html"), "study": study, **record(found)}))
        return
    from rich.console import Console
    from rich.table import Table

    for one in found.findings:
        say(f"{one.title}: {one.text}.")
    typer.echo("")
    table = Table(box=None, pad_edge=False)
    for column in ("probe set", "rows", "mean cosine", "own fidelity", "fidelity of the first's", "same top concepts"):
        table.add_column(column, justify="left" if column == "probe set" else "right")
    shift = found.shift
    for name in shift.rows:
        cells = [shift.cosines.get(name), {"": shift.fidelity[name]},
                 {"": shift.transfer[name]} if name in shift.transfer else None, shift.overlap.get(name)]  # fmt: skip
        table.add_row(name, f"{shift.rows[name]:,}", *(f"{sum(c.values()) / len(c):.2f}" if c else "" for c in cells))
    Console(width=110, highlight=False).print(table, markup=False)
    for note in [*found.notes, *([missing] if missing else [])]:
        say(f"note: {note}", err=True)
    left = {**shift.skipped, **found.learn.skipped}
    if left:
        say(f"note: {len(left)} concepts or classes were left out, for reasons in {out / 'report.md'}", err=True)
    say(f"\nwritten: {out}\nreport:  {out / 'report.html'}" + (f"\nstudy:   {study}" if study else ""))
