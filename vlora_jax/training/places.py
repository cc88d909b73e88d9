"""Where a run's tensors lie on a mesh that need not be here: for looking at, before there are devices."""

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from vlora_jax.adapters.init import init
from vlora_jax.adapters.trees import Tree
from vlora_jax.distributed.specs import adapter_specs, base_specs, like_parameters
from vlora_jax.models.build import abstract_model
from vlora_jax.training.config import RunConfig
from vlora_jax.training.job import model_config_of
from vlora_jax.training.optimizers import optimizer


def places(config: RunConfig, mesh: AbstractMesh) -> dict[str, tuple[Tree, Tree]]:
    """Shapes and specs of a run's tensors, by what they are for.

    Raises:
      VloraError: of some kind: there is no such model, or the adapter does not fit it.
    """
    _, params = abstract_model(model_config_of(config))
    specs, adapter = base_specs(params, mesh), None
    if config.adapter is None:
        (trainable, rest), (trainable_specs, rest_specs) = (
            nnx.split_state(tree, nnx.Param, ...) for tree in (params, specs)
        )
        parts = {"trainable": (trainable, trainable_specs), "base": (rest, rest_specs)}
    else:
        method = config.adapter.for_run(config.steps)
        adapter = jax.eval_shape(lambda key, base: init(method, key, base), jax.random.key(0), params)
        lie = adapter_specs(adapter, mesh)
        trainable, trainable_specs = adapter.trainable, lie.trainable
        parts = {
            "base": (params, specs),
            "trainable": (trainable, trainable_specs),
            "frozen": (adapter.frozen, lie.frozen),
        }
    tx = optimizer(config.optimizer, config.steps, trainable, adapter)
    state = jax.eval_shape(tx.init, trainable)
    return parts | {"optimizer": (state, like_parameters(tx, state, trainable_specs))}
