"""`module.apply` as one compiled program: run op by op, every operation of a model is compiled."""

import functools

import jax


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("enable_dropout", "decode", "max_decode_length", "method", "mutable"),
)
def apply(module, variables, *args, **keywords):
    """`module.apply(variables, *args, **keywords)`; `mutable` is a name or a tuple of them."""
    return module.apply(variables, *args, **keywords)
