"""Pictures from every kind of cell, of the model's size and scaled as its files say."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlora_jax.data import text
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.images import Scaling
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.models.vit import ViTConfig

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 12, 12, 3), np.uint8)
LABELS = [n % 2 for n in range(8)]
MODEL = ViTConfig(image=12, patch=4, channels=3, classes=2)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def loaded(path, source=None, model=MODEL, **options):
    config = DatasetConfig(path=path, format="images", **{"held_out": path, **options})
    return text.load(config, source, model)


def parquet(write, cells, labels=LABELS):
    return write("rows.parquet", [{"image": cell, "label": label} for cell, label in zip(cells, labels, strict=True)])


@pytest.mark.parametrize("kind", ["bytes", "struct", "lists", "path"])
def test_every_kind_of_cell_is_the_same_picture(write, tmp_path, kind):
    cells = {
        "bytes": [png(each) for each in PIXELS],
        "struct": [{"bytes": png(each), "path": None} for each in PIXELS],
        "lists": [each.tolist() for each in PIXELS],
        "path": [str(tmp_path / f"{n}.png") for n in range(8)],
    }[kind]
    for n, each in enumerate(PIXELS):
        (tmp_path / f"{n}.png").write_bytes(png(each))
    data = loaded(parquet(write, cells))
    assert (data.task, data.facts) == (
        "classification",
        {"classes": 2, "image": 12, "channels": 3, "labels": ("0", "1")},
    )
    for index in range(8):
        row = data.train[index]
        np.testing.assert_allclose(row["image"], PIXELS[index] / 127.5 - 1, atol=1e-6)
        assert (row["image"].dtype, row["label"], row["id"]) == (np.float32, LABELS[index], index)


def test_hub_images_are_read(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in PIXELS], "label": LABELS}, features=features
    )
    made.save_to_disk(tmp_path / "saved")
    data = loaded(str(tmp_path / "saved"), held_out=0.4)
    assert data.facts["labels"] == ("cat", "dog")
    assert len(data.train) + len(data.held_out) == 8
    np.testing.assert_allclose(data.train[0]["image"], PIXELS[data.train.table.rows[0]] / 127.5 - 1, atol=1e-6)


def test_size_and_channels_are_the_models(write):
    path = parquet(write, [png(each) for each in PIXELS])
    grey = loaded(path, model=ViTConfig(image=6, patch=3, channels=1, classes=2)).train[0]["image"]
    assert grey.shape == (6, 6, 1)
    expected = np.asarray(Image.fromarray(PIXELS[0]).convert("L").resize((6, 6), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(grey[..., 0], expected / 127.5 - 1, atol=1e-6)


def test_scaling_is_that_of_the_models_file(write, tmp_path):
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": deviation}))
    row = loaded(parquet(write, [png(each) for each in PIXELS]), str(tmp_path)).train[3]
    np.testing.assert_allclose(row["image"], (PIXELS[3] / 255 - mean) / deviation, rtol=1e-4, atol=1e-5)
    assert Scaling.of(str(tmp_path / "nowhere")) == Scaling()
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match=r"preprocessor_config.json is damaged"):
        Scaling.of(str(tmp_path))


@pytest.mark.parametrize("cell", [b"no picture", b"", png(PIXELS[0])[:10]])
def test_what_is_no_picture_is_refused_before_the_run(write, cell):
    cells = [png(each) for each in PIXELS]
    cells[2] = cell
    with pytest.raises(DataError, match=r"rows.parquet, row 3: no image"):
        loaded(parquet(write, cells))


def test_a_picture_that_ends_too_early_is_named(write):
    cells = [png(each) for each in PIXELS]
    cells[2] = cells[2][:200]
    data = loaded(parquet(write, cells))
    with pytest.raises(DataError, match=r"row 3: the image cannot be decoded"):
        data.train[2]


def test_pictures_need_a_vision_model(write):
    with pytest.raises(ConfigError, match=r"is for model.family vit"):
        loaded(parquet(write, [png(each) for each in PIXELS]), model=None)


def test_the_fingerprint_is_of_the_pictures_and_their_size(write):
    cells = [png(each) for each in PIXELS]
    first = loaded(parquet(write, cells)).fingerprint
    assert loaded(parquet(write, cells)).fingerprint == first
    assert loaded(parquet(write, cells), model=ViTConfig(image=8, patch=4, channels=3, classes=2)).fingerprint != first
    assert loaded(parquet(write, cells[::-1])).fingerprint != first
