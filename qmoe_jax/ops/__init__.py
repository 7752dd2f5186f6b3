"""Ops: matrix products with compressed weights, one function with `xla` and `cuda` behind it."""
