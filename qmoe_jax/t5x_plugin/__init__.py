"""Compressed checkpoints in T5X's own programs: `t5x.eval`, `t5x.infer`. See docs/t5x.md."""
