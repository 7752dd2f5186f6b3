"""How T5X gets the parameters: a class for `RestoreCheckpointConfig`, in either of its places."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.typing import DTypeLike

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.layouts import step_of_name
from qmoe_jax.errors import CheckpointError
from qmoe_jax.models.load import load_switch

_MOST_LISTED = 3


class SwitchCheckpointer:
    """Restores T5X's train state from a compressed (or a native) checkpoint; cannot save.

    T5X calls `RestoreCheckpointConfig.checkpoint_manager_cls` with Orbax and `checkpointer_cls`
    without; this class takes the arguments of both, and does not need t5x itself. The restored
    state is T5X's own, with this model's parameters in it.
    """

    def __init__(
        self,
        train_state: Any,
        partitioner: Any = None,
        restore_dtype: DTypeLike | None = None,
        dataset_iterator: Any = None,
        *,
        require_step: bool = False,
        **unused: Any,
    ):
        """Take what T5X passes, and one argument more.

        Args:
          train_state: T5X's, with shapes in place of arrays.
          partitioner: not used: arrays are handed over whole, and T5X's jit places them.
          restore_dtype: what dense parameters are converted to; codes and levels stay as they are.
          dataset_iterator: must be None.
          require_step: refuse a checkpoint whose folder's name does not end in a number, which
            t5x.eval would do after the evaluation, by an error.
          **unused: of saving.

        Raises:
          ValueError: a dataset is to be restored: a compressed checkpoint has none.
        """
        del partitioner, unused
        if dataset_iterator is not None:
            raise ValueError(
                "RestoreCheckpointConfig.restore_dataset is set, but there is no data set in a "
                "checkpoint for inference: leave it False"
            )
        self._train_state = train_state
        self._restore_dtype = restore_dtype
        self._require_step = require_step

    def restore(
        self,
        path: str | os.PathLike[str],
        state_transformation_fns: Sequence[Any] = (),
        fallback_state: Mapping[str, Any] | None = None,
        lazy_parameters: bool = False,
    ) -> Any:
        """Restore the train state: the parameters at `path`, the step of its name (0 without one).

        Args:
          path: folder of the checkpoint, local or gs://.
          state_transformation_fns: must be empty.
          fallback_state: must be None.
          lazy_parameters: must be False.

        Raises:
          CheckpointError: nothing readable at `path`, or not the parameters of the model.
          ValueError: something is asked for that is not possible with codes.
        """
        asked = {
            "assignment_map or state_transformation_fns": bool(state_transformation_fns),
            "fallback_to_scratch": fallback_state is not None,
            "lazy_parameters": lazy_parameters,
        }
        if impossible := [name for name, value in asked.items() if value]:
            raise ValueError(
                f"RestoreCheckpointConfig asks for {', '.join(impossible)}: not possible with "
                "SwitchCheckpointer, which restores a checkpoint as it is. Leave it out."
            )
        step = step_of_name(os.fspath(path))
        if step is None and self._require_step:
            raise CheckpointError(
                f"{path} does not end in checkpoint_<step>, as t5x.eval wants of what it "
                "evaluates; rename the folder, for example to checkpoint_0"
            )
        module, variables = load_switch(path)
        params = variables["params"]
        self._check(path, params)
        if self._restore_dtype is not None:
            params = _cast_dense(params, {name for name, _ in module.coded}, self._restore_dtype)
        return self._train_state.restore_state(
            {"target": params, "state": {"step": jnp.asarray(step or 0, jnp.int32)}}
        )

    def _check(self, path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
        found = {name: a.shape for name, a in names.flatten(params).items()}
        wanted = {
            name: tuple(a.shape)
            for name, a in names.flatten(unfreeze(self._train_state.params)).items()
        }
        if found == wanted:
            return
        wrong = sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        raise CheckpointError(
            f"{path} does not hold the parameters of MODEL: {', '.join(wrong[:_MOST_LISTED])}"
            f"{' and others' if len(wrong) > _MOST_LISTED else ''} differ in name or shape. Give "
            "SwitchModel.checkpoint and RestoreCheckpointConfig.path the same checkpoint."
        )


def _cast_dense(params: Mapping[str, Any], coded: set[str], dtype: DTypeLike) -> dict[str, Any]:
    """Parameters in another dtype, but for the arrays of coded kernels."""
    flat: dict[str, jax.Array] = names.flatten(params)
    return names.unflatten(
        {
            name: array if name.rpartition("/")[0] in coded else array.astype(dtype)
            for name, array in flat.items()
        }
    )
