"""What each method costs and buys: all on the same base, data and steps, each at the best of its own learning rates."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from salience.errors import InputError, NothingToDo, nearest
from salience.model.at import logits_of, training_mode
from salience.model.fitting import fit
from salience.weights.peft_survey.attaching import attach, extra_loss, head_parameters, prepare_optimizer, trainable
from salience.weights.peft_survey.cards import MODALITIES, REGISTRY, card_of
from salience.weights.peft_survey.stored import merge_adapter, save_adapter
from salience.weights.sparseland.accounting import measure_latency

Data = tuple[Shaped[Tensor, "n ..."], Shaped[Tensor, "n ..."]]
Loss = Callable[[Any, Tensor], Tensor]
FULL, HEAD, BASE = "full", "head", "base"  # anchors: everything, the head alone, nothing
_FULL_RATES = (3e-4, 1e-3, 3e-3)


class Trial(NamedTuple):
    """One model that was tuned, with its validation loss or metric before and after, and the mean time of a step."""

    model: Any
    start: float
    end: float
    step_seconds: float


@dataclass(frozen=True)
class BenchRow:
    """What was measured of one method.

    Parameters
    ----------
    method, category : str
    lr : float
        The best of its grid on validation data.
    trainable : int
        Entries that train, the head included; `share` of the model's.
    share : float
    added_parameters, added_flops : int
        Of the network as it would be used (merged, where it can be): parameters, and operations of one row in matrix
        products and convolutions.
    mergeable : bool
    merge_error : float
        Largest change of an output by merging, as a share of the largest output; NaN where there is no merging.
    training_bytes : int
        Weights, gradients, two moments of Adam, and all that backward keeps of one batch.
    step_seconds, latency_seconds : float
        Mean of a training step, median of a pass over one row, here and now.
    file_bytes : int
        Of the saved adapter's weights.
    start, valid, metric : float
        Validation before and after, which choices are made by, and the test metric, which is told: means over seeds.
    metrics, valids : tuple of float
        The test metric and the validation metric after, of each seed.
    """

    method: str
    category: str
    lr: float
    trainable: int
    share: float
    added_parameters: int
    added_flops: int
    mergeable: bool
    merge_error: float
    training_bytes: int
    step_seconds: float
    latency_seconds: float
    file_bytes: int
    start: float
    valid: float
    metric: float
    metrics: tuple[float, ...]
    valids: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation over seeds of the validation metric; 0 with one."""
        return statistics.stdev(self.valids) if len(self.valids) > 1 else 0.0


