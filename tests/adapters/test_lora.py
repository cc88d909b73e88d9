"""LoRA: its scale, its starts, dropout, tables by site, LoRA+, and the sizes that papers count."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, parameters, random_adapter
from third_party import LaxScanned, Tied

import vlora_jax as vj
from vlora_jax.adapters.lora import Start
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.registry import from_config
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import flatten
from vlora_jax.adapters.view import dropout
from vlora_jax.errors import ConfigError, ConversionError, TargetError
from vlora_jax.training.optimizers import OptimizerConfig, optimizer


@pytest.fixture(scope="module")
def stacked():
    return parameters(LaxScanned)[1]


def site(path="blocks/up", kind="dense", shape=(64, 48), stack=(3,)):
    return Site(path, "kernel", kind, stack, shape, (0,), (1,))


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_the_change_is_scaled_by_alpha_over_rank_or_its_root(stacked, stabilised, scale):
    adapter = random_adapter(vj.LoRA(rank=4, alpha=12.0, rank_stabilised=stabilised), stacked)
    (up,) = vj.select(adapter.sites, "up")
    a, b = (np.asarray(adapter.factors(up.path)[name]) for name in "ab")
    change = jax.jit(lambda: site_delta(adapter, up, jnp.zeros((3, 4, 6))))()
    close(change, scale * np.einsum("lir,lro->lio", a, b))


BOUNDS = {  # of A (64 × 16) and B (16 × 48): uniform within, or None for a normal distribution or zeros
    "zero_b": (1 / math.sqrt(64), 0.0),
    "gaussian": (None, 0.0),
    "kaiming_both": (1 / math.sqrt(64), 1 / math.sqrt(48)),
    "xavier_both": (math.sqrt(6 / (16 + 64)), math.sqrt(6 / (16 + 48))),
}


@pytest.mark.parametrize("start", BOUNDS)
def test_each_layer_starts_as_a_layer_of_its_own(start):
    """Bounds follow one layer's sides, not the stack's; layers differ."""
    drawn = jax.jit(vj.LoRA(rank=16, start=start).init_stack, static_argnums=1)(jax.random.key(0), site())
    for (name, factor), bound in zip(sorted(drawn.trainable.items()), BOUNDS[start], strict=True):
        assert factor.shape == {"a": (3, 64, 16), "b": (3, 16, 48)}[name]
        if bound is None:
            close(np.std(factor, axis=(1, 2)), np.full(3, 1 / 16), 0.01)
            close(np.mean(factor, axis=(1, 2)), np.zeros(3), 0.01)
        elif bound == 0:
            assert not factor.any()
        else:
            largest = np.abs(factor).max(axis=(1, 2))
            assert ((0.97 * bound < largest) & (largest <= bound)).all()
            close(np.std(factor, axis=(1, 2)), np.full(3, bound / math.sqrt(3)), 0.02)
        if bound != 0:
            assert len({layer.tobytes() for layer in np.asarray(factor)}) == 3


def test_an_embedding_starts_with_a_zero_table_side():
    method = vj.LoRA(rank=16)
    drawn = jax.jit(method.init_stack, static_argnums=1)(jax.random.key(0), site("embed", "embed", (64, 48), ()))
    assert drawn.trainable["a"].shape == (64, 16)
    assert not drawn.trainable["a"].any()
    close(np.std(drawn.trainable["b"]), 1.0, 0.05)


def test_sites_and_keys_draw_differently(stacked):
    draw = jax.jit(lambda key: vj.init(vj.LoRA(rank=2, targets="up|mix"), key, stacked))
    first, again, other = (flatten(draw(jax.random.key(seed)).trainable) for seed in (0, 0, 1))
    for path in first:
        np.testing.assert_array_equal(first[path], again[path])
    drawn = [values[f"sites/blocks/{name}/a"][0, :4] for values in (first, other) for name in ("up", "mix")]
    assert len({value.tobytes() for value in map(np.asarray, drawn)}) == 4


class Fan(nnx.Module):
    """Stacked layers that all read the model's input, and a layer beside them; emits what each makes of it."""

    def __init__(self, rngs):
        pair = lambda rngs: nnx.Dict(left=nnx.Linear(4, 4, rngs=rngs), right=nnx.Linear(4, 4, rngs=rngs))
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(pair))(rngs)
        self.alone = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.layers)

        def body(_, layer):
            pair = nnx.merge(graphdef, layer)
            return None, jnp.stack([pair["left"](x), pair["right"](x)])

        return jnp.concatenate([jax.lax.scan(body, None, layers)[1].reshape(-1, *x.shape), self.alone(x)[None]])


