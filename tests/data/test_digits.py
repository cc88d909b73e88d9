"""The digits: scikit-learn's images, all of them, in one fixed and fair split."""

import itertools

import numpy as np
import pytest
from sklearn.datasets import load_digits

from vlora_jax.data import digits
from vlora_jax.errors import DataError


@pytest.fixture(scope="module")
def data():
    return digits.load()


def every(source, name: str) -> np.ndarray:
    return np.stack([source[index][name] for index in range(len(source))])


def test_both_parts_together_are_scikit_learns_images(data):
    """1,437 and 360, none of them twice: the rows of image and label are those of the source, in another order."""
    assert (len(data.train), len(data.held_out)) == (1437, 360)
    images = np.concatenate([every(data.train, "image"), every(data.held_out, "image")])
    labels = np.concatenate([every(data.train, "label"), every(data.held_out, "label")])
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max(), images.dtype) == (-1.0, 1.0, np.float32)
    found = np.column_stack([(images.reshape(1797, 64) + 1) * 8, labels])
    source = load_digits()
    expected = np.column_stack([source.data, source.target])
    in_order = lambda rows: rows[np.lexsort(rows.T)]
    np.testing.assert_array_equal(in_order(found), in_order(expected))


def test_classes_have_the_same_share_in_both_parts(data):
    held_out, of_all = np.bincount(every(data.held_out, "label")), np.bincount(load_digits().target)
    assert np.abs(held_out - of_all * 360 / 1797).max() < 1


def test_the_split_is_the_same_for_every_run(data):
    assert data.fingerprint == digits.load(augment=False).fingerprint == "5ae62251ff851faa"


def test_a_model_learns_what_it_must_fit(data):
    assert data.task == "classification"
    assert data.facts == {"classes": 10, "image": 8, "channels": 1}
    np.testing.assert_array_equal(every(data.train, "id"), np.arange(1437))


def test_augmentation_is_a_shift_by_at_most_a_pixel(data):
    """All nine shifts occur, and nothing else: pixels move together, background comes in, label and id stay."""
    example = data.train[3]
    image = example["image"].copy()
    shifts = {}
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        moved = np.full_like(image, -1.0)
        for row, column in itertools.product(range(8), repeat=2):
            if 0 <= row + down < 8 and 0 <= column + right < 8:
                moved[row, column] = image[row + down, column + right]
        shifts[moved.tobytes()] = (down, right)
    seen = set()
    for seed in range(60):
        changed = data.augment(example, np.random.default_rng(seed))
        assert (changed["label"], changed["id"]) == (example["label"], example["id"])
        seen.add(shifts[changed["image"].tobytes()])
    assert len(seen) == len(shifts) == 9
    np.testing.assert_array_equal(example["image"], image)


def test_augmentation_can_be_left_out():
    assert digits.load(augment=False).augment is None


def test_turned_images_are_the_same_images(data):
    """A quarter turn to the left: the first row becomes the first column, from below; four turns are none."""
    turned = digits.load(turns=1)
    np.testing.assert_array_equal(turned.train[5]["image"][::-1, 0], data.train[5]["image"][0])
    np.testing.assert_array_equal(every(turned.held_out, "label"), every(data.held_out, "label"))
    assert digits.load(turns=3).fingerprint != turned.fingerprint != data.fingerprint


def test_few_shots_are_so_many_of_each_class(data):
    few, again, other = (digits.load(shots=7, shots_seed=seed) for seed in (0, 0, 1))
    assert np.bincount(every(few.train, "label")).tolist() == [7] * 10
    assert few.fingerprint == again.fingerprint != other.fingerprint
    rows = {image.tobytes() for image in every(data.train, "image")}
    assert all(image.tobytes() in rows for image in every(few.train, "image"))
    np.testing.assert_array_equal(every(few.held_out, "image"), every(data.held_out, "image"))
    with pytest.raises(DataError, match=r"data\.shots 900: class '0' has"):
        digits.load(shots=900)
