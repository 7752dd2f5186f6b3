"""Models: the Switch Transformer in flax.linen, with dense or compressed experts."""
