"""Merging of model directories against mergekit and a file copy, and weight matching against its matrix products.

Rounds alternate (ours, peer, copy) over the same pair of float32 safetensors directories. Equal work is checked first:
linear merges agree to 1e-6; for DARE the share of entries kept. Then peak memory at 1x and 4x the layers, each in a
process of its own, and a ResNet-20 pair matched against the bare products and assignments of the same sweeps.

Usage: python benchmarks/merge.py [--layers 16] [--rounds 5] [--peer-python PYTHON] [--json FILE]
Without --peer-python the peer is left out. Environment of the peer: benchmarks/merge.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from salience.weights import CifarResNet, check_pair, infer_spec, match_weights, merge_directories, prune_directory

HIDDEN, INNER, WORDS = 512, 2048, 2000


def make_model(folder: Path, layers: int, seed: int) -> None:
    """A Llama directory; about 17 MB a layer in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def ours(models: list[Path], out: Path, base: Path, method: str) -> float:
    """Seconds of one merge: of two models, or for DARE and DAREx of a base and one model."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    if method in ("linear", "task"):
        merge_directories(models, out, base=base if method == "task" else None, method=method)
    else:
        names = check_pair(base, models[0], look=False).names
        prune_directory(base, models[0], out, names, rate=0.9, q=0.3 if method == "darex" else None, seed=0)
    return time.perf_counter() - began


def copy(source: Path, out: Path) -> float:
    """Seconds of a copy of the output through user space, as any merge must write it."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    out.mkdir()
    with open(source / "model.safetensors", "rb") as read, open(out / "model.safetensors", "wb") as write:
        shutil.copyfileobj(read, write, 1 << 20)
    return time.perf_counter() - began