def test_dropout_hides_inputs_of_a_only_by_a_mask_for_each_layer_site_and_key():
    graphdef, base = parameters(Fan)
    x = jnp.ones((8, 4))
    adapter = random_adapter(vj.LoRA(rank=4, alpha=4.0, dropout=0.5), base)
    eye = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(4), leaf.shape), adapter.trainable)
    adapter = adapter.with_trainable(eye)  # the change is then the dropped input itself
    apply = lambda key: vj.apply(graphdef, base, adapter, x, key=key)
    base_out, plain, first, again, other = jax.jit(
        lambda: (vj.apply(graphdef, base, None, x), apply(None), *(apply(jax.random.key(s)) for s in (0, 0, 1)))
    )()
    close(plain - base_out, np.ones((7, 8, 4)))
    np.testing.assert_array_equal(first, again)
    masks = np.round(np.stack([first - base_out, other - base_out]), 5)
    assert set(masks.ravel()) == {0.0, 2.0}
    assert len(np.unique(masks.reshape(14, -1), axis=0)) == 14  # 2 keys × (2 sites × 3 layers + 1)


def test_adapters_bound_together_drop_differently():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    adapter = random_adapter(vj.LoRA(rank=4, alpha=4.0, dropout=0.5), base)
    adapter = adapter.with_trainable(jax.tree.map(lambda leaf: jnp.eye(4), adapter.trainable))
    x = jnp.ones((16, 4))
    call = lambda adapters: vj.apply(graphdef, base, adapters, x, key=jax.random.key(0))
    bound, bare = jax.jit(lambda: (call([adapter, adapter]), call(None)))()
    change = np.round(np.subtract(bound, bare), 5)
    assert set(change.ravel()) == {0.0, 2.0, 4.0}


def test_dropout_keeps_the_mean():
    kept = np.asarray(dropout(jnp.ones((100, 100)), 0.2, jax.random.key(0)))
    assert set(np.round(kept, 5).ravel()) == {0.0, 1.25}
    assert abs(kept.mean() - 1) < 0.02


def test_embeddings_know_no_dropout():
    graphdef, base = parameters(Tied)
    adapter = random_adapter(vj.LoRA(rank=2, dropout=0.5, targets="embed"), base)
    call = lambda key: vj.apply(graphdef, base, adapter, jnp.array([[0, 3]]), key=key)
    with_key, without = jax.jit(lambda: (call(jax.random.key(0)), call(None)))()
    np.testing.assert_array_equal(with_key, without)


