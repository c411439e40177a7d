"""GPTQ and RSQ against matrix products of the same size, plain GPTQ, and llm-compressor, in one run on one core.

1. Solve: one square matrix of 2,048 takes at most 10 float32 products of that size. The search for the clip, which is
   no part of the solve, and a Hessian of 4 n tokens are told beside it.
2. RSQ: importance by attention received and all costs at most 1.5 times plain GPTQ, both rotated, on a model of three
   layers of 256 units and sequences of 512 tokens.
3. Peer, with ``--peer PYTHON`` of an environment from ``quantize.txt``: at uniform importance, without rotation, with
   the same W, H and scales fewer than 0.1 % of the codes differ, and time is at most 1.0 of it.
4. Memory: the peak of `quantize_directory` grows by at most 10 % from 4 to 16 layers, each in a process of its own.

Rounds alternate, and figures are ratios of one round: machines are noisy.

Usage: python benchmarks/quantize.py [--rounds 5] [--peer PYTHON] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from salience.weights import Grid, RSQQuantizer, gptq_solve, quantize_directory, weighted_hessian

N, BITS = 2048, 4
GATES = {
    "solve, products of n": 10, "RSQ of plain GPTQ": 1.5, "codes that differ from the peer's": 1e-3,
    "seconds of the peer's": 1.0, "peak memory, 16 of 4 layers": 1.1,
}  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs that are correlated."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.eye(N) + torch.randn(N, N, generator=draw) / N**0.5
    return torch.randn(N, N, generator=draw), torch.randn(4 * N, N, generator=draw) @ mix


def decoder(layers: int, hidden: int = 256) -> transformers.LlamaForCausalLM:
    """A random Llama."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def solves(rounds: int) -> dict[str, float]:
    W, X = problem()
    H, grid = weighted_hessian(X), Grid(BITS, clip=False)
    scales = grid.fit(W)
    found: dict[str, list[float]] = {"solve": [], "search for the clip": [], "Hessian of 4 n tokens": []}
    for _ in range(rounds):
        product = min(timed(lambda: W @ W) for _ in range(2))
        found["solve"].append(timed(lambda: gptq_solve(W, H, grid, scales=scales)) / product)
        found["search for the clip"].append(timed(lambda: Grid(BITS).fit(W)) / product)
        found["Hessian of 4 n tokens"].append(timed(lambda: weighted_hessian(X)) / product)
    return {f"{name}, products of n": float(np.median(values)) for name, values in found.items()}


def whole(rounds: int) -> float:
    model = decoder(3)
    ids = torch.randint(0, 512, (16, 512), generator=torch.Generator().manual_seed(1))
    ratios = []
    for _ in range(rounds):
        plain = timed(lambda: RSQQuantizer(importance="uniform").quantize(model, ids))
        ratios.append(timed(lambda: RSQQuantizer().quantize(model, ids)) / plain)
    return float(np.median(ratios))


def peer(python: str, rounds: int) -> dict[str, float]:
    W, X = problem()
    H, grid = weighted_hessian(X), Grid(BITS, clip=False)
    scales = grid.fit(W)
    script = Path(__file__).with_name("peer_quantize.py")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        given, back = Path(folder, "problem.safetensors"), Path(folder, "result.safetensors")
        save_file({"W": W, "H": H, "scale": scales.scale.contiguous()}, given)
        for _ in range(rounds):
            ours = [timed(lambda: gptq_solve(W, H, grid, scales=scales)) for _ in range(3)]
            subprocess.run([python, str(script), str(given), str(back), str(BITS)], check=True, capture_output=True)
            result = load_file(back)
            ratios.append(float(np.median(ours)) / float(result["seconds"].median()))
    codes = (result["weight"] / scales.scale).round() + 2 ** (BITS - 1)
    differ = float((codes != gptq_solve(W, H, grid, scales=scales).codes).double().mean())
    assert differ < GATES["codes that differ from the peer's"], f"{differ:.2%} of the codes differ"
    return {"codes that differ from the peer's": differ, "seconds of the peer's": float(np.median(ratios))}


def peak(layers: int) -> float:
    """Peak resident size in MB of a process that quantises a directory with so many layers."""
    command = [sys.executable, __file__, "--memory-of", str(layers)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def quantised(layers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that the model in memory does not count.
        source = Path(folder, "model")
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import quantize; "
        code += f"quantize.decoder({layers}, 512).save_pretrained({str(source)!r})"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        ids = torch.randint(0, 512, (8, 128), generator=torch.Generator().manual_seed(1))
        quantize_directory(source, Path(folder, "out"), ids, RSQQuantizer(bits=BITS, clip=False))
    print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)  # of this process alone


def main() -> None:
    """Time, weigh; print the figures beside their gates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if options.memory_of:
        quantised(options.memory_of)
        return
    few, many = peak(4), peak(16)
    figures = {
        **solves(options.rounds),
        "RSQ of plain GPTQ": whole(options.rounds),
        **(peer(options.peer, options.rounds) if options.peer else {}),
        "peak memory, 4 layers, MB": few,
        "peak memory, 16 layers, MB": many,
        "peak memory, 16 of 4 layers": many / few,
        "gates": GATES,
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
