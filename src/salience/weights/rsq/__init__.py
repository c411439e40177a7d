"""RSQ: rotate, weigh tokens by their importance, then quantise.

Yi-Lin Sung, Prateek Yadav, Jialu Li, Jaehong Yoon, Mohit Bansal: RSQ: Learning from Important Tokens Leads to Better
Quantized LLMs, arXiv 2503.01820, 2025. The order of the files is that of the method: `rotating`, `importance`,
`grids`, `solving`, `layers` (one decoder layer after the other), `quantizer`, `packing`, `directories`.
"""
