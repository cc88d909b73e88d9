"""`vlora-jax doctor`: what this machine has, what is missing, and the fix."""

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import jax
import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from vlora_jax.training.screens import plain_table

OPTIONAL = {
    "plan": "compiles for TPU topologies without a TPU",
    "minilm": "a small pretrained encoder that needs no download from a hub",
    "parity": "compares with torch and PEFT",
    "notebook": "TensorBoard, treescope and notebooks",
    "test": "runs the test suite",
}


def command() -> None:
    """Show versions, devices and memory; name what is missing and the fix. Exit code 1 if something has to be fixed."""
    table, problems = plain_table("vlora-jax doctor"), []
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    optional: dict[str, list[str]] = {}
    for text in requires("vlora_jax") or ():
        requirement = Requirement(text)
        name = "libtpu" if "tpu" in requirement.extras else requirement.name
        found = installed(name)
        extras = [extra for extra in OPTIONAL if requirement.marker and requirement.marker.evaluate({"extra": extra})]
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            for extra in extras:
                if found is None:
                    optional.setdefault(extra, []).append(name)
            continue
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        table.add_row(requirement.name, f"{found or 'missing'}{'' if fits else f'  (needs {requirement.specifier})'}")
        if not fits:
            problems.append(
                f"{requirement.name} {requirement.specifier}: pip install '{requirement.name}{requirement.specifier}'"
            )
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if stats else ""
        table.add_row(f"device {device.id}", f"{device.device_kind} ({device.platform}){memory}")
    table.add_row("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    table.add_row("memory", memory_line())
    free = shutil.disk_usage(Path.cwd()).free
    table.add_row("disk here", f"{free / 2**30:.1f} GiB free")
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    table.add_row("compile cache", cache or "in each run directory (set JAX_COMPILATION_CACHE_DIR to share one)")
    for extra, purpose in OPTIONAL.items():
        missing = optional.get(extra)
        state = f"not installed ({', '.join(missing)}): pip install 'vlora_jax[{extra}]'" if missing else "installed"
        table.add_row(f"extra {extra}", escape(f"{purpose}: {state}"))
    if not os.access(Path.cwd(), os.W_OK):
        problems.append(f"{Path.cwd()} cannot be written: give run_dir a directory that can")
    if free < 2**30:
        problems.append("less than 1 GiB of disk is free: checkpoints need room")
    if accelerator_without_plugin():
        problems.append("an NVIDIA GPU is here but JAX runs on CPU: pip install 'jax[cuda13]'")
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(f"to fix: {problem}", style="red", highlight=False, markup=False)
    if not problems:
        console.print("nothing to fix", style="green")
    raise typer.Exit(1 if problems else 0)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def accelerator_without_plugin() -> bool:
    """An NVIDIA driver is loaded, but JAX found no GPU."""
    return (
        Path("/proc/driver/nvidia/version").exists()
        and jax.default_backend() == "cpu"
        and "JAX_PLATFORMS" not in os.environ
    )


def memory_line() -> str:
    """Main memory, as far as this system tells."""
    if sys.platform != "linux":
        return "unknown on this system"
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return f"{pages * size / 2**30:.1f} GiB, {free * size / 2**30:.1f} GiB free"
