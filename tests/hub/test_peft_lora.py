"""Any adapter as one plain LoRA: exact where it can be, else the best of its rank, and what is left out."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import close, moved
from peft_tiny import model

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub.peft import as_lora, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, read_tensors


def total(adapters, base):
    """ΔW of every site, of all adapters together."""
    sums = {}
    for adapter in adapters:
        for site in adapter.sites:
            delta = jax.jit(functools.partial(site_delta, adapter, site))(flatten(base)[site.leaf_path])
            sums[site.path] = sums.get(site.path, 0) + np.asarray(delta, np.float64)
    return sums


SERVED = {
    "one lora": ([vj.LoRA(rank=2, alpha=5.0, targets=["q", "mlp"], rank_pattern={"q": [1, 3, 2]})], 3),
    "two at one site": ([vj.LoRA(rank=2, targets="attention"), vj.LoRA(rank=1, rank_stabilised=True, targets="q")], 3),
    "an embedding": ([vj.LoRA(rank=2, targets=["embed", "head"])], 2),
    "shared tensors": ([vj.VeRA(rank=3, targets=["q", "down"]), vj.LoRA(rank=1, targets="down")], 4),
}


@pytest.mark.parametrize(("methods", "rank"), SERVED.values(), ids=SERVED)
def test_thin_changes_are_exact(methods, rank):
    base = model()[1]
    adapters = [moved(vj.init(m, jax.random.key(0), base), seed) for seed, m in enumerate(methods)]
    lora, residuals = as_lora(base, adapters, max_rank=8)
    assert (lora.method.rank, lora.method.scale) == (rank, 1.0)
    assert not lora.method.rank_pattern
    assert not lora.frozen["sites"]
    ours, expected = total([lora], base), total(adapters, base)
    assert set(ours) == set(residuals) == set(expected)
    for path in expected:
        close(ours[path], expected[path])
        assert not residuals[path].any()


@pytest.mark.parametrize(
    "method",
    [vj.LoRA(rank=4, targets=["q", "head"]), vj.DoRA(rank=2, targets=["q", "head"]), vj.Diagonal(targets=["q"])],
)
def test_what_is_cut_is_the_smallest_part_and_is_told(method):
    """Against NumPy's SVD of every layer's whole change."""
    base = model()[1]
    adapter = moved(vj.init(method, jax.random.key(0), base))
    lora, residuals = as_lora(base, adapter, max_rank=2)
    ours = total([lora], base)
    for path, delta in total([adapter], base).items():
        layers = delta.reshape(-1, *delta.shape[-2:])
        for layer, change in enumerate(layers):
            u, values, v = np.linalg.svd(change)
            best = u[:, :2] * values[:2] @ v[:2]
            rest = np.sqrt((values[2:] ** 2).sum() / (values**2).sum())
            close(residuals[path][layer], rest, 1e-5)
            got = ours[path].reshape(layers.shape)[layer]
            close(np.linalg.norm(got - change), np.linalg.norm(best - change), 1e-5)
    with pytest.raises(
        ConversionError, match=r"rank 2 leaves .* of the change out, above the limit 0.01; raise max_rank"
    ):
        as_lora(base, adapter, max_rank=2, limit=0.01)


def test_servers_rules(tmp_path):
    """vLLM's: one rank of at most max_lora_rank, no DoRA, bias, modules_to_save or pattern; known leaf names."""
    _, base, names = model()
    method = vj.DoRA(rank=2, targets=["attention", "embed"], rank_pattern={"q": [0, 1, 2]})
    lora, _ = as_lora(base, moved(vj.init(method, jax.random.key(0), base)), max_rank=4)
    write_peft(tmp_path / "out", lora, base, names)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 4, False, False)
    assert config["bias"] == "none"
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"))
    leaves = {key.rpartition("lora_")[2] for key in read_tensors(tmp_path / "out" / TENSORS)[0]}
    assert leaves == {"A.weight", "B.weight", "embedding_A", "embedding_B"}


def test_where_no_server_asks_each_site_has_its_own_rank_and_what_is_whole_stays():
    base = model()[1]
    methods = [vj.LoRA(rank=2, targets="q", full="norm"), vj.Diagonal(targets="v")]
    adapters = [moved(vj.init(method, jax.random.key(0), base)) for method in methods]
    lora, _ = as_lora(base, adapters, max_rank=8, plain=False)
    assert {path: factors["a"].shape[-1] for path, factors in lora.trainable["sites"].items()} == {
        "layers/block/attn/q": 2, "layers/block/attn/v": 4,
    }  # fmt: skip
    again = jax.eval_shape(lambda base: vj.init(lora.method, jax.random.key(0), base), base)  # read back as a run is
    assert jax.tree.map(lambda leaf: leaf.shape, again.trainable) == jax.tree.map(
        lambda leaf: leaf.shape, lora.trainable
    )
    ours, expected = total([lora], base), total(adapters, base)
    for path in expected:
        close(ours[path], expected[path], 1e-5)
    with pytest.raises(ConfigError, match="two adapters train the same parameter whole"):
        as_lora(base, [adapters[0], adapters[0]], max_rank=8, plain=False)


def test_what_a_plain_lora_has_no_place_for_is_refused():
    base = model()[1]
    new = lambda **options: vj.init(vj.LoRA(rank=2, targets="q", **options), jax.random.key(0), base)
    with pytest.raises(ConversionError, match="norm/scale is trained whole"):
        as_lora(base, new(full="norm"), max_rank=4)
    with pytest.raises(ConversionError, match="the bias of layers/block/attn/q is changed"):
        as_lora(base, new(bias=True), max_rank=4)
    with pytest.raises(ConfigError, match="max_rank is 0"):
        as_lora(base, new(), max_rank=0)
