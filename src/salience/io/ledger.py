"""The ledger of a run: what finished units gave, on disk until the run is done, so that it can be resumed.

    run.json     what the results depend on: parameters and inputs
    STAGE.log    an entry per finished unit: size, xxh3-128, number and digest of the unit, and its packed result

An entry is written when its unit is finished. One that a kill has torn fails its checksum and is dropped with all
behind it. A resumed run takes finished units from the log, after it has made sure that their bytes are still the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from salience.errors import DataError, InputError
from salience.io.corpus import Corpus, Unit
from salience.io.engine import map_units
from salience.io.pack import pack, unpack
from salience.io.reader import plain_types

_FACTS = "run.json"
_HEAD, _NAME = 24, 24  # bytes of an entry's size and checksum, and of the unit's number and digest
_CHUNK = 1 << 18  # stays in the processor's cache between reading and hashing
_AGAIN = "Go back to what it was, or start again with --overwrite"


class _Entry(NamedTuple):
    start: int
    size: int
    digest: str


class Ledger:
    """Finished units of one run.

    Parameters
    ----------
    folder : path
        Where it lies; made when absent.
    facts : mapping
        All that results depend on, as plain data.
    kinds : sequence of type
        Classes of which results may hold instances (see `salience.io.pack`).
    resume : bool
        Go on with what is there; otherwise a ledger that is there is an error.
    overwrite : bool
        Throw away what is there.

    Raises
    ------
    InputError
        There is one already and neither was asked for; another run is using it; or it is of a run with other
        parameters or inputs (all differences are told).
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], *, kinds: Sequence[type] = (), resume: bool = False,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        if folder.exists() and not (resume or overwrite):
            raise InputError(
                f"an interrupted run is kept in {folder}; pass --resume to finish it, or --overwrite to start again"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._set(folder, facts, kinds)
        self._hold()
        if not resume:
            for path in folder.iterdir():
                path.unlink()
        written = folder / _FACTS
        if written.exists():
            self._compare()
        else:
            partial = folder / f"{_FACTS}.partial"
            partial.write_text(json.dumps(self._facts), encoding="utf-8")
            os.replace(partial, written)

    @classmethod
    def of_finished(cls, folder: Path, facts: Mapping[str, Any], kinds: Sequence[type]) -> Ledger:
        """Open a finished ledger to read from; several runs may do so at once.

        Raises
        ------
        InputError
            There is none, or it is of other parameters or inputs.
        """
        if not (folder / _FACTS).is_file():
            raise InputError(f"{folder} holds no finished scoring pass; --scores-only writes one")
        ledger = cls.__new__(cls)
        ledger._set(folder, facts, kinds)
        ledger._compare()
        return ledger

    def _set(self, folder: Path, facts: Mapping[str, Any], kinds: Sequence[type]) -> None:
        self.folder, self._kinds, self._facts = folder, kinds, json.loads(json.dumps(facts))
        self._lock, self._held = threading.Lock(), -1
        self._files: dict[str, Any] = {}
        self._entries: dict[str, dict[int, _Entry]] = {}
        self._digests: dict[tuple[int, int], str] = {}

    def _hold(self) -> None:
        """Keep a second run out; the lock ends with the process, however it ends."""
        self._held = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(f"another run is at work in {self.folder}") from None

    def _compare(self) -> None:
        changes = list(differences(json.loads((self.folder / _FACTS).read_text(encoding="utf-8")), self._facts))
        if changes:
            self.close()
            raise InputError(f"the run in {self.folder} cannot be gone on with: {some(changes)}. {_AGAIN}")

    def map(
        self, stage: str, fn: Callable[[Unit], Any], units: Sequence[Unit], *, workers: int | None = None,
        engine: str = "threads", slim: Callable[[Any], Any] | None = None,
    ) -> Iterator[tuple[Unit, Any]]:  # fmt: skip
        """As `map_units`, but a unit that was finished before comes from the log.

        Parameters
        ----------
        stage : str
            Name of the log.
        fn, units, workers, engine
            As in `map_units`.
        slim : callable, optional
            What of a result is kept in the log; by default all of it. A unit from the log yields that.
        """
        entries = self._open(stage)
        finished = [unit for unit in units if unit.number in entries]
        self._check(finished, entries, workers)

        def keep(unit: Unit, result: tuple[str, Any]) -> None:
            digest, value = result
            self._append(stage, unit.number, digest, pack(value if slim is None else slim(value), self._kinds))

        missing = [unit for unit in units if unit.number not in entries]
        computed = map_units(_WithDigest(fn), missing, workers=workers, engine=engine, done=keep)
        new = {unit.number for unit in missing}
        for unit in units:
            if unit.number in new:
                _, (_, value) = next(computed)
                yield unit, value
            else:
                yield unit, self._load(stage, entries[unit.number])

    def digest(self, stage: str) -> str:
        """xxh3-128 of the digests of all units of a finished stage, in order."""
        return _joined([entry.digest for _, entry in sorted(self._entries[stage].items())])

    def files(self) -> list[Path]:
        """What the ledger consists of on the disk."""
        return sorted(self.folder.iterdir())

    def close(self) -> None:
        """Close the files and let other runs in; the ledger stays."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def remove(self) -> None:
        """Close the ledger and remove it from the disk."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, stage: str) -> dict[int, _Entry]:
        if stage not in self._entries:
            path = self.folder / f"{stage}.log"
            self._files[stage] = open(path, "a+b" if self._held >= 0 else "rb", buffering=0)  # noqa: SIM115
            self._entries[stage] = self._read(stage)
        return self._entries[stage]

    def _read(self, stage: str) -> dict[int, _Entry]:
        """Find the entries of a log; cut off what a kill has left unfinished."""
        file, entries, end = self._files[stage], {}, 0
        while True:
            payload = self._payload(file, end)
            if payload is None:
                break
            entries[int.from_bytes(payload[:8], "little")] = _Entry(end, len(payload), payload[8:_NAME].hex())
            end += _HEAD + len(payload)
        if self._held >= 0:
            file.truncate(end)
        return entries

    @staticmethod
    def _payload(file: Any, start: int) -> bytes | None:
        head = os.pread(file.fileno(), _HEAD, start)
        size = int.from_bytes(head[:8], "little")
        if len(head) < _HEAD or size > os.fstat(file.fileno()).st_size:
            return None
        payload = os.pread(file.fileno(), size, start + _HEAD)
        return payload if xxhash.xxh3_128_digest(payload) == head[8:] else None

    def _load(self, stage: str, entry: _Entry) -> Any:
        payload = self._payload(self._files[stage], entry.start)
        if payload is None:
            raise DataError(f"{self.folder / stage}.log is damaged; start again with --overwrite")
        return unpack(payload[_NAME:], self._kinds)

    def _append(self, stage: str, number: int, digest: str, result: bytes) -> None:
        payload = number.to_bytes(8, "little") + bytes.fromhex(digest) + result
        head = len(payload).to_bytes(8, "little") + xxhash.xxh3_128_digest(payload)
        with self._lock:
            file = self._files[stage]
            start = file.seek(0, os.SEEK_END)
            _write(file, head + payload)
            self._entries[stage][number] = _Entry(start, len(payload), digest)

    def _check(self, finished: Sequence[Unit], entries: Mapping[int, _Entry], workers: int | None) -> None:
        """Make sure that the bytes of finished units are what they were."""
        fresh = [unit for unit in finished if (id(unit.source), unit.number) not in self._digests]
        for unit, digest in map_units(unit_digest, fresh, workers=workers):
            self._digests[id(unit.source), unit.number] = digest
        for unit in finished:
            if self._digests[id(unit.source), unit.number] != entries[unit.number].digest:
                raise InputError(
                    f"the run in {self.folder} cannot be gone on with: {unit.source.path or unit.source.name} has "
                    f"changed ({_place(unit)}). {_AGAIN}"
                )


class _WithDigest:
    """`fn`, and the digest of the bytes that it read."""

    def __init__(self, fn: Callable[[Unit], Any]) -> None:
        self.fn = fn

    def __call__(self, unit: Unit) -> tuple[str, Any]:
        return unit_digest(unit), self.fn(unit)


def _write(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Say, one by one, in what two pieces of plain data differ.

    >>> list(differences({"count": 5, "files": ["a"]}, {"count": 6, "files": ["a"]}))
    ['count was 5 and is 6']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif before != now:
        yield f"{name} was {_shown(before)} and is {_shown(now)}"


def some(changes: Sequence[str]) -> str:
    """The first of many changes."""
    return "; ".join(changes[:5]) + (f"; and {len(changes) - 5} more changes" if len(changes) > 5 else "")


def _shown(value: Any) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


def corpus_digest(corpus: Corpus, workers: int | None = None) -> str:
    """What `Ledger.digest` gives for a stage over all units of a corpus."""
    return _joined([digest for _, digest in map_units(unit_digest, corpus.units, workers=workers)])


def _joined(digests: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("".join(digests).encode())


def _place(unit: Unit) -> str:
    if unit.source.table is not None:
        return f"rows {unit.start:,} to {unit.stop:,}"
    if unit.source.format == "parquet":
        return f"row group {unit.start}"
    return f"between bytes {unit.start:,} and {unit.stop:,}" if unit.stop > unit.start else "its bytes"


def unit_digest(unit: Unit) -> str:
    """xxh3-128 of the bytes of a unit, as 32 hexadecimal digits.

    Of a compressed file all bytes count; of a remote one the version that its store names, as reading it once more
    would cost as much as the run.
    """
    source = unit.source
    if source.table is not None:
        # Taken, not sliced: a slice is written with what happens to stand around it.
        rows = plain_types(source.table).take(pa.array(range(unit.start, unit.stop), pa.int64()))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_table(rows)
        return xxhash.xxh3_128_hexdigest(sink.getvalue())
    if source.is_remote:
        return xxhash.xxh3_128_hexdigest(f"{source.size} {source.version} {unit.start} {unit.stop}".encode())
    start, stop = _bytes_of(unit)
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with open(source.path, "rb", buffering=0) as file:
        file.seek(start)
        while start < stop and (count := file.readinto(buffer[: min(_CHUNK, stop - start)])):
            digest.update(buffer[:count])
            start += count
    return digest.hexdigest()


def _bytes_of(unit: Unit) -> tuple[int, int]:
    source = unit.source
    if source.compression is not None:
        return 0, os.path.getsize(source.path)
    if source.format != "parquet":
        return unit.start, unit.stop
    group = pq.read_metadata(source.path).row_group(unit.start)
    columns = [group.column(at) for at in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    stops = [start + column.total_compressed_size for start, column in zip(starts, columns)]
    return min(starts), max(stops)
