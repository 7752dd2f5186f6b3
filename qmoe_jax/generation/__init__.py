"""Autoregressive generation: the cached step, the loops over it, and text in and out."""
