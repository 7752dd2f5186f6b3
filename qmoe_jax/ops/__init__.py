"""Ops: the experts' products with tokens, with `xla` and `cuda` behind one function each."""
