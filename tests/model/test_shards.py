from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from salience.errors import DataError, InputError
from salience.model import TensorStore, load, logits_of, rewrite, run
from tiny import FAMILIES, directory_hash, example, save


def identity(name, tensor):
    return tensor


def shrunk(name, tensor):
    return tensor * 0.5


def stored(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("sharded")
    save("qwen2", path, tokenizer, shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_keeps_everything(family, shard_size, dtype, tmp_path, tokenizer):
    words = None if family in ("vit", "resnet") else tokenizer
    cls = type(save(family, tmp_path / "in", words, shard_size, dtype))
    before = directory_hash(tmp_path / "in")
    assert rewrite(tmp_path / "in", tmp_path / "out", identity) == (tmp_path / "out").resolve()
    assert directory_hash(tmp_path / "in") == before
    names = {f.name for f in (tmp_path / "in").iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names

    # 0 missing, 0 unexpected keys and the dtype; logits equal to 0 ulp
    model = cls.from_pretrained(tmp_path / "in")
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert {k: (v.dtype, v.shape) for k, v in stored(tmp_path / "in").items()} == {
        k: (v.dtype, v.shape) for k, v in stored(tmp_path / "out").items()
    }
    for (name, one), two in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, two), name  # buffers too
    inputs = example(family)
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"].to(dtype)}
    with torch.no_grad():
        assert torch.equal(logits_of(run(loaded, inputs)), logits_of(run(model, inputs)))

    # tied weights stay tied, generation config and tokenizer are kept
    if words is not None:
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight)
    if (tmp_path / "in" / "generation_config.json").exists():
        configs = [GenerationConfig.from_pretrained(tmp_path / d).to_dict() for d in ("in", "out")]
        assert configs[0] == configs[1]
    if words is not None:
        words = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert words("what matters here")["input_ids"] == tokenizer("what matters here")["input_ids"]


def test_tied_weights_are_seen_once(source, tmp_path):
    seen = []
    rewrite(source, tmp_path / "out", lambda name, tensor: (seen.append(name), tensor + 1)[1])
    assert len(seen) == len(set(seen)) and "lm_head.weight" not in seen
    model = load(tmp_path / "out").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load(source).model.lm_head.weight + 1)


def test_every_tensor_is_what_the_function_made_of_it(source, tmp_path):
    rewrite(source, tmp_path / "out", lambda n, t: t * 2 if n.endswith("q_proj.weight") else t)
    new = stored(tmp_path / "out")
    for name, tensor in stored(source).items():
        assert torch.equal(new[name], tensor * 2 if name.endswith("q_proj.weight") else tensor)


def test_metadata_and_index_are_kept(source, tmp_path):
    file = min(source.glob("*.safetensors"))
    shutil.copytree(source, tmp_path / "in")
    save_file(load_file(file), tmp_path / "in" / file.name, {"format": "pt", "note": "kept"})
    rewrite(tmp_path / "in", tmp_path / "out", identity)
    with safe_open(tmp_path / "out" / file.name, "pt") as handle:
        assert handle.metadata() == {"format": "pt", "note": "kept"}
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (source / index).read_bytes()


def test_operations_in_place_do_not_reach_the_input(source, tmp_path):
    before = directory_hash(source)
    rewrite(source, tmp_path / "out", lambda name, tensor: tensor.zero_())
    assert directory_hash(source) == before
    assert not any(tensor.any() for tensor in stored(tmp_path / "out").values())