@dataclass(frozen=True)
class BenchTable:
    """Measured rows, best on validation first.

    Parameters
    ----------
    rows : tuple of BenchRow
    higher_is_better : bool
    """

    rows: tuple[BenchRow, ...]
    higher_is_better: bool = False

    def pareto(self, cost: str = "trainable") -> list[BenchRow]:
        """Rows that no other beats on validation at the same or lower cost; cheapest first.

        Parameters
        ----------
        cost : str
            A number of `BenchRow`, such as "trainable", "file_bytes", "latency_seconds", "training_bytes".
        """
        best, front = -math.inf, []
        for row in sorted(self.rows, key=lambda row: (getattr(row, cost), -self.gain(row))):
            if self.gain(row) > best:
                best = self.gain(row)
                front.append(row)
        return front

    def gain(self, row: BenchRow) -> float:
        """The validation metric, turned so that more is better: choosing by the test part would flatter the choice."""
        return row.valid if self.higher_is_better else -row.valid

    def to_markdown(self) -> str:
        """The table as Markdown."""
        head = ["method", "family", "lr", "trainable", "share", "added", "added MFLOP", "merges", "training MB",
                "step ms", "pass ms", "file kB", "before", "after", "test"]  # fmt: skip
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        for r in self.rows:
            merges = f"yes, to {r.merge_error:.0e}" if r.mergeable else "no"
            cells = [r.method, r.category, f"{r.lr:g}", f"{r.trainable:,}", f"{100 * r.share:.2f} %",
                     f"{r.added_parameters:,}", f"{r.added_flops / 1e6:.2f}", merges, f"{r.training_bytes / 1e6:.1f}",
                     f"{1e3 * r.step_seconds:.1f}", f"{1e3 * r.latency_seconds:.1f}", f"{r.file_bytes / 1e3:.1f}",
                     f"{r.start:.3f}", f"{r.valid:.3f}", f"{r.metric:.3f}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def tune(
    make_model: Callable[[], nn.Module],
    method: str,
    train: Data,
    valid: Data,
    *,
    loss: Loss,
    lr: float,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    head: Sequence[str] = (),
    metric: Callable[[nn.Module, Data], float] | None = None,
    **options: Any,
) -> Trial:
    """Attach a method to a fresh base and train it by AdamW without weight decay.

    Parameters
    ----------
    make_model : callable
        Makes the base, the same at every call.
    method : str
        As of `attach`, or "full" (everything trains) or "head" (only `head`).
    train, valid : (Tensor, Tensor)
        Inputs and targets, row by row; the model is called with the inputs.
    loss : callable
        ``loss(output, targets)``, the mean over the batch.
    lr, epochs, batch_size, seed, head
    metric : callable, optional
        ``metric(model, (inputs, targets))``; the mean loss by default.
    options : optional
        Of the method.

    Raises
    ------
    InputError
        As `attach` and `salience.model.fit`.
    """
    generator = torch.Generator().manual_seed(seed)
    model = make_model()
    if method in (FULL, HEAD):
        wanted = set(head_parameters(model, head)) if method == HEAD else {name for name, _ in model.named_parameters()}
        if not wanted:
            raise InputError("head: is empty; 'head' as a method trains nothing else")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
        tuned: Any = model
    else:
        tuned = attach(model, method, head=head, generator=generator, **options)
    measure = metric or (lambda m, data: mean_loss(m, data, loss, batch_size))
    start = measure(tuned, valid)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    prepare_optimizer(tuned, optimizer)
    steps = [0]
    optimizer.register_step_post_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    began = time.perf_counter()
    fit(
        tuned, *train, loss=lambda output, targets: loss(output, targets) + extra_loss(tuned), optimizer=optimizer,
        epochs=epochs, batch_size=batch_size, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    seconds = (time.perf_counter() - began) / max(1, steps[0])
    return Trial(tuned.eval(), start, measure(tuned, valid), seconds)


def peft_bench(
    make_model: Callable[[], nn.Module],
    train: Data,
    valid: Data,
    test: Data,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    loss: Loss,
    metric: Callable[[nn.Module, Data], float] | None = None,
    higher_is_better: bool = False,
    epochs: int = 1,
    batch_size: int = 8,
    lrs: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    seeds: Sequence[int] = (0,),
    head: Sequence[str] = (),
    step: Callable[[str], None] = lambda _: None,
) -> BenchTable:
    """Fill the survey's table by measurement on your own model and data.

    Every method gets the same base, data, order and number of steps, and the best of its own learning rates on the
    validation part; figures of the table are from the test part.

    Parameters
    ----------
    make_model, train, valid, loss, metric, epochs, batch_size, head
        As of `tune`.
    test : (Tensor, Tensor)
        What the metric of the table is measured on.
    methods : sequence of str, or mapping of str to options
        Names of `peft_methods`, "full" or "head".
    higher_is_better : bool
        Whether `metric` is.
    lrs : sequence of float, or mapping of str to sequence, optional
        Grid for all methods, or by name; that of the method's card by default.
    seeds : sequence of int
        Of first values and of the order of batches.
    step : callable
        Told what is done next.

    Returns
    -------
    BenchTable
        With a row "base" for the model as it is.

    Raises
    ------
    InputError
        An unknown method, empty grid or data; no learning rate of a method gives a finite loss.
    """
    chosen = {name: {} for name in methods} if not isinstance(methods, Mapping) else methods
    for name in chosen:
        if name not in (FULL, HEAD):
            card_of(name)
    if not seeds or any(len(part[0]) < 1 for part in (train, valid, test)):
        raise InputError("seeds, train, valid and test: none may be empty")
    measure = metric or (lambda m, data: mean_loss(m, data, loss, batch_size))
    base = make_model().eval()
    example = test[0][:1]
    latency, flops = measure_latency(base, example), _flops(base, example)
    before, valid_before, total = measure(base, test), measure(base, valid), sum(p.numel() for p in base.parameters())
    rows = [
        BenchRow(BASE, "anchor", 0.0, 0, 0.0, 0, 0, True, math.nan, 0, 0.0, latency, 0, valid_before,
                 valid_before, before, (before,), (valid_before,))
    ]  # fmt: skip
    sign = 1.0 if higher_is_better else -1.0
    for name, options in chosen.items():
        best: tuple[float, float, list[Trial]] | None = None
        for lr in _grid(name, lrs):
            step(f"{name} at {lr:g}")
            try:
                trials = [
                    tune(make_model, name, train, valid, loss=loss, lr=lr, epochs=epochs, batch_size=batch_size,
                         seed=seed, head=head, metric=measure, **options)
                    for seed in seeds
                ]  # fmt: skip
            except InputError as error:
                if "the loss is" not in str(error):  # it diverged: another rate may not
                    raise
                continue
            score = statistics.fmean(trial.end for trial in trials)
            if math.isfinite(score) and (best is None or sign * score > best[0]):
                best = (sign * score, lr, trials)
        if best is None:
            raise InputError(f"lrs: training {name} diverged at every rate of {_grid(name, lrs)}; give smaller ones")
        rows.append(_row(name, best, measure, test, train, batch_size, loss, example, total, flops, base))
    rows.sort(key=lambda row: -sign * row.valid)
    return BenchTable(tuple(rows), higher_is_better)


def recommend_peft(
    table: BenchTable,
    *,
    budget: int | None = None,
    mergeable: bool | None = None,
    modality: str | None = None,
    file_bytes: int | None = None,
) -> BenchRow:
    """The method to take, from measured rows and never from an opinion.

    Of the rows that meet all wishes the best on validation; among those within its spread over seeds, the one with the
    fewest trained parameters. Its `metric`, of the test part, took no part in the choice.

    Parameters
    ----------
    table : BenchTable
    budget : int, optional
        Most parameters to train.
    mergeable : bool, optional
        Whether inference must cost no more than the base's.
    modality : str, optional
        As of `peft_methods`.
    file_bytes : int, optional
        Most bytes of the saved adapter.

    Raises
    ------
    InputError
        Unknown modality.
    NothingToDo
        No measured method meets all wishes, or none is better than the base.
    """
    if modality is not None and modality not in MODALITIES:
        raise InputError(f"modality: got {modality!r}; {nearest(modality, MODALITIES)}")
    base = next((row for row in table.rows if row.method == BASE), None)
    fitting = [
        row for row in table.rows
        if row.method in REGISTRY
        and (budget is None or row.trainable <= budget)
        and (mergeable is None or row.mergeable >= mergeable)
        and (modality is None or modality in REGISTRY[row.method].modality)
        and (file_bytes is None or row.file_bytes <= file_bytes)
    ]  # fmt: skip
    if not fitting:
        raise NothingToDo("table: no measured method meets all wishes; relax one, or measure more methods")
    best = max(fitting, key=table.gain)
    if base is not None and table.gain(best) <= table.gain(base):
        raise NothingToDo(f"table: no method that meets all wishes beats the base here; {best.method} comes closest")
    near = [row for row in fitting if table.gain(row) >= table.gain(best) - best.spread]
    return min(near, key=lambda row: (row.trainable, -table.gain(row)))


@torch.no_grad()
def mean_loss(model: nn.Module, data: Data, loss: Loss, batch_size: int = 32) -> float:
    """Mean loss over all rows, in evaluation mode."""
    device, total = next(model.parameters()).device, 0.0
    with training_mode(model, False):
        for inputs, targets in zip(data[0].split(batch_size), data[1].split(batch_size), strict=True):
            total += float(loss(model(inputs.to(device)), targets.to(device))) * len(inputs)
    return total / len(data[0])


def training_bytes(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss) -> int:
    """Bytes that one training step holds: weights, gradients, Adam's two moments, and what backward keeps.

    Counted tensor by tensor, so it is the same on every machine; what a kernel needs for itself is left out.
    """
    weights = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in (*model.parameters(), *model.buffers())
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(model.parameters()).device
    with training_mode(model, True), torch.random.fork_rng(devices=[]), torch.enable_grad(), \
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):  # fmt: skip
        value = loss(model(inputs.to(device)), targets.to(device))
        activations = sum(kept.values())
        del value
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(weights.values()) + activations + 3 * trained


