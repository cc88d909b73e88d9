"""Where a run's tensors lie on a mesh that need not be here: for looking at, before there are devices."""

from jax.sharding import AbstractMesh

from vlora_jax.adapters.trees import Tree
from vlora_jax.training.config import RunConfig
from vlora_jax.training.job import model_config_of
from vlora_jax.training.outline import placed_tensors, specs_of


def places(config: RunConfig, mesh: AbstractMesh) -> dict[str, tuple[Tree, Tree]]:
    """Shapes and specs of a run's tensors, by what they are for.

    Raises:
      VloraError: of some kind: there is no such model, or the adapter does not fit it.
    """
    tensors = placed_tensors(config, mesh, model_config_of(config))
    state = tensors.state
    parts = {"base": tensors.base, "trainable": state.trainable, "frozen": state.frozen, "optimizer": state.opt_state}
    return {name: (tree, specs_of(tree)) for name, tree in parts.items()}
