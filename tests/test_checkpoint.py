"""A checkpoint is whole or not used, and comes back as it was."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlora_jax import checkpoint
from vlora_jax.errors import CheckpointError, ResourceError


def trees(step: int) -> dict:
    return {"trainable": {"w": jnp.arange(6.0).reshape(2, 3) * step, "h": jnp.ones(2, jnp.bfloat16)}, "frozen": {}}


@pytest.fixture
def saved(tmp_path):
    """Steps 10 … 50, the best at 20."""
    told: list[str] = []
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, notify=told.append)
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, trees(step), {"note": step}, best=step in (10, 20))
    checkpoints.wait()
    yield checkpoints, tmp_path, told
    checkpoints.close()


def test_what_was_saved_comes_back_with_its_metadata(saved):
    _, directory, _ = saved
    found = checkpoint.read(directory, 50)
    assert found.metadata["note"] == 50
    assert found.trees["frozen"] == {}
    restored = checkpoint.restore(trees(50)["trainable"], found.trees["trainable"], "test")
    np.testing.assert_array_equal(restored["w"], trees(50)["trainable"]["w"])
    assert restored["h"].dtype == jnp.bfloat16


def test_one_process_may_ask_for_metadata_by_itself(saved, monkeypatch):
    """As the one does that decides which step a run starts from: an agreement inside one would never be answered."""
    _, directory, _ = saved
    monkeypatch.setattr(checkpoint.processes, "decided", lambda name, decide: pytest.fail(f"agrees on {name!r}"))
    assert checkpoint.metadata(directory, 50)["note"] == 50
    with pytest.raises(CheckpointError, match="is not usable: it does not exist"):
        checkpoint.metadata(directory, 60)


def test_the_newest_and_the_best_stay(saved):
    checkpoints, directory, _ = saved
    assert checkpoints.steps() == [20, 40, 50]
    assert all(checkpoint.fault_of(directory / str(step)) is None for step in checkpoints.steps())


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_one_before_used(saved, damage):
    checkpoints, directory, told = saved
    data = next(path for path in (directory / "50").rglob("*") if path.parent.name == "d")
    content = data.read_bytes()
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:-1] + b"\x00")
    assert checkpoints.newest_whole() == 40
    assert len(told) == 1
    assert told[0].startswith("checkpoint 50 is damaged (")
    assert told[0].endswith("): moved to 50.damaged, using 40")
    assert data.name in told[0]
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read(directory, 50)
    checkpoints.save(50, trees(7), {"note": 7})  # the step can be saved again
    checkpoints.wait()
    assert checkpoint.metadata(directory, 50)["note"] == 7


def test_a_save_that_was_cut_off_is_removed_at_the_next_start(saved):
    checkpoints, directory, told = saved
    (directory / "50" / checkpoint.MANIFEST).unlink()
    checkpoints.close()
    again = checkpoint.Checkpoints(directory, notify=told.append)
    assert told == ["checkpoint 50 was not finished: moved to 50.unfinished"]
    assert again.newest_whole() == 40
    again.close()


def test_checkpoints_that_all_lost_their_manifest_are_not_thrown_away(saved):
    checkpoints, directory, _ = saved
    checkpoints.close()
    for manifest in directory.glob(f"*/{checkpoint.MANIFEST}"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints \[20, 40, 50\] have lost their manifest.json"):
        checkpoint.Checkpoints(directory)
    assert checkpoints.steps() == [20, 40, 50]


def test_nothing_whole_is_an_error_and_nothing_is_moved(saved):
    checkpoints, directory, _ = saved
    for data in directory.glob("*/trainable/ocdbt.process_0/d/*"):
        data.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints \[20, 40, 50\] is whole"):
        checkpoints.newest_whole()
    assert checkpoints.steps() == [20, 40, 50]


def test_no_whole_checkpoint_is_none(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.newest_whole() is None
    checkpoints.close()


def test_another_schema_is_refused(saved):
    _, directory, _ = saved
    path = directory / "50" / "_CHECKPOINT_METADATA"
    about = json.loads(path.read_text())
    about["custom_metadata"]["schema"] = 99
    path.write_text(json.dumps(about))
    checkpoint.write_manifest(directory / "50")
    with pytest.raises(CheckpointError, match="schema 99, this version reads 1"):
        checkpoint.read(directory, 50)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"w": jnp.ones((2, 3))}, "1 leaves missing"),
        ({"w": jnp.ones((2, 3)), "h": jnp.ones(3, jnp.bfloat16)}, r"h is bfloat16\[3\], expected bfloat16\[2\]"),
        ({"w": jnp.ones((2, 3)), "h": jnp.ones(2)}, r"h is float32\[2\], expected bfloat16\[2\]"),
        ({"w": jnp.full((2, 3), jnp.nan), "h": jnp.ones(2, jnp.bfloat16)}, "w has values that are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(flat, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore(trees(1)["trainable"], flat, "test")


def test_too_little_disk_is_said_before_writing(tmp_path):
    with pytest.raises(ResourceError, match=r"a checkpoint needs .* MiB, .* MiB are free"):
        checkpoint.check_space(tmp_path, 2**60)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written: Not a directory"):
        checkpoint.make_directory(tmp_path / "file" / "run")


def test_fingerprints_tell_values_names_and_places_apart():
    tree = {"a": jnp.arange(4.0), "b": jnp.zeros(2, jnp.bfloat16), "k": jax.random.key(0)}
    same = checkpoint.fingerprint(tree)
    assert checkpoint.fingerprint(jax.tree.map(jnp.copy, tree)) == same
    others = [
        tree | {"a": jnp.arange(4.0).at[3].set(3.0000002)},
        tree | {"a": jnp.arange(4.0)[::-1]},
        {"c" if name == "a" else name: leaf for name, leaf in tree.items()},
        tree | {"k": jax.random.key(1)},
    ]
    assert len({same, *map(checkpoint.fingerprint, others)}) == 5