def test_results_are_cast_to_the_stored_dtype_and_views_are_stored_whole(tmp_path):
    save("llama", tmp_path / "in", dtype=torch.bfloat16)
    one = torch.randn(48, 32)

    def views(name, tensor):
        return one[: len(tensor)] if tensor.shape[1:] == (32,) and len(tensor) < 49 else tensor.double()

    rewrite(tmp_path / "in", tmp_path / "out", views)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert torch.equal(stored(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"], one.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_what_is_not_finite_is_refused_with_its_name(value, source, tmp_path):
    def broken(name, tensor):
        if name != "model.layers.1.mlp.up_proj.weight":
            return tensor
        tensor = tensor.double().clone()
        tensor[3, 4] = value  # 1e39 fits float64, and is infinite in the stored float32
        return tensor

    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        rewrite(source, tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("result", [None, torch.ones(2), 3.0])
def test_what_is_no_tensor_of_the_shape_is_refused(result, source, tmp_path):
    with pytest.raises(InputError, match="tensor_fn"):
        rewrite(source, tmp_path / "out", lambda name, tensor: result)


class Stop(Exception):
    pass


def interrupted(source, out, after, **options):
    """A run that fails after `after` tensors."""
    count = 0

    def fails(name, tensor):
        nonlocal count
        count += 1
        if count > after:
            raise Stop
        return shrunk(name, tensor)

    with pytest.raises(Stop):
        rewrite(source, out, fails, **options)


@pytest.mark.parametrize("after", [0, 1, 12, 25])
def test_resume_gives_the_same_bytes_and_repeats_no_finished_shard(after, source, tmp_path):
    rewrite(source, tmp_path / "whole", shrunk)
    interrupted(source, tmp_path / "out", after)
    assert not (tmp_path / "out").exists()
    shards = json.loads((tmp_path / ".out.partial" / ".rewrite.json").read_text())["finished"]
    done = {name for shard in shards for name in load_file(source / shard)}
    seen = set()
    rewrite(source, tmp_path / "out", lambda n, t: (seen.add(n), shrunk(n, t))[1], resume=True)
    assert seen == set(stored(source)) - done
    assert directory_hash(tmp_path / "out") == directory_hash(tmp_path / "whole")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "whole"]


def test_resume_refuses_other_settings_inputs_and_damage(source, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    interrupted(tmp_path / "in", tmp_path / "out", 20, fingerprint="3 bits")
    again = dict(fingerprint="3 bits", resume=True)
    with pytest.raises(InputError, match="interrupted run is at"):
        rewrite(tmp_path / "in", tmp_path / "out", shrunk, fingerprint="3 bits")
    with pytest.raises(InputError, match=r"'3 bits'.*'4 bits'"):
        rewrite(tmp_path / "in", tmp_path / "out", shrunk, fingerprint="4 bits", resume=True)
    partial = tmp_path / ".out.partial"
    shard = min(json.loads((partial / ".rewrite.json").read_text())["finished"])
    for folder, error in [(tmp_path / "in", InputError), (partial, DataError)]:
        whole = (folder / shard).read_bytes()
        (folder / shard).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(error, match=shard):
            rewrite(tmp_path / "in", tmp_path / "out", shrunk, **again)
        (folder / shard).write_bytes(whole)
    rewrite(tmp_path / "in", tmp_path / "out", shrunk, **again)
    interrupted(tmp_path / "in", tmp_path / "two", 20, fingerprint="3 bits")
    rewrite(tmp_path / "in", tmp_path / "two", shrunk, fingerprint="4 bits", overwrite=True)
    assert directory_hash(tmp_path / "two") == directory_hash(tmp_path / "out")


def test_a_killed_run_leaves_nothing_under_the_name_and_resumes(source, tmp_path):
    code = (
        "import sys, time; from salience.model import rewrite\n"
        "def slow(name, tensor):\n"
        "    print(name, flush=True); time.sleep(0.02); return tensor * 0.5\n"
        f"rewrite({str(source)!r}, {str(tmp_path / 'out')!r}, slow)\n"
    )
    rewrite(source, tmp_path / "whole", shrunk)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
    for _ in range(18):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists()
    rewrite(source, tmp_path / "out", shrunk, resume=True)
    assert directory_hash(tmp_path / "out") == directory_hash(tmp_path / "whole")


def test_an_existing_output_is_safe_until_the_new_one_is_complete(source, tmp_path):
    rewrite(source, tmp_path / "out", identity)
    before = directory_hash(tmp_path / "out")
    with pytest.raises(InputError, match="overwrite=True"):
        rewrite(source, tmp_path / "out", shrunk)
    interrupted(source, tmp_path / "out", 10, overwrite=True)
    assert directory_hash(tmp_path / "out") == before
    rewrite(source, tmp_path / "out", shrunk, overwrite=True)
    assert directory_hash(tmp_path / "out") != before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_places_that_must_not_be_written_are_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "models" / "in")
    inside = tmp_path / "models" / "in"
    for out in (inside, inside / "out", tmp_path / "models"):
        with pytest.raises(InputError, match="contain each other"):
            rewrite(inside, out, identity, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="not a model directory"):
        rewrite(source, tmp_path / "home", identity, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "mine"


def test_other_weights_and_code_are_not_copied(source, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    for name in (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_x.py",
        "other.gguf",
        "README.md",
    ):
        (tmp_path / "in" / name).write_text("{}")
    (tmp_path / "in" / "templates").mkdir()
    (tmp_path / "in" / "templates" / "chat.jinja").write_text("kept")
    rewrite(tmp_path / "in", tmp_path / "out", identity)
    new = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert new == {f.name for f in source.iterdir()} | {"README.md", "templates/chat.jinja"}


def test_a_damaged_or_unsafe_input_is_refused_before_the_first_byte(source, tmp_path):
    def copy(name):
        return shutil.copytree(source, tmp_path / name)

    shard = max(source.glob("*.safetensors")).name
    missing = copy("missing")
    (missing / shard).unlink()
    swapped = copy("swapped")
    shutil.copyfile(min(source.glob("*.safetensors")), swapped / shard)
    short = copy("short")
    (short / shard).write_bytes((source / shard).read_bytes()[:-4])
    empty = copy("empty")
    for file in empty.glob("model*"):
        file.unlink()
    unsafe = copy("unsafe")
    (unsafe / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "x.X"}}')
    for folder in (missing, swapped, short, empty, unsafe):
        with pytest.raises(DataError, match=str(folder)):
            rewrite(folder, tmp_path / "out", identity)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_memory_is_that_of_one_shard(tmp_path):
    """24 shards of 8 MB go through a process that may not grow by half of their sum."""
    size = 2_000_000
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    index = {}
    for i in range(24):
        name = f"model-{i:05d}-of-00024.safetensors"
        save_file({f"w{i}": torch.full((size,), float(i))}, tmp_path / "in" / name)
        index[f"w{i}"] = name
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    code = (
        "import torch; from salience.model import rewrite\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "before = peak()\n"
        f"rewrite({str(tmp_path / 'in')!r}, {str(tmp_path / 'out')!r}, lambda n, t: t + 1)\n"
        "print(peak() - before)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert grown < 96  # MB; all shards together have 192, one with its copies 24
    assert load_file(tmp_path / "out" / "model-00007-of-00024.safetensors")["w7"][0] == 8


def test_a_store_reads_what_safetensors_reads(tmp_path):
    for family, options in (("qwen2", {}), ("llama", {"shard_size": "20KB"}), ("gpt2", {"dtype": torch.bfloat16})):
        save(family, tmp_path / family, **options)
        expected = {}
        for file in (tmp_path / family).glob("*.safetensors"):
            expected |= load_file(file)
        with TensorStore(tmp_path / family) as store:
            assert store.entries.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(store.read(name), tensor) and store.read(name).dtype == tensor.dtype
                assert torch.equal(store.read(name, 3, 11), tensor.flatten()[3:11])


def test_pieces_make_the_same_model(tmp_path):
    save("llama", tmp_path / "in", shard_size="20KB")
    seen: dict[str, list[int]] = {}

    def piecewise(name, piece, start):
        seen.setdefault(name, []).append(start)
        return piece.mul_(1 + 1e-3 * (start + torch.arange(len(piece))))

    def whole(name, tensor):
        return tensor * (1 + 1e-3 * torch.arange(tensor.numel()).view(tensor.shape))

    rewrite(tmp_path / "in", tmp_path / "pieces", piecewise, block=100)
    rewrite(tmp_path / "in", tmp_path / "whole", whole)
    assert directory_hash(tmp_path / "pieces") == directory_hash(tmp_path / "whole")
    assert seen["model.embed_tokens.weight"] == list(range(0, 320 * 32, 100))


def test_a_piece_that_is_not_finite_is_named(tmp_path):
    save("llama", tmp_path / "in")
    for bad in (torch.nan, torch.inf, -torch.inf):

        def spoil(name, piece, start, bad=bad):
            if name == "model.layers.1.mlp.up_proj.weight" and start == 200:
                piece[7] = bad
            return piece

        with pytest.raises(DataError, match=r"layers\.1\.mlp\.up_proj"):
            rewrite(tmp_path / "in", tmp_path / "out", spoil, block=100, overwrite=True)
    assert not (tmp_path / "out").exists()


def test_large_finite_values_are_let_pass(tmp_path):
    save("llama", tmp_path / "in")
    rewrite(tmp_path / "in", tmp_path / "out", lambda name, tensor: torch.full_like(tensor, 3e38))
    with TensorStore(tmp_path / "out") as store:
        assert (store.read("model.norm.weight") == 3e38).all()


def test_tensors_without_entries_and_without_axes_are_kept(tmp_path):
    save("llama", tmp_path / "in")
    tensors = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "count": torch.tensor(7)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    rewrite(tmp_path / "in", tmp_path / "out", lambda name, piece, start: piece, block=10)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[name], value) and back[name].shape == value.shape for name, value in tensors.items())
