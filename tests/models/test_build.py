"""Models by their configs."""

import jax

from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.models.build import abstract_model
from vlora_jax.models.matrix import MatrixConfig


def test_shapes_do_not_remember_the_mesh_under_which_they_were_first_asked_for():
    config = MatrixConfig(rows=3, columns=5)
    with jax.set_mesh(make_mesh()):
        abstract_model(config)
    shapes = jax.tree.leaves(abstract_model(config)[1])
    assert [(leaf.shape, leaf.sharding) for leaf in shapes] == [((3, 5), None)]
