"""Remote stores: the same tree gives the same documents; outputs are complete or without a manifest; clear refusals."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import as_csv, collect, compressed, jsonl

from salience.errors import DataError, InputError, MissingExtra, NothingToDo
from salience.io import Corpus, Output, corpus, lines, map_units, read, reader, remote, verify_output
from salience.io.final import RemoteFinal
from stores import put, put_tree, serving, tree

TEXTS = [f"document {number} " + "wü rt," * (number % 7) for number in range(40)]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A tree with every format, and with files that are none of the corpus."""
    root = tmp_path / "corpus"
    for folder in ("a", "a-b", "a/deep er", ".hidden"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    data = jsonl(root / "a" / "one.jsonl", TEXTS, id=1).read_bytes()
    (root / "a" / "deep er" / "ü #1.jsonl.gz").write_bytes(gzip.compress(data))
    compressed(root / "a-b" / "two.jsonl.zst", data, "zstd")
    (root / "a-b" / "three.csv").write_text(as_csv(TEXTS))
    (root / "four.csv.gz").write_bytes(gzip.compress(as_csv(TEXTS).encode()))
    (root / "five.txt").write_text("\n".join(TEXTS))
    pq.write_table(pa.table({"text": TEXTS, "n": range(40)}), root / "six.parquet", row_group_size=7)
    for name in ("six.parquet.manifest.json", "six.parquet.quarantine.jsonl", ".hidden/x.jsonl", "a/.x.jsonl"):
        jsonl(root / name, ["none of it"])
    (root / "README").write_text("none of it")
    (root / "empty.jsonl").touch()
    return root


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_bytes", [100, 16 << 20])
@pytest.mark.parametrize("whole", [False, True])
def test_a_remote_tree_reads_like_a_local_one(
    local: Path, store: str, unit_bytes: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64 if unit_bytes == 100 else 4 << 20)
    monkeypatch.setattr(reader, "BATCH_ROWS", 3)
    here, there = Corpus(local), Corpus(put_tree(local, f"{store}/corpus"))
    assert [source.name for source in there.sources] == [source.name for source in here.sources]
    assert [source.file_id for source in there.sources] == [source.file_id for source in here.sources]
    assert [(u.source.name, u.start, u.stop, u.first_row, u.bytes) for u in there.units] == [
        (u.source.name, u.start, u.stop, u.first_row, u.bytes) for u in here.units
    ]
    assert collect(there, whole) == collect(here, whole)
    assert there.bytes == here.bytes and len(collect(here).documents) == 7 * len(TEXTS)


PATTERNS = ["*.txt", "*/*.jsonl", "**/*.jsonl*", "a*/**/*.gz", "a/*", "[fs]*"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_match_what_a_shell_would(local: Path, store: str, pattern: str) -> None:
    if pattern == "a/*":
        (local / "a" / "README").unlink(missing_ok=True)
    put_tree(local, f"{store}/corpus")
    if pattern == "[fs]*":  # also matches the manifest, which a glob does not pass over
        (local / "six.parquet.manifest.json").unlink()
        (local / "six.parquet.quarantine.jsonl").unlink()
        for name in ("six.parquet.manifest.json", "six.parquet.quarantine.jsonl"):
            remote.remove(f"{store}/corpus/{name}")
    here, there = Corpus(f"{local}/{pattern}"), Corpus(f"{store}/corpus/{pattern}")
    assert [source.name for source in there.sources] == [source.name for source in here.sources]
    assert collect(there) == collect(here)


def test_files_folders_and_globs_may_be_mixed(local: Path, store: str) -> None:
    put_tree(local, f"{store}/corpus")
    chosen = ["a", "four.csv.gz", "a/one.jsonl", "a-b/*.csv"]
    here, there = Corpus([local / name for name in chosen]), Corpus([f"{store}/corpus/{name}" for name in chosen])
    assert collect(there) == collect(here) and len(there.sources) == 4
    assert collect(Corpus(f"{store}/corpus/")) == collect(Corpus(local))


def test_names_tell_stores_apart(local: Path, store: str) -> None:
    for bucket in ("memory://names-one", "memory://names-two"):
        put(f"{bucket}/a/x.jsonl", b'{"text": "t"}\n')
    pool = Corpus(["memory://names-one/a", "memory://names-two"])
    assert [source.name for source in pool.sources] == ["names-one/a/x.jsonl", "names-two/a/x.jsonl"]
    pool = Corpus([local / "five.txt", "memory://names-one/a", pa.table({"text": ["t"]})])
    assert [source.name for source in pool.sources] == ["five.txt", "memory:///names-one/a/x.jsonl", "table 0"]
    put(f"{store}/x.jsonl", b'{"text": "t"}\n')
    if store.startswith("s3"):
        assert [source.name for source in Corpus([store, "memory://names-one"]).sources] == [
            "memory:///names-one/a/x.jsonl",
            f"{store}/x.jsonl",
        ]


def test_threads_have_a_position_each(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 500)
    monkeypatch.setattr(remote, "_BUFFER", 64)
    data = b"".join(b'{"text": "%d"}\n' % number for number in range(2000))
    put(f"{store}/a.jsonl", data)
    pool = Corpus(f"{store}/a.jsonl")
    found = map_units(lambda unit: [t for b in read(pool, unit) for t in b.text.to_pylist()], pool.units, workers=4)
    assert [text for _, texts in found for text in texts] == [str(number) for number in range(2000)]


def test_every_reader_of_a_file_moves_alone(store: str) -> None:
    put(f"{store}/a", b"0123456789")
    with remote.open_url(f"{store}/a") as one, remote.open_url(f"{store}/a") as two:
        assert one.read(3) == b"012" and two.read(5) == b"01234" and one.read(3) == b"345"
        assert one.seek(-2, os.SEEK_END) == 8 and one.read() == b"89" and one.read(1) == b""
        assert two.seek(1, os.SEEK_CUR) == 6 and two.tell() == 6 and two.read() == b"6789"


def test_a_version_changes_with_the_content(store: str) -> None:
    url = put(f"{store}/a.jsonl", b'{"text": "one"}\n')
    before = Corpus(url)
    assert before.sources[0].version and before.sources[0].version == Corpus(url).sources[0].version
    put(url, b'{"text": "two"}\n')
    assert Corpus(url).sources[0].version != before.sources[0].version
    with pytest.raises(DataError, match=r"a\.jsonl has changed since it was listed"):
        collect(before)
    remote.remove(url)
    with pytest.raises(DataError, match=r"a\.jsonl does not exist"):
        collect(before)
    remote.remove(url)  # what is gone need not be removed


def test_local_files_have_no_version(local: Path) -> None:
    assert {source.version for source in Corpus(local).sources} == {""}
    assert not any(source.is_remote for source in Corpus([local, pa.table({"text": ["t"]})]).sources)


def test_a_store_that_gives_too_little_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("memory://short/a.jsonl", b'{"text": "one"}\n' * 10)
    store = fsspec.filesystem("memory", use_listings_cache=False)
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, start, end: b"x")
    with pytest.raises(DataError, match=r"a\.jsonl gave 1 bytes at 0 where 160 were asked for"):
        collect(Corpus(url))


def test_damaged_files_are_named(store: str) -> None:
    put(f"{store}/a.parquet", b"PAR1 no more")
    with pytest.raises(DataError, match=r"//.*a\.parquet is not a readable Parquet file"):
        Corpus(f"{store}/a.parquet")
    put(f"{store}/a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000)[:40])
    with pytest.raises(DataError, match=r"//.*a\.jsonl\.gz cannot be read"):
        collect(Corpus(f"{store}/a.jsonl.gz"))


@pytest.mark.parametrize("unit_bytes", [100, 16 << 20])
def test_a_dataset_of_a_hub_reads_like_a_local_tree(
    local: Path, hub: dict[str, bytes], unit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
    for path in local.rglob("*"):
        if path.is_file():
            hub[f"data/{path.relative_to(local).as_posix()}"] = path.read_bytes()
    there = Corpus("hf://datasets/someone/texts/data")
    assert all(source.version.startswith("blob_id ") for source in there.sources)
    assert [s.name for s in there.sources] == [s.name for s in Corpus(local).sources]
    assert collect(there, whole=True) == collect(Corpus(local), whole=True)
    assert collect(Corpus("hf://datasets/someone/texts/data/*/*.jsonl")) == collect(Corpus(f"{local}/*/*.jsonl"))
    pool = Corpus("hf://datasets/someone/texts/data/a/one.jsonl")
    found = map_units(lambda unit: [t for b in read(pool, unit) for t in b.text.to_pylist()], pool.units, workers=4)
    assert [text for _, texts in found for text in texts] == TEXTS
    with pytest.raises(InputError, match="data/absent does not exist"):
        Corpus("hf://datasets/someone/texts/data/absent")
    with pytest.raises(InputError, match="nothing/of does not exist"):
        Corpus("hf://datasets/nothing/of")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent.jsonl", InputError, r"input .*absent\.jsonl does not exist"),
        ("no*.jsonl", InputError, r"input .*no\*\.jsonl matches no file"),
        ("readme.md", InputError, "unknown ending"),
        ("docs", NothingToDo, r"directory .*docs holds no file that ends in"),
        ("empty.jsonl", NothingToDo, r"empty\.jsonl is empty"),
    ],
)
def test_inputs_that_cannot_be_read(store: str, name: str, error: type[Exception], message: str) -> None:
    for file, data in (("readme.md", b"x"), ("docs/a.md", b"x"), ("empty.jsonl", b"")):
        put(f"{store}/{file}", data)
    with pytest.raises(error, match=message):
        Corpus(f"{store}/{name}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nostore://a/b.jsonl", "nostore://a/b.jsonl cannot be opened: Protocol not known: nostore"),
        ("file:///a/b.jsonl", "is a local file; name its path, without file://"),
        ("memory://a/b.zip::memory://c", "is a chain of URLs"),
    ],
)
def test_urls_that_cannot_be_used(url: str, message: str) -> None:
    for use in (Corpus, Output, verify_output):
        with pytest.raises(InputError, match=message):
            use(url)


