"""Codec: quantization codes of experts to stored arrays and back. The format is in FORMAT.md.

In reading order: `tensor` (what is stored), `codings` (what a coding must provide, and which there
are), `cuda_interface` (what its kernels are given), `encode`, `decode`, `stats`, `outline` (sizes
of a tensor that is written in pieces). Then the codings: `coding_tunstall` (over the trees of
`tunstall`, `tunstall_rows` on the host and `tunstall_expand` with XLA), `coding_lattice` (over
`lattice_dictionaries`, `lattice_choices` and `lattice_blocks` on the host, and `lattice_expand`
with XLA), `coding_qmoe` (over `dictionary`, `greedy` and `expand`), `coding_packed2`; and
`reference` and `reference_lattice`, which all of it is tested against.
"""
