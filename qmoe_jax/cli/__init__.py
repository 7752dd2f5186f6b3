"""Commands: `qmoe-jax COMMAND`, one file each; `flags` is the only module that imports gin."""
