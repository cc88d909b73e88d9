"""Matrix completion: what is seen, what is held out, and that a method can learn it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_loop import quiet

from vlora_jax.data import low_rank
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job
from vlora_jax.training.loss import matrix_completion

SMALL = {"rows": 20, "columns": 14, "rank": 2, "observed": 0.4}
RUN = [
    "model.family=matrix", "model.rows=20", "model.columns=14", "data.name=low_rank", "data.rows=20",
    "data.columns=14", "data.rank=2", "data.observed=0.6", "log.tensorboard=false",
    "evaluate.every=300", "evaluate.metric=loss", "evaluate.batch=1", "checkpoint.every=300",
]  # fmt: skip


def stacked(source, name):
    return np.stack([source[index][name] for index in range(len(source))])


def test_every_entry_is_seen_or_held_out_and_the_rank_is_what_was_asked():
    data = low_rank.load(**SMALL, seed=3)
    (seen,), (rest,) = stacked(data.train, "mask"), stacked(data.held_out, "mask")
    assert (seen ^ rest).all()
    assert seen.mean() == pytest.approx(0.4, abs=0.1)
    (matrix,) = stacked(data.train, "targets")
    assert np.linalg.matrix_rank(matrix, tol=1e-4) == 2
    assert (matrix**2).mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(stacked(data.train, "tokens")[0], np.arange(20))
    prints = {low_rank.load(**SMALL, seed=seed).fingerprint for seed in (3, 3, 4)}
    assert len(prints) == 2


def test_the_loss_is_the_squared_error_of_what_counts():
    batch = {
        "tokens": jnp.zeros((2, 1), int), "targets": jnp.array([[[1.0, -2.0, 7.0]], [[3.0, 4.0, 1.0]]]),
        "mask": jnp.array([[[True, True, False]], [[False, True, True]]]), "weight": jnp.array([1.0, 0.0]),
    }  # fmt: skip
    sums = matrix_completion(lambda rows, train: jnp.array([[[0.5, 1.0, 0.0]], [[0.0, 0.0, 0.0]]]), batch, True)
    assert {name: float(value) for name, value in sums.items()} == {"loss": 0.25 + 9, "correct": 1, "weight": 2}


@pytest.mark.slow
def test_a_lora_finds_what_it_has_not_seen(tmp_path):
    """Twice as many entries as a matrix of rank 2 has freedom are enough; zeros have a loss of about 1."""
    adapter = ["adapter.method=lora", "adapter.rank=2", "adapter.alpha=2", "adapter.start=kaiming_both"]
    steps = ["steps=300", "optimizer.rate=0.05", "optimizer.warmup=0", "optimizer.decay=0.0"]
    result, _ = quiet(load_config(None, [*RUN, *adapter, *steps, f"run_dir={tmp_path / 'run'}"]))
    assert result.progress.last["loss"] < 0.1
    assert result.progress.last["accuracy"] > 0.85


def test_impossible_matrices():
    with pytest.raises(DataError, match=r"data\.rank 15 is above the smaller side of a 20 × 14 matrix"):
        low_rank.load(**SMALL | {"rank": 15}, seed=0)
    with pytest.raises(DataError, match=r"data\.observed 1e-09 of 280 entries leaves none"):
        low_rank.load(**SMALL | {"observed": 1e-9}, seed=0)
    with pytest.raises(ConfigError, match=r"the model does not fit .*: model\.rows 100, but the data has 20"):
        Job.of(load_config(None, [each for each in RUN if each != "model.rows=20"]), jax.devices()[:1])