@pytest.mark.parametrize(
    ("url", "module", "install"),
    [("s3://a/b.jsonl", "s3fs", r"'salience\[remote\]'"), ("gs://a/b.jsonl", "gcsfs", "gcsfs")],
)
def test_a_missing_package_is_named(url: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(MissingExtra, match=rf"{url} needs a package that is not installed: pip install {install}$"):
        Corpus(url)


def test_a_bucket_that_does_not_exist(s3: str) -> None:
    for use in (Corpus, Output):
        for url in ("s3://no-such-bucket/a.jsonl", "s3://no-such-bucket/*.jsonl"):
            with pytest.raises(InputError, match="there is no bucket s3://no-such-bucket"):
                use(url)
    with pytest.raises(InputError, match="there is no bucket s3://no-such-bucket"):
        Corpus("s3://no-such-bucket")
    with pytest.raises(InputError, match="does not exist"):
        verify_output("s3://no-such-bucket")
    with pytest.raises(InputError, match="names no file within a store"):
        Output(s3)


@pytest.fixture
def forbidding(other_s3: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that denies everything."""

    class Forbid(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *arguments) -> None:
            pass

    with serving(Forbid) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield


@pytest.mark.parametrize("use", [Corpus, Output, verify_output])
def test_denied_access_is_said_in_a_sentence(forbidding: None, use) -> None:
    with pytest.raises(
        DataError, match=r"^access to s3://bucket/a\.jsonl was denied \(.*\); check the store's cred.*$"
    ):
        use("s3://bucket/a.jsonl")


@pytest.mark.parametrize("use", [Corpus, Output, verify_output])
def test_a_store_out_of_reach_is_said_in_a_sentence(other_s3: None, use, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(DataError, match=r"^s3://bucket/a\.jsonl cannot be reached \(.*\)$"):
            use("s3://bucket/a.jsonl")


def test_missing_credentials_are_said_in_a_sentence(s3: str, other_s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(DataError, match=r"^there are no credentials for s3://.*|^access to s3://.* was denied"):
        Corpus(f"{s3}/a.jsonl")


# --- writing ------------------------------------------------------------------------------------------------


def make(url: str | Path, overwrite: bool = False, folder: bool = False, **files: str) -> dict:
    with Output(url, overwrite, folder=folder) as output:
        for name, text in files.items():
            output.file({"main": "", "bad": ".quarantine.jsonl"}[name] if not folder else f"{name}/x.txt").write_text(
                text
            )
        return output.commit({"seed": 3})


def partials() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if name.endswith((".partial", ".unsent"))]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def test_a_file_is_uploaded_on_commit_its_manifest_last(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, upload = [], remote.upload
    monkeypatch.setattr(remote, "upload", lambda path, url: (sent.append(url.rpartition("/")[2]), upload(path, url)))
    with Output(f"{store}/deep/out.jsonl") as output:
        output.file().write_text("hello\n")
        output.file(".quarantine.jsonl").write_text("{}\n")
        assert tree(store) == {} and sent == []
        manifest = output.commit({"seed": 3})
    assert sent == ["out.jsonl.quarantine.jsonl", "out.jsonl", "out.jsonl.manifest.json"]
    found = tree(store)
    assert sorted(found) == [f"deep/{name}" for name in sorted(sent)] and found["deep/out.jsonl"] == b"hello\n"
    assert json.loads(found["deep/out.jsonl.manifest.json"]) == manifest and partials() == []
    assert verify_output(f"{store}/deep/out.jsonl").ok


def test_a_path_object_has_swallowed_a_slash(store: str) -> None:
    make(Path(f"{store}/out.txt"), main="x")
    assert sorted(tree(store)) == ["out.txt", "out.txt.manifest.json"]
    (source,) = Corpus(Path(f"{store}/out.txt")).sources
    assert source.path.endswith("/out.txt") and verify_output(Path(f"{store}/out.txt")).ok


@pytest.mark.parametrize("folder", [False, True])
def test_existing_outputs_are_refused_or_replaced(store: str, folder: bool) -> None:
    names = {"main": "old", "bad": "old"} if not folder else {"a": "old", "b": "old"}
    make(f"{store}/out", folder=folder, **names)
    with pytest.raises(InputError, match="out exists; pass --overwrite"):
        Output(f"{store}/out", folder=folder)
    names.popitem()
    manifest = make(f"{store}/out", True, folder, **dict.fromkeys(names, "new"))
    assert sorted(tree(store)) == (["out/a/x.txt", "out/manifest.json"] if folder else ["out", "out.manifest.json"])
    assert len(manifest["files"]) == 1 and verify_output(f"{store}/out").ok
    with pytest.raises(InputError, match="is a directory; name a file" if folder else "is a file; name a folder"):
        Output(f"{store}/out", True, folder=not folder)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_new(store: str, error: type[BaseException]) -> None:
    make(f"{store}/out.txt", main="old", bad="old")
    before = tree(store)
    with pytest.raises(error), Output(f"{store}/out.txt", overwrite=True) as output:
        output.file().write_text("new")
        raise error
    assert tree(store) == before and partials() == []


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_broken_upload_leaves_no_manifest_and_keeps_the_result(
    tmp_path: Path, step: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = f"memory://broken-{step}-{error.__name__}"
    make(f"{store}/out.txt", main="old", bad="old")
    calls, upload = [], remote.upload

    def failing(path: Path, url: str) -> None:
        calls.append(url)
        if len(calls) == step:
            raise error("the store is full")
        upload(path, url)

    monkeypatch.setattr(remote, "upload", failing)
    with pytest.raises(error, match="the store is full") as caught:
        make(f"{store}/out.txt", overwrite=True, main="new", bad="new")
    found = tree(store)
    assert "out.txt.manifest.json" not in found and found.get("out.txt", b"old") == b"old"
    if error is KeyboardInterrupt:
        assert partials() == []
        return
    kept = Path(str(caught.value).rpartition(" kept in ")[2])
    assert sorted(os.listdir(kept)) == ["out.txt", "out.txt.manifest.json", "out.txt.quarantine.jsonl"]
    assert verify_output(kept / "out.txt").ok and kept.is_relative_to(tmp_path)


def test_a_short_upload_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory", use_listings_cache=False)
    monkeypatch.setattr(type(store), "put_file", lambda self, here, there: self.pipe_file(there, b"x"))
    with pytest.raises(DataError, match=r"out\.txt holds 1 bytes where 5 were written; the finished output is kept in"):
        make("memory://short-upload/out.txt", main="hello")


def test_remote_folders_that_we_did_not_write_are_never_replaced(store: str) -> None:
    put(f"{store}/foreign/thesis.txt", b"mine")
    with pytest.raises(InputError, match=r"foreign holds no manifest\.json of an earlier output"):
        Output(f"{store}/foreign", True, folder=True)
    put(f"{store}/foreign/manifest.json", b"{}")
    with pytest.raises(InputError, match=r"its manifest\.json is no manifest of salience"):
        Output(f"{store}/foreign", True, folder=True)
    make(f"{store}/ours", folder=True, a="old")
    put(f"{store}/ours/notes.txt", b"mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, which the earlier output did not write"):
        Output(f"{store}/ours", True, folder=True)
    assert tree(f"{store}/foreign").keys() == {"thesis.txt", "manifest.json"} and "notes.txt" in tree(f"{store}/ours")


def test_outputs_do_not_touch_inputs(store: str) -> None:
    put(f"{store}/in/a.jsonl", b'{"text": "t"}\n')
    pool = Corpus(f"{store}/in")
    with pytest.raises(InputError, match="is one of the inputs"):
        Output(f"{store}/in/a.jsonl", True, [pool])
    with pytest.raises(InputError, match="holds the input"):
        Output(f"{store}/in", True, [pool], folder=True)
    with pytest.raises(InputError, match="lies inside the input"):
        Output(f"{store}/in/new", True, [f"{store}/in"], folder=True)
    Output(f"{store}/in/new.jsonl", True, [pool]).discard()


# --- checking -----------------------------------------------------------------------------------------------


def test_damage_in_a_store_is_found(store: str) -> None:
    rows = pa.table({"text": TEXTS, "n": np.arange(40)})
    with Output(f"{store}/out", folder=True) as output:
        pq.write_table(rows, output.file("a.parquet"), write_page_checksum=True)
        output.file("b.txt").write_text("x" * 1000)
        output.commit({})
    assert verify_output(f"{store}/out/").ok
    for name in ("a.parquet", "b.txt", "manifest.json"):
        whole = tree(f"{store}/out")[name]
        damaged = bytearray(whole)
        damaged[len(whole) // 3] ^= 4
        put(f"{store}/out/{name}", bytes(damaged))
        assert [file for file, _ in verify_output(f"{store}/out").damaged] == [name]
        put(f"{store}/out/{name}", whole)
    put(f"{store}/out/c.txt", b"x")
    remote.remove(f"{store}/out/b.txt")
    result = verify_output(f"{store}/out")
    assert (result.damaged, result.missing, result.unexpected) == ([], ["b.txt"], ["c.txt"])
    with pytest.raises(InputError, match="absent does not exist"):
        verify_output(f"{store}/absent")
    with pytest.raises(InputError, match=r"has no manifest \(.*//.*c\.txt\.manifest\.json\)"):
        verify_output(f"{store}/out/c.txt")


def test_the_root_of_a_store_is_no_output() -> None:
    with pytest.raises(InputError, match="names no folder within a store"):
        RemoteFinal("s3://bucket", is_folder=True)
