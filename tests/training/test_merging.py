"""vlora-jax merge of several adapters: runs and PEFT directories, as a LoRA and in the model."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call
from helpers import close, moved
from peft_tiny import IDS, model
from test_loop import LORA, TINY

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.checkpoint import fingerprint
from vlora_jax.errors import BaseMismatchError
from vlora_jax.hub.load import load_model
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.save import save
from vlora_jax.inspection.intruders import intruder_rows, reduce_intruders
from vlora_jax.training.results import read_run

FULL = 12  # at least the kernels' smaller side: nothing is left out


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """A LoRA of PEFT and a run with a DoRA, of one base; the adapters; one of another base; and the folder of all."""
    folder = tmp_path_factory.mktemp("merging")
    graphdef, base, names = model()
    save(folder / "model", graphdef, base)
    methods = {"one": vj.LoRA(rank=2, targets=["q", "down"], full="norm"), "two": vj.DoRA(rank=1, targets=["q", "v"])}
    adapters = {}
    for seed, (name, method) in enumerate(methods.items()):
        start = jax.jit(functools.partial(vj.init, method))(jax.random.key(0), base)
        adapters[name] = moved(start, seed)
        write_peft(folder / name, adapters[name], base, names, base_name=str(folder / "model"))
    other = jax.tree.map(lambda leaf: leaf + 1, base)
    write_peft(folder / "foreign", adapters["two"], other, names, base_name=str(folder / "model"))
    return folder, adapters


@pytest.fixture(scope="module")
def run(members):
    """The DoRA as a run."""
    from vlora_jax.training.exchange import import_adapter

    folder, _ = members
    import_adapter(folder / "two", folder / "run", {"source": str(folder / "model")})
    return folder / "run"


def logits(adapter):
    graphdef, base, _ = model()
    return np.asarray(jax.jit(functools.partial(vj.apply, graphdef))(base, adapter, IDS))


def test_what_one_trains_whole_and_another_adapts_is_no_lora(members, tmp_path, capsys):
    """Such a run could be written, and not read again."""
    folder, _ = members
    _, base, names = model()
    whole = moved(vj.init(vj.LoRA(rank=1, targets="v", full="attn/q"), jax.random.key(0), base))
    write_peft(tmp_path / "whole", whole, base, names, base_name=str(folder / "model"))
    arguments = ("merge", folder / "one", tmp_path / "whole", "--as", "lora", "--rank", FULL)
    code, _, error = call(capsys, *arguments, "--out", tmp_path / "both")
    assert code == 2
    assert "attn/q/kernel is trained whole by one of them and adapted by another" in error
    assert not (tmp_path / "both").exists()


def test_files_made_on_a_quantised_base_say_so_and_are_read_on_it(members, tmp_path):
    from vlora_jax.training.exchange import import_adapter
    from vlora_jax.training.subjects import open_subject

    folder, adapters = members
    _, base, names = model()
    held = vj.quantize(base, "int8")
    write_peft(tmp_path / "held", adapters["two"], held, names, base_name=str(folder / "model"))
    with pytest.raises(BaseMismatchError, match=r"as quantize=int8 holds it, this one is .*; is it another head"):
        read_peft(tmp_path / "held", base, names)
    run = import_adapter(tmp_path / "held", tmp_path / "run", {"source": str(folder / "model")})
    for found in (open_subject(str(tmp_path / "held")).base, run.base):
        assert fingerprint(found) == fingerprint(held)


def test_a_weighted_sum_becomes_a_run_with_a_lora(members, run, tmp_path, capsys):
    folder, adapters = members
    arguments = ("merge", folder / "one", run, "--weights", "0.5,2", "--as", "lora")
    code, out, error = call(capsys, *arguments, "--rank", FULL, "--out", tmp_path / "both")
    assert (code, error) == (0, "")
    assert "lora of rank " in out
    assert "kept whole  norm/scale" in out
    summed = vj.weighted_sum([adapters["one"], adapters["two"]], [0.5, 2.0], model()[1])
    close(logits(read_run(tmp_path / "both").adapter), logits(summed), 1e-5)
    code, out, _ = call(capsys, "inspect", tmp_path / "both", "--json")
    assert code == 0
    assert {row["path"] for row in json.loads(out)["changes"]} >= {site.path for site in summed.sites}
    code, out, error = call(capsys, "export", tmp_path / "both", "--out", tmp_path / "peft")
    assert (code, error) == (0, "")
    (exported,) = read_peft(tmp_path / "peft", *model()[1:])
    close(logits(exported), logits(summed), 1e-5)


@pytest.mark.slow
def test_the_blend_is_merged_into_the_model(members, run, tmp_path, capsys):
    folder, adapters = members
    arguments = ("merge", run, folder / "one", "--method", "dare_ties", "--drop", 0.5, "--seed", 3)
    code, out, error = call(capsys, *arguments, "--out", tmp_path / "model")
    assert (code, error) == (0, "")
    assert "largest logit gap" in out
    base, keys = model()[1], jax.random.split(jax.random.key(3), 2)
    thinned = [vj.dare(adapters[name], 0.5, key, base) for name, key in zip(("two", "one"), keys, strict=True)]
    merged = load_model(tmp_path / "model", notify=lambda line: None)
    apply = jax.jit(functools.partial(vj.apply, merged.graphdef))
    close(apply(merged.base, None, IDS), logits(vj.ties(thinned, density=1.0, base=base)), 1e-5)


def test_one_adapter_is_cut_to_a_rank_and_what_is_lost_is_told_and_limited(members, tmp_path, capsys):
    folder, adapters = members
    arguments = ("merge", folder / "two", "--as", "lora", "--rank", 1, "--out", tmp_path / "cut")
    code, _, error = call(capsys, *arguments, "--limit", 0.01)
    assert (code, error.count("\n")) == (2, 1)
    assert "of the change out, above the limit 0.01" in error
    assert not (tmp_path / "cut").exists()
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    _, residuals = vj.as_lora(model()[1], adapters["two"], 1)
    for path, values in residuals.items():
        assert f"{path}  " in out
        assert f"{values.max():.3g}" in out


LORA_OF = ("--as", "lora", "--rank", "2")


def test_intruders_are_scaled_down(members, tmp_path, capsys):
    """One layer has a direction far stronger than its kernel's and halfway between all of them."""
    folder, _ = members
    _, base, names = model()
    adapter = vj.init(vj.LoRA(rank=1, alpha=1.0, targets="q"), jax.random.key(0), base)
    (site,) = adapter.sites
    u, _, v = np.linalg.svd(np.asarray(site.read(flatten(base)))[1])
    a, b = (np.zeros(adapter.factors(site.path)[name].shape, np.float32) for name in "ab")
    a[1, :, 0], b[1, 0] = 300 * u.mean(1), v.mean(0)
    adapter = adapter.with_trainable(
        adapter.trainable | {"sites": {site.path: jax.tree.map(jnp.asarray, {"a": a, "b": b})}}
    )
    write_peft(folder / "intruding", adapter, base, names, base_name=str(folder / "model"))
    arguments = ("merge", folder / "intruding", *LORA_OF, "--out", tmp_path / "mended", "--keep-intruders")
    for wrong in (1.5, "nan"):
        code, out, error = call(capsys, *arguments, wrong)
        assert (code, out, "Invalid value for '--keep-intruders'" in error) == (2, "", True)
    code, out, error = call(capsys, *arguments, 0.25)
    assert (code, error) == (0, "")
    count = sum(row.output for row in intruder_rows(base, adapter))
    assert count > 0
    assert f"{count} in 1 of 3 kernels, scaled to 25%" in out
    mended = read_run(tmp_path / "mended").adapter
    close(logits(mended), logits(reduce_intruders(base, adapter, keep=0.25)[0]), 1e-5)
    assert np.abs(logits(mended) - logits(adapter)).max() > 1e-3


