"""Checkpoints: the lazy reader of native T5X checkpoints, and the compressed checkpoint."""
