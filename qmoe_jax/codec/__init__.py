"""Codec: quantization codes of experts to stored arrays and back. The format is in FORMAT.md.

In reading order: `tensor` (what is stored), `dictionary`, `encode` (over `greedy`), `decode` (over
`expand`), `codings` (what a coding must provide, and which there are), `coding_qmoe`,
`coding_packed2`, `stats`, and `reference`, the slow twin of it all.
"""
