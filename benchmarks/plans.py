"""Plans of the shipped configs, written to `docs/plans/`: `make plans`, or `python benchmarks/plans.py [NAME]...`.

Needs the extra `plan`, no TPU. `--depth` compiles one model with 16 and with 80 layers and prints what each took.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLANS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llama2_7b_lora_v5e_4x4": (
        "llama2_7b_vera",
        "v5e:4x4",
        ("adapter.method=lora", "adapter.rank=16", "adapter.targets=all-linear"),
    ),
    "llama2_7b_vera_v5e_4x4": ("llama2_7b_vera", "v5e:4x4", ()),
    "llama3_8b_lora_v5e_4x4": ("llama3_8b_lora", "v5e:4x4", ()),
    "llama3_8b_lora_32k_v5e_4x4": (
        "llama3_8b_lora",
        "v5e:4x4",
        ("data.length=32768", "data.batch=2", "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=8", "mesh.sequence=true"),
    ),
    "qwen3_32b_dora_v6e_4x4": ("qwen3_32b_dora", "v6e:4x4", ()),
    "llama3_70b_lora_v5p_4x4x4": ("llama3_70b_lora", "v5p:4x4x4", ()),
    "llama3_70b_lora_v5e_16x16": ("llama3_70b_lora", "v5e:16x16", ("data.batch=256", "mesh.data=1", "mesh.fsdp=256")),
    "llama3_70b_qlora_v5e_4x4": ("llama3_70b_qlora", "v5e:4x4", ()),
    "llama3_405b_tied_lora_v5p_8x8x8": ("llama3_405b_tied_lora", "v5p:8x8x8", ()),
}
DEPTHS, ROUNDS = (16, 80), 2  # a busy machine blurs one round


def arguments(config: str, topology: str, overrides: tuple[str, ...]) -> list[str]:
    """Of `vlora-jax`."""
    return ["plan", "--config", f"configs/{config}.yaml", "--topology", topology, *overrides]


def planned(given: list[str]) -> str:
    """What a plan prints; its progress goes to the terminal."""
    command = [sys.executable, "-m", "vlora_jax.cli.main", *given]
    environment = os.environ | {"COLUMNS": "110", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def write(name: str) -> None:
    """One plan's file: the command, and what it printed."""
    given = arguments(*PLANS[name])
    lines = [line.rstrip() for line in planned(given).splitlines()]
    path = ROOT / "docs" / "plans" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"$ vlora-jax {' '.join(given)}\n\n" + "\n".join(lines) + "\n")
    print(path.relative_to(ROOT))


def depth() -> None:
    """Seconds of compiling Llama 3 70B cut to each of `DEPTHS`, in turn: they must not grow with it."""
    config, topology, overrides = PLANS["llama3_70b_lora_v5p_4x4x4"]
    print("layers  compile s  CPU s  peak GB  fits", flush=True)
    for layers in DEPTHS * ROUNDS:
        given = json.loads((ROOT / "configs" / "models" / "Meta-Llama-3-70B.json").read_text())
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(given | {"num_hidden_layers": layers}))
            found = json.loads(planned([*arguments(config, topology, overrides), "--model", folder, "--json"]))
        took, peak = found["seconds"], found["memory"].get("peak", 0) / 1e9
        row = f"{layers:6}  {took['compile']:9.1f}  {took['compile_cpu']:5.1f}  {peak:7.2f}  {found['fits']}"
        print(row, flush=True)


def main() -> None:
    """Write the plans named, or all."""
    if sys.argv[1:] == ["--depth"]:
        depth()
        return
    for name in sys.argv[1:] or PLANS:
        write(name)


if __name__ == "__main__":
    main()