WRONG = {
    "3 weights for 2 adapters; each needs one": ("one", "two", "--weights", "1,2,3", *LORA_OF),
    "--weights '1;2' must be numbers with commas between": ("one", "two", "--weights", "1;2"),
    "--as lora needs --rank": ("one", "two", "--as", "lora"),
    "--rank is for --as lora": ("one", "two", "--rank", "2"),
    "--keep-intruders is for --as lora": ("one", "--keep-intruders", "0.5"),
    "--density is for --method ties": ("one", "two", "--density", "0.5"),
    "--drop is for --method dare and dare_ties": ("one", "two", "--method", "ties", "--drop", "0.5"),
    "was made for the base": ("one", "foreign", *LORA_OF),
    "--step is for one run": ("one", "run", "--step", "0"),
    "--step is for one run; ": ("one", "--step", "0", *LORA_OF),
    "--base is for PEFT's directories without any run": ("run", "--base", "one", *LORA_OF),
    "nowhere does not exist": ("one", "nowhere", *LORA_OF),
    "is there already and not empty": ("one", "two", *LORA_OF, "--out", "run"),
}


@pytest.mark.parametrize("message", WRONG)
def test_mistakes_are_one_line_and_exit_code_2(message, members, run, tmp_path, capsys):
    folder, _ = members
    names = ("one", "two", "foreign", "nowhere", "run")
    arguments = [folder / each if each in names else each for each in WRONG[message]]
    code, out, error = call(capsys, "merge", "--out", tmp_path / "out", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_runs_on_a_vertical_model(tmp_path, capsys):
    """What comes of merging is evaluated with the data of the first; another base, or no ΔW, is refused."""

    def trained(name, *changes):
        tiny = [each for each in TINY if "model=null" not in changes or not each.startswith("model.")]
        arguments = [*tiny, "steps=4", f"run_dir={tmp_path / name}", *changes]
        assert call(capsys, "train", *arguments)[0] == 0
        return tmp_path / name

    base, other = trained("base"), trained("other", "seed=1")
    one, two = (trained(name, *LORA, f"init_from={base}", f"seed={seed}") for seed, name in enumerate(("a", "b")))
    foreign = trained("c", *LORA, f"init_from={other}")
    gated = trained(
        "d", "model=null", "adapter.method=flylora", "adapter.rank=4", "adapter.active=2", f"init_from={base}"
    )
    merge = lambda *members: call(capsys, "merge", *members, "--as", "lora", "--rank", 8, "--out", tmp_path / "out")
    for bad, message in {
        foreign: "its adapter was trained on another base",
        gated: "flylora depends on the input",
    }.items():
        code, _, error = merge(one, bad)
        assert (code, message in error, error.count("\n")) == (2, True, 1)
    code, _, error = call(capsys, "merge", tmp_path / "aa", "--out", tmp_path / "out")
    assert (code, error) == (2, f"error: {tmp_path / 'aa'} does not exist; nearest run: {one}\n")
    code, _, error = call(capsys, "merge", gated, "--out", tmp_path / "out")
    assert (code, "flylora depends on the input" in error, error.count("\n")) == (2, True, 1)
    code, _, error = merge(base, one)
    assert (code, "trained its model, not an adapter" in error) == (2, True)
    assert merge(one, two)[0] == 0
    mean = vj.average(read_run(one).adapter, read_run(two).adapter, base=read_run(one).base)
    found = read_run(tmp_path / "out")
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    apply = functools.partial(vj.apply, found.graphdef, found.base)
    close(apply(found.adapter, x), apply(mean, x), 1e-5)
    code, out, _ = call(capsys, "eval", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["marks"]["weight"] == 360