def test_tables_give_sites_their_own_rank_and_alpha(stacked):
    method = vj.LoRA(rank=4, alpha=8.0, rank_pattern={"up": 1, "mix": 3}, alpha_pattern={"up|down": 5.0})
    adapter = random_adapter(method, stacked)
    scales = {"blocks/up": 5.0 / 1, "blocks/mix": 8.0 / 3, "blocks/down": 5.0 / 4}
    ranks = {site.path: adapter.factors(site.path)["a"].shape[-1] for site in adapter.sites}
    assert ranks == {"blocks/up": 1, "blocks/mix": 3, "blocks/down": 4}
    deltas = jax.jit(lambda: {s.path: site_delta(adapter, s, s.read(flatten(stacked))) for s in adapter.sites})()
    for path, scale in scales.items():
        a, b = (np.asarray(adapter.factors(path)[name]) for name in "ab")
        close(deltas[path], scale * a @ b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rank_pattern": {"uq": 1}},
            TargetError,
            "lora: rank_pattern: target 'uq' matches nothing; nearest: blocks/up",
        ),
        ({"alpha_pattern": {"head": 1.0}}, TargetError, "lora: alpha_pattern: target 'head' matches nothing"),
        ({"rank_pattern": {"up": 1, "blocks/up": 2}}, ConfigError, "rank_pattern: .* both match blocks/up"),
        ({"alpha_pattern": {"up": 1.0, "u.": 2.0}}, ConfigError, r"alpha_pattern: \['up', 'u.'\] both match blocks/up"),
        ({"rank": 5}, ConfigError, r"lora: rank 5 is above the smaller side, 4, of blocks/\w+ "),
        ({"rank_pattern": {"up": 5}}, ConfigError, r"lora: rank 5 is above the smaller side, 4, of blocks/up \(4, 6\)"),
    ],
)
def test_what_does_not_fit_the_sites_is_refused(stacked, options, error, message):
    with pytest.raises(error, match=message):
        random_adapter(vj.LoRA(**{"rank": 2} | options), stacked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora: rank is 0; it must be at least 1"),
        ({"rank": -2}, "lora: rank is -2; it must be at least 1"),
        ({"rank": 2.0}, "lora: rank is 2.0; it must be a whole number"),
        ({"rank": True}, "lora: rank is True; it must be a whole number"),
        ({"alpha": math.nan}, "lora: alpha is nan; it must be a finite number"),
        ({"alpha": math.inf}, "lora: alpha is inf; it must be a finite number"),
        ({"alpha": "16"}, "lora: alpha is '16'; it must be a finite number"),
        ({"dropout": 1.0}, "lora: dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "lora: dropout is -0.1; it must be at least 0 and below 1"),
        ({"rank_stabilised": 1}, "lora: rank_stabilised is 1; it must be true or false"),
        ({"start": "zero"}, "lora: start is 'zero'; it must be one of zero_b, gaussian, kaiming_both, xavier_both"),
        ({"b_rate": 0.0}, "lora: b_rate is 0.0; it must be positive"),
        ({"rank_pattern": {"up": 0}}, r"lora: rank_pattern\['up'\] is 0; it must be at least 1"),
        ({"rank_pattern": {"up": 1.5}}, r"lora: rank_pattern\['up'\] is 1.5; it must be a whole number"),
        ({"rank_pattern": 3}, "lora: rank_pattern is 3; it must map patterns to values"),
        ({"alpha_pattern": {"up": math.nan}}, r"lora: alpha_pattern\['up'\] is nan; it must be a finite number"),
        ({"targets": 3}, "lora: targets is 3; it must be a pattern or a list of patterns"),
    ],
)
def test_impossible_options_are_refused_by_name(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.LoRA(**options)


def test_a_full_config_survives_json():
    method = vj.LoRA(
        targets=["up", "mix"],
        rank=3,
        rank_stabilised=True,
        dropout=0.1,
        rank_pattern={"up": [1, 0, 2]},
        alpha_pattern={"mix": 2.0},
        bias=True,
        start="gaussian",
        b_rate=16.0,
    )
    assert from_config(json.loads(json.dumps(method.config()))) == method
    assert hash(method) == hash(from_config(method.config()))


class Kernels(nnx.Module):
    """Stacked kernels of the given sides, as published models have them."""

    def __init__(self, layers, sides, rngs):
        block = lambda rngs: nnx.Dict({name: nnx.Linear(*pair, rngs=rngs) for name, pair in sides.items()})
        self.layers = nnx.split_rngs(splits=layers)(nnx.vmap(block))(rngs)


def roberta(width):
    squares = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    return squares | {"up": (width, 4 * width), "down": (4 * width, width)}


def llama(width, inner):
    return dict.fromkeys("qkvo", (width, width)) | {
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }


LLAMA_7B = llama(4096, 11008)
LLAMA_3B = {"q": (3072, 3072), "v": (3072, 1024)}  # Llama 3.2


@pytest.mark.parametrize(
    ("layers", "sides", "options", "numbers"),
    [
        (12, roberta(768), {"rank": 8, "targets": "query|value"}, 294_912),  # base, "0.3M" in the paper
        (24, roberta(1024), {"rank": 8, "targets": "query|value"}, 786_432),  # large, "0.8M"
        (12, roberta(768), {"rank": 8}, 1_327_104),
        (12, roberta(768), {"rank": 8, "rank_pattern": {"up|down": 2}, "exclude": "key|out"}, 479_232),
        (24, dict.fromkeys("qv", (1024, 1024)), {"rank": 4}, 393_216),  # GPT-2 M, "0.35M"
        (36, dict.fromkeys("qv", (1280, 1280)), {"rank": 4}, 737_280),  # GPT-2 L, "0.77M"
        (28, LLAMA_3B, {"rank": 32}, 9_175_040),
        (28, LLAMA_3B, {"rank": 64}, 18_350_080),
        (32, LLAMA_7B, {"rank": 64}, 159_907_840),
        (40, llama(5120, 13824), {"rank": 64}, 250_347_520),
    ],
)
def test_as_many_numbers_train_as_the_papers_count(layers, sides, options, numbers):
    base = vj.split(nnx.eval_shape(lambda: Kernels(layers, sides, nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.LoRA(**options), jax.random.key(0), base), base)
    assert vj.count(adapter) == numbers


def test_lora_plus_trains_b_faster(stacked):
    adapter = random_adapter(vj.LoRA(rank=2, b_rate=16.0, full="up/bias"), stacked)
    config = OptimizerConfig(name="sgd", b1=0.0, rate=0.1, schedule="constant", warmup=0, decay=0.0, clip=None)
    tx = optimizer(config, 10, adapter.trainable, adapter)
    ones = jax.tree.map(jnp.ones_like, adapter.trainable)
    updates = flatten(jax.jit(lambda: tx.update(ones, tx.init(ones), ones)[0])())
    for path, update in updates.items():
        close(update, np.full(update.shape, -1.6 if path.endswith("/b") else -0.1))


def test_lists_give_each_layer_its_own_rank_and_alpha(stacked):
    method = vj.LoRA(
        rank=2, alpha=6.0, targets="up|mix", rank_pattern={"up": [1, 0, 3]}, alpha_pattern={"mix": [1.0, 2.0, 4.0]}
    )
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(stacked)
    adapter = adapter.with_trainable(random_adapter(method, stacked).trainable)
    deltas = jax.jit(lambda: {s.path: site_delta(adapter, s, s.read(flatten(stacked))) for s in adapter.sites})()
    for path, layers in {
        "blocks/up": [(1, 6.0), (0, 6.0), (3, 2.0)],
        "blocks/mix": [(2, 0.5), (2, 1.0), (2, 2.0)],
    }.items():
        a, b = (np.asarray(adapter.factors(path)[name]) for name in "ab")
        for layer, (rank, scale) in enumerate(layers):
            close(deltas[path][layer], scale * a[layer][:, :rank] @ b[layer][:rank])


def test_numbers_beyond_a_layer_s_rank_are_zero_and_stay_so(stacked):
    method = vj.LoRA(rank=2, targets="up", rank_pattern={"up": [1, 0, 3]}, start="kaiming_both")
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(stacked)
    (site,), kernel = adapter.sites, jnp.zeros((3, 4, 6))
    loss = lambda t: (site_delta(adapter.with_trainable(t), site, kernel) ** 2).sum()
    for tree in (adapter.trainable, jax.jit(jax.grad(loss))(adapter.trainable)):
        a, b = (np.asarray(tree["sites"][site.path][name]) for name in "ab")
        for layer, rank in enumerate((1, 0, 3)):
            assert a[layer].any(axis=0).tolist() == b[layer].any(axis=1).tolist() == [i < rank for i in range(3)]


def test_a_list_must_have_a_value_for_each_layer(stacked):
    with pytest.raises(ConfigError, match="lora: rank_pattern lists 2 values for blocks/up, which has 3 layers"):
        random_adapter(vj.LoRA(targets="up", rank_pattern={"up": [1, 2]}), stacked)
    with pytest.raises(ConfigError, match=r"lora: rank_pattern\['up'\]\[1\] is -1; it must be at least 0"):
        vj.LoRA(rank_pattern={"up": [1, -1]})


def test_a_bias_of_b_shifts_the_output_by_the_scale_and_is_merged_into_the_layer_s():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    adapter = random_adapter(vj.LoRA(rank=2, alpha=6.0, bias=True), base)
    x, factors = jnp.ones((2, 4)), {name: np.asarray(value) for name, value in adapter.factors("").items()}
    out, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, x), vj.merge(base, adapter)))()
    kernel, bias = (np.asarray(base[name].get_value()) for name in ("kernel", "bias"))
    close(merged["bias"].get_value(), bias + 3 * factors["bias"])
    close(out, x @ (kernel + 3 * factors["a"] @ factors["b"]) + bias + 3 * factors["bias"])


def test_a_bias_cannot_be_merged_into_a_layer_without_one_nor_trained_on_an_embedding():
    base = parameters(lambda rngs: nnx.Linear(4, 3, use_bias=False, rngs=rngs))[1]
    with pytest.raises(ConversionError, match=r"lora changes the bias of .*, which has none"):
        vj.merge(base, random_adapter(vj.LoRA(rank=2, bias=True), base))
    with pytest.raises(ConfigError, match="lora: bias: embed is an embedding"):
        random_adapter(vj.LoRA(rank=2, bias=True, targets="embed"), parameters(Tied)[1])


def test_vertical_increments_take_neither():
    for options in ({"bias": True}, {"rank_pattern": {"up": [1, 2]}}):
        with pytest.raises(ValueError, match="a vertical increment takes no bias and one rank"):
            vj.Vertical(increment=vj.LoRA(**options))


def test_every_start_is_listed():
    assert set(Start.__args__) == set(BOUNDS)
