"""Quantization: grids, round-to-nearest and GPTQ over batches of experts."""