def _grid(name: str, lrs: Sequence[float] | Mapping[str, Sequence[float]] | None) -> Sequence[float]:
    if isinstance(lrs, Mapping):
        lrs = lrs.get(name)
    if lrs is None:
        lrs = REGISTRY[name].learning_rates if name in REGISTRY else _FULL_RATES
    if not lrs or min(lrs) <= 0:
        raise InputError(f"lrs: got {list(lrs)} for {name}; give positive learning rates")
    return lrs


def _row(
    name: str, best: tuple[float, float, list[Trial]], measure: Callable[[nn.Module, Data], float], test: Data,
    train: Data, batch_size: int, loss: Loss, example: Tensor, total: int, flops: int, base: nn.Module,
) -> BenchRow:  # fmt: skip
    """Measure one tuned model; merging comes last, as it uses the model up."""
    _, lr, trials = best
    seconds = statistics.fmean(trial.step_seconds for trial in trials)
    model, count = trials[0].model, trainable(trials[0].model)
    metrics = tuple(measure(trial.model, test) for trial in trials)
    held = training_bytes(model, train[0][:batch_size], train[1][:batch_size], loss)
    anchor = name in (FULL, HEAD)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if not anchor:
        with tempfile.TemporaryDirectory() as folder:
            size = save_adapter(model, Path(folder) / "adapter")
    mergeable, error, used = anchor or REGISTRY[name].mergeable, math.nan, model
    if not anchor and mergeable:
        with torch.no_grad():
            one = logits_of(model(example))
            used = merge_adapter(model)
            two = logits_of(used(example))
        error = float((one - two).abs().max() / one.abs().max().clamp(min=1e-12))
    return BenchRow(
        name, "anchor" if anchor else REGISTRY[name].category, lr, count, count / total,
        sum(p.numel() for p in used.parameters()) - sum(p.numel() for p in base.parameters()),
        _flops(used, example) - flops, mergeable, error, held, seconds, measure_latency(used, example), size,
        statistics.fmean(trial.start for trial in trials), statistics.fmean(trial.end for trial in trials),
        statistics.fmean(metrics), metrics, tuple(trial.end for trial in trials),
    )  # fmt: skip


def _flops(model: nn.Module, example: Tensor) -> int:
    with training_mode(model, False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops()
