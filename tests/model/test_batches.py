from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from salience.errors import InputError, NothingToDo
from salience.model import map_batches

ROWS = torch.arange(22.0).reshape(11, 2)


class Pairs(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"x": ROWS[i], "name": f"row {i}"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def double(batch):
    return batch * 2


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
@pytest.mark.parametrize("data", [ROWS, DataLoader(ROWS, 3), Stream(), DataLoader(Stream(), 3)])
def test_results_are_those_of_one_pass_in_order(data, batch_size):
    assert torch.equal(map_batches(double, data, batch_size=batch_size), ROWS * 2)


def test_every_kind_of_data_reaches_fn_as_documented():
    seen = []

    def remember(batch):
        seen.append(batch)
        return torch.zeros(2, 1)

    map_batches(remember, ROWS.numpy()[:2], batch_size=2)
    assert isinstance(seen.pop(), np.ndarray)
    map_batches(remember, ["a", "b"], batch_size=2)
    assert seen.pop() == ["a", "b"]
    map_batches(remember, TensorDataset(ROWS[:2], torch.tensor([5, 6])), batch_size=2)
    x, y = seen.pop()
    assert torch.equal(x, ROWS[:2]) and y.tolist() == [5, 6]
    got = map_batches(lambda b: b["x"] * torch.tensor([[len(n)] for n in b["name"]]), Pairs(), batch_size=4)
    assert torch.equal(got, ROWS * torch.tensor([[5]] * 10 + [[6]]))


def test_tuples_and_dicts_of_results():
    first, second = map_batches(lambda b: (b, b.sum(1)), ROWS, batch_size=4)
    assert torch.equal(first, ROWS) and torch.equal(second, ROWS.sum(1))
    result = map_batches(lambda b: {"a": b, "b": (b > 5)}, ROWS, batch_size=4)
    assert torch.equal(result["a"], ROWS) and torch.equal(result["b"], ROWS > 5)


def test_results_leave_the_graph():
    weight = torch.ones(2, requires_grad=True)
    assert not map_batches(lambda b: b * weight, ROWS, batch_size=4).requires_grad


class Limited:
    """A function that runs out of memory above `limit` rows."""

    def __init__(self, limit, error):
        self.limit, self.error, self.sizes = limit, error, []

    def __call__(self, batch):
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, list) else batch
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise self.error
        if isinstance(batch, dict):
            assert len(batch["name"]) == len(x)
        return x * 2


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_once_for_all_and_says_so_once(error):
    fn = Limited(2, error)
    with pytest.warns(UserWarning, match="going on with 4 rows") as warned:
        result = map_batches(fn, ROWS, batch_size=8)
    assert torch.equal(result, ROWS * 2)
    assert len(warned) == 1
    assert fn.sizes == [8, 4, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    "loader", [DataLoader(Pairs(), 5), DataLoader(TensorDataset(ROWS, ROWS), 5), DataLoader(ROWS, 5)]
)
def test_batches_of_a_loader_are_halved_too(loader):
    with pytest.warns(UserWarning, match="out of memory"):
        result = map_batches(Limited(2, OUT_OF_MEMORY[0]), loader)
    assert torch.equal(result, ROWS * 2)


def test_a_single_row_that_does_not_fit_and_other_errors_are_raised():
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        map_batches(Limited(0, OUT_OF_MEMORY[0]), ROWS, batch_size=2)
    fn = Limited(0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        map_batches(fn, ROWS, batch_size=8)
    assert fn.sizes == [8]


def test_progress_is_drawn_only_when_asked(capsys):
    map_batches(double, ROWS)
    assert capsys.readouterr().out == ""
    map_batches(double, ROWS, progress=True)
    assert "rows" in capsys.readouterr().out


@pytest.mark.parametrize("data", [ROWS, DataLoader(ROWS, 3), DataLoader(ROWS, 3, drop_last=True), Pairs()])
def test_a_result_on_disk_equals_that_in_memory(data, tmp_path):
    fn = (lambda b: b["x"] * 2) if isinstance(data, Pairs) else double
    expected = map_batches(fn, data, batch_size=4)
    got = map_batches(fn, data, batch_size=4, out=tmp_path / "r.npy")
    assert isinstance(got, np.memmap)
    assert np.array_equal(got, expected.numpy()) and got.dtype == np.float32
    assert np.array_equal(np.load(tmp_path / "r.npy"), expected.numpy())
    assert [f.name for f in tmp_path.iterdir()] == ["r.npy"]


def test_bfloat16_on_disk_is_float32(tmp_path):
    got = map_batches(lambda b: b.bfloat16(), ROWS, out=tmp_path / "r.npy")
    assert got.dtype == np.float32 and np.array_equal(got, ROWS.numpy())


def test_a_failed_run_leaves_no_file(tmp_path):
    def fails(batch):
        if batch[0, 0] > 10:
            raise ZeroDivisionError
        return batch

    with pytest.raises(ZeroDivisionError):
        map_batches(fails, ROWS, batch_size=4, out=tmp_path / "r.npy")
    assert list(tmp_path.iterdir()) == []


def test_unusable_out_is_refused(tmp_path):
    (tmp_path / "there.npy").write_text("mine")
    for name in ("there.npy", "r.bin"):
        with pytest.raises(InputError, match="out"):
            map_batches(double, ROWS, out=tmp_path / name)
    assert (tmp_path / "there.npy").read_text() == "mine"
    with pytest.raises(InputError, match="how many rows"):
        map_batches(double, Stream(), out=tmp_path / "r.npy")
    with pytest.raises(InputError, match="single tensor"):
        map_batches(lambda b: (b, b), ROWS, out=tmp_path / "r.npy")


@pytest.mark.parametrize("data", [torch.empty(0, 2), [], DataLoader([], 2), TensorDataset(torch.empty(0))])
def test_empty_data_is_said(data):
    with pytest.raises(NothingToDo, match="data"):
        map_batches(double, data)


def test_bad_arguments_are_named():
    for size in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="batch_size"):
            map_batches(double, ROWS, batch_size=size)
    for data in (5, "text", {"a": ROWS}):
        with pytest.raises(InputError, match="data"):
            map_batches(double, data)
    for fn in (lambda b: b.mean(), lambda b: b[:1], lambda b: None, lambda b: {"a": 1.0}):
        with pytest.raises(InputError, match="fn"):
            map_batches(fn, ROWS, batch_size=4)
