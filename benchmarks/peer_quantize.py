"""llm-compressor's GPTQ for one matrix, in an environment of its own: reads W, H, scales; writes weights and seconds.

Usage: python peer_quantize.py PROBLEM.safetensors RESULT.safetensors BITS
"""

from __future__ import annotations

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file, save_file

problem, result, bits = sys.argv[1:]
torch.set_num_threads(1)
given = load_file(problem)
how = QuantizationArgs(num_bits=int(bits), symmetric=True, strategy="channel")
seconds = []
for _ in range(3):
    W, H, scale = (given[name][None].clone() for name in ("W", "H", "scale"))
    began = time.perf_counter()
    weight, _, _ = quantize_weight(W, H, scale, torch.zeros_like(scale), None, how)
    seconds.append(time.perf_counter() - began)
save_file({"weight": weight[0].contiguous(), "seconds": torch.tensor(seconds)}, result)
