"""CUDA kernels inside `jax.jit`: the launcher, their arguments and launch sizes."""