def peer(python: str, folder: Path, models: list[Path], base: Path, out: Path, method: str) -> float:
    """Seconds of mergekit for the same, without its start."""
    shutil.rmtree(out, ignore_errors=True)
    used = models if method == "linear" else models[:1]
    entries = [{"model": str(model), "parameters": {"weight": 1 / len(used), "density": 0.1}} for model in used]
    config = {
        "merge_method": {"linear": "linear", "dare": "dare_linear"}[method],
        "models": entries,
        "dtype": "float32",
    }
    if method == "dare":
        config["base_model"] = str(base)
        config["parameters"] = {"rescale": True, "normalize": False}
    (folder / "config.yaml").write_text(json.dumps(config))
    script = (
        "import sys, time, yaml, torch; torch.set_num_threads(1)\n"
        "from mergekit.config import MergeConfiguration\n"
        "from mergekit.merge import run_merge\n"
        "from mergekit.options import MergeOptions\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))\n"
        "began = time.perf_counter()\n"
        "run_merge(config, sys.argv[2], MergeOptions(copy_tokenizer=False, quiet=True, random_seed=0))\n"
        "print(time.perf_counter() - began)\n"
    )
    command = [python, "-c", script, str(folder / "config.yaml"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def peak_memory(models: list[Path], base: Path, out: Path, method: str) -> float:
    """Peak memory in MB that a merge adds to that of the imports, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    script = (
        "import sys\n"
        "from salience.weights import check_pair, merge_directories, prune_directory\n"
        "import salience.weights.darex.directories, torch, numpy\n"
        # Not ru_maxrss: a child process begins with that of its parent.
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024\n"
        "before = peak()\n"
        "method, base, out, *models = sys.argv[1:]\n"
        "if method == 'linear': merge_directories(models, out)\n"
        "else: prune_directory(base, models[0], out, check_pair(base, models[0], look=False).names, rate=0.9)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", script, method, str(base), str(out), *map(str, models)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def matching() -> dict[str, float]:
    """Seconds of matching a ResNet-20 pair, and of the bare products and assignments of as many sweeps."""
    states = []
    for seed in (0, 1):
        model = CifarResNet(20, width=16, generator=torch.Generator().manual_seed(seed))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    spec = infer_spec(CifarResNet(20, width=16), torch.zeros(2, 3, 32, 32))
    began = time.perf_counter()
    found = match_weights(spec, *states, generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - began
    sides = [
        [
            (
                states[0][name].movedim(axis, 0).flatten(1).numpy(),
                states[1][name].movedim(axis, 0).flatten(1).numpy(),
            )
            if states[0][name].ndim > 1
            else (states[0][name][:, None].numpy(), states[1][name][:, None].numpy())
            for name, axis in axes
        ]
        for axes in spec.perm_to_axes.values()
    ]
    began = time.perf_counter()
    for _ in range(found.sweeps):
        for pairs in sides:
            linear_sum_assignment(sum(a @ b.T for a, b in pairs), maximize=True)
    return {"seconds": seconds, "floor": time.perf_counter() - began, "sweeps": found.sweeps}


def check_parity(folder: Path, models: list[Path], base: Path) -> dict[str, float]:
    """The linear merges must agree; of DARE every entry must be dropped or rescaled by ``1 / (1 - p)``."""
    one, two = (load_file(folder / name / "model.safetensors") for name in ("ours-linear", "peer-linear"))
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    if one.keys() != two.keys() or worst > 1e-6:
        raise SystemExit(f"linear merges differ by {worst}")
    name = "model.layers.0.mlp.up_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    delta = load_file(models[0] / "model.safetensors")[name] - before
    shares = {}
    for who in ("ours", "peer"):
        merged = load_file(folder / f"{who}-dare" / "model.safetensors")[name] - before
        kept = merged.abs() > 1e-7
        # The peer rescales by the norms before and after, which is 1 / (1 - p) to within the noise of the mask.
        if float((merged[kept] / delta[kept] - 10).abs().max()) > 0.2:
            raise SystemExit(f"{who}: an entry is neither dropped nor rescaled by 1 / (1 - p)")
        shares[f"{who}: share of entries kept by DARE"] = float(kept.double().mean())
    return {"largest difference of the linear merges": worst, **shares}


def rounds(number: int, work: dict[str, Callable[[], float]]) -> list[dict[str, float]]:
    """Seconds of each part, round by round; a first round warms the caches and is not counted.

    A round whose copy took more than 1.5 times the quickest one was disturbed, and is repeated, up to 4 times as many.
    """
    results: list[dict[str, float]] = []
    for index in range(4 * number + 1):
        seconds = {name: run() for name, run in work.items()}
        if index:
            results.append(seconds)
            print(", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), file=sys.stderr)
        best = min((each["copy"] for each in results), default=0)
        quiet = [each for each in results if each["copy"] <= 1.5 * best]
        if len(quiet) >= number:
            break
    return quiet


def main() -> None:
    """Run the rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="about 17 MB each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, models = folder / "base", [folder / "one", folder / "two"]
        for seed, path in enumerate((base, *models)):
            make_model(path, options.layers, seed)
        size = (base / "model.safetensors").stat().st_size / 1e6
        work: dict[str, Callable[[], float]] = {
            "linear": lambda: ours(models, folder / "ours-linear", base, "linear"),
            "task": lambda: ours(models, folder / "ours-task", base, "task"),
            "dare": lambda: ours(models, folder / "ours-dare", base, "dare"),
            "darex": lambda: ours(models, folder / "ours-darex", base, "darex"),
            "copy": lambda: copy(models[0], folder / "copied"),
        }
        if options.peer_python:
            for method in ("linear", "dare"):
                work[f"peer {method}"] = lambda method=method: peer(
                    options.peer_python, folder, models, base, folder / f"peer-{method}", method
                )
        table = rounds(options.rounds, work)
        figures: dict[str, float] = {"megabytes": size, "quiet rounds": len(table)}
        if options.peer_python:
            figures |= check_parity(folder, models, base)
        for method in ("linear", "task", "dare", "darex"):
            ratios = [seconds[method] / seconds["copy"] for seconds in table]
            best = {name: min(seconds[name] for seconds in table) for name in (method, "copy")}
            figures[f"{method}: times a copy, quickest of each"] = best[method] / best["copy"]
            figures[f"{method}: times a copy, median"] = float(np.median(ratios))
            figures[f"{method}: times a copy, worst"] = max(ratios)
            if f"peer {method}" in work:
                faster = [seconds[f"peer {method}"] / seconds[method] for seconds in table]
                figures[f"{method}: times as fast as the peer, median"] = float(np.median(faster))
                figures[f"{method}: times as fast as the peer, worst"] = min(faster)
        for factor in (1, 4):
            for seed, path in enumerate((base, *models)):
                shutil.rmtree(path)
                make_model(path, options.layers // 4 * factor, seed)
            for method in ("linear", "dare"):
                figures[f"{method}: peak memory at {factor}x layers, MB"] = peak_memory(
                    models, base, folder / "memory", method
                )
        figures["largest tensor, MB"] = 4 * max(HIDDEN * INNER, HIDDEN * WORDS) / 1e6
        found = [matching() for _ in range(options.rounds + 1)][1:]
        figures["matching of a ResNet-20 pair, seconds"] = float(np.median([each["seconds"] for each in found]))
        ratios = [each["seconds"] / each["floor"] for each in found]
        figures["matching: times products and assignments, median"] = float(np.median(ratios))
        figures["matching: times products and assignments, worst"] = max(ratios)
        figures["matching: sweeps"] = found[0]["sweeps"]
        print(json.dumps(figures, indent=1))
        if options.json:
            Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
