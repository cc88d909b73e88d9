"""Generation against the model itself, called anew for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import filled, mostly_slow, parameters, random_adapter

import vlora_jax as vj
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.generation import generate as module
from vlora_jax.generation.generate import generate
from vlora_jax.generation.sampling import Sampling, allowed
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.encoder import Encoder, EncoderConfig
from vlora_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig

SIZES = {"vocabulary": 40, "width": 16, "heads": 4, "mlp_width": 24, "layers": 4}
GEMMA = {
    "kv_heads": 2, "window": 3, "window_layers": (True, False, True, False), "rotary_theta_local": 100.0,
    "norm_place": "both", "softcap": 5.0, "embed_scale": True, "logit_softcap": 5.0,
}  # fmt: skip
GPT2 = {"rotary_theta": None, "max_positions": 48, "fused_qkv": True, "norm": "layer", "gated": False, "qkv_bias": True}
MODELS = {
    "gemma": (Decoder, DecoderConfig(**SIZES, **GEMMA)),
    "gpt2": (Decoder, DecoderConfig(**SIZES, **GPT2)),
    "vertical": (Decoder, DecoderConfig(**SIZES, vertical=vj.Vertical(size=2))),
    "t5": (Seq2Seq, Seq2SeqConfig(**SIZES, decoder_layers=3)),
}
PROMPTS = [[1, 2, 3], [4], [7, 8, 9, 10, 11, 12, 13]]
NEW = 6


def tiny(name):
    make, config = MODELS[name]
    return parameters(lambda rngs: make(config, rngs))


def one_by_one(graphdef, base, adapters, prompt, encodes, new=NEW):
    """The likeliest tokens, each from a call on all tokens before it; rows are padded so that one program serves."""
    call = jax.jit(lambda *inputs: vj.apply(graphdef, base, adapters, *inputs))
    tokens = [0] if encodes else list(prompt)
    first, total = len(tokens), len(tokens) + new
    while len(tokens) < total:
        row = jnp.asarray([tokens + [0] * (total - len(tokens))])
        scores = call(jnp.asarray([prompt]), row) if encodes else call(row)
        tokens.append(int(scores[0, len(tokens) - 1].argmax()))
    return tokens[first:]


@pytest.mark.parametrize("name", mostly_slow(MODELS, ["gemma", "t5"]))
@pytest.mark.parametrize("apart", [pytest.param(True, marks=pytest.mark.slow), False], ids=["written out", "looped"])
def test_prompts_of_different_length_continue_as_each_alone(name, apart, monkeypatch):
    monkeypatch.setattr(module, "apart", lambda: apart)
    monkeypatch.setattr(module, "BUCKET", 8 if apart else 4)  # another shape, so that nothing compiled is reused
    graphdef, base = tiny(name)
    out = generate(graphdef, base, PROMPTS, most=NEW)
    expected = [one_by_one(graphdef, base, None, prompt, name == "t5") for prompt in PROMPTS]
    assert out.tokens == expected
    assert len({tuple(tokens) for tokens in expected}) == 3  # the answers differ, so rows cannot be confused


@pytest.mark.parametrize("name", mostly_slow(["gemma", "t5"], ["gemma"]))
def test_each_row_uses_its_own_adapter(name):
    """Also on the embedding, which is the head."""
    graphdef, base = tiny(name)
    method = vj.LoRA(rank=2, targets=["all-linear", "embed"])
    adapters = [random_adapter(method, base, seed) for seed in (1, 2)]
    rows, prompts = [1, -1, 0, 0], [*PROMPTS, PROMPTS[0]]
    out = generate(graphdef, base, prompts, adapters, rows=rows, most=NEW)
    own = [None if row < 0 else adapters[row] for row in rows]
    expected = [one_by_one(graphdef, base, each, p, name == "t5") for each, p in zip(own, prompts, strict=True)]
    assert out.tokens == expected
    assert out.tokens[0] != out.tokens[3]


def test_adapters_add_up():
    graphdef, base = tiny("gpt2")
    adapters = [random_adapter(vj.LoRA(rank=2), base, seed) for seed in (1, 2)]
    out = generate(graphdef, base, PROMPTS[:1], adapters, most=NEW)
    assert out.tokens == [one_by_one(graphdef, base, adapters, PROMPTS[0], False)]


def test_an_answer_ends_with_its_first_end():
    graphdef, base = tiny("gemma")
    free = generate(graphdef, base, PROMPTS, most=NEW).tokens
    eos = free[1][2]
    out = generate(graphdef, base, PROMPTS, most=NEW, eos=[eos])
    cut = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert out.tokens == cut
    assert out.finished == [eos in tokens for tokens in free]


def test_sampling_follows_the_key_and_the_row():
    graphdef, base = tiny("gpt2")
    base = jax.tree.map(lambda leaf: leaf * 0.5, base)
    draw = lambda prompts, seed: (
        generate(graphdef, base, prompts, most=NEW, sampling=Sampling(1.5), key=jax.random.key(seed)).tokens
    )
    one = draw(PROMPTS, 0)
    assert one == draw(PROMPTS, 0)
    assert one != draw(PROMPTS, 1)
    assert draw([PROMPTS[0], PROMPTS[0]], 0)[0] != draw([PROMPTS[0], PROMPTS[0]], 0)[1]


def test_what_may_be_drawn():
    """Probabilities .5, .25, .125, … : the three best at most, and the fewest that reach 0.7 are two."""
    scores = jnp.log(jnp.asarray([[0.0625, 0.5, 0.0625, 0.25, 0.125]]))
    kept = lambda **options: np.flatnonzero(np.isfinite(allowed(scores, Sampling(1.0, **options))[0])).tolist()
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=3) == [1, 3, 4]
    assert kept(top_p=0.7) == [1, 3]
    assert kept(top_p=0.75) == [1, 3]
    assert kept(top_p=0.76) == [1, 3, 4]
    assert kept(top_p=1e-6) == [1]
    assert kept(top_k=2, top_p=0.6) == [1]  # of what top_k leaves, the best has two thirds
    np.testing.assert_allclose(allowed(scores, Sampling(2.0)), scores / 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompts": []}, DataError, "no prompt"),
        ({"prompts": [[1], []]}, DataError, "prompt 1 has no token"),
        ({"prompts": [[1, 40]]}, DataError, "token 40"),
        ({"prompts": ["text"]}, DataError, "must be lists of token ids"),
        ({"prompts": [[1.5]]}, DataError, "must be lists of token ids"),
        ({"prompts": [1, 2]}, DataError, "must be lists of token ids"),
        ({"prompts": [[1] * 45]}, ConfigError, "exceed the model's 48 positions"),
        ({"prompts": [[1]], "most": 0}, ConfigError, "at least 1"),
        ({"prompts": [[1]], "rows": [0]}, ConfigError, "and there are 0"),
    ],
)
def test_what_cannot_be_continued(arguments, error, words):
    graphdef, base = tiny("gpt2")
    with pytest.raises(error, match=words):
        generate(graphdef, base, **{"most": NEW} | arguments)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_p": 0.0}, {"top_k": 3}],
)
def test_impossible_sampling(options):
    with pytest.raises(ConfigError):
        Sampling(**options)


def test_a_model_without_a_head_over_the_vocabulary_generates_nothing():
    graphdef, base = parameters(lambda rngs: Encoder(EncoderConfig(**SIZES), rngs))
    with pytest.raises(ConfigError, match="Encoder with head 'none'"):
        generate(graphdef, base, PROMPTS)


def test_whole_parameters_cannot_differ_by_row():
    graphdef, base = tiny("gpt2")
    adapter = filled(vj.init(vj.LoRA(rank=2, full="norm"), jax.random.key(0), base), 0)
    with pytest.raises(ConfigError, match="norm/bias"):
        generate(graphdef, base, PROMPTS[:1], [adapter], rows=[0], most=NEW)


def test_only_equal_adapters_stack():
    _, base = tiny("gpt2")
    one, other = (random_adapter(vj.LoRA(rank=rank), base) for rank in (1, 2))
    with pytest.raises(ConfigError, match="0 and 1 differ in their method"):
        vj.stack_adapters([one, other])
    with pytest.raises(ConfigError, match="no adapters"):
        vj.stack_adapters([])


def test_how_adapters_were_trained_is_no_obstacle():
    _, base = tiny("gpt2")
    one, other = (random_adapter(vj.AdaLoRA(rank=2, target_rank=1, steps=steps), base) for steps in (9, 12))
    assert vj.stack_adapters([one, other]).method == one.method


def test_adapters_stack_however_their_sites_were_named():
    """As a run's and the same adapter read from PEFT's files."""
    graphdef, base = tiny("gpt2")
    one = random_adapter(vj.LoRA(rank=2, targets="attention", dropout=0.1), base)
    other = random_adapter(vj.LoRA(rank=2, targets=["o", "qkv"], start="gaussian"), base, 5)
    out = generate(graphdef, base, PROMPTS[:2], [one, other], rows=[1, 0], most=NEW)
    own = zip([other, one], PROMPTS[:2], strict=True)
    assert out.tokens == [one_by_one(graphdef, base, each, prompt, False) for each, prompt in own]


def test_prompts_may_be_arrays():
    graphdef, base = tiny("gpt2")
    expected = generate(graphdef, base, PROMPTS[:1], most=NEW).tokens
    assert generate(graphdef, base, jnp.asarray(PROMPTS[:1]), most=NEW).tokens == expected
