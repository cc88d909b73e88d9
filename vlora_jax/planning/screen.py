"""A plan as tables for people."""

from rich.console import Group, RenderableType
from rich.table import Table

from vlora_jax.distributed.chips import CHIPS, Topology
from vlora_jax.planning.plan import LASTING, Plan
from vlora_jax.training.screens import plain_table

GB = 10**9


def screen(plan: Plan, topology: Topology, title: str) -> RenderableType:
    """Memory, collectives and bounds of one chip."""
    table = plain_table(title)
    axes = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    cores = f", {plan.devices} devices" if plan.devices != plan.chips else ""
    table.add_row("topology", f"{plan.topology}: {plan.chips} chips{cores}; mesh {axes}")
    table.add_row("model", f"{plan.model}, {plan.parameters:,} parameters")
    if plan.changes:
        table.add_row("changed", ", ".join(plan.changes))
    if plan.analytic:
        table.add_row("how", "worked out by formulas: there is no compiler for GPUs here, temporaries are estimates")
    else:
        table.add_row(
            "how", f"by the TPU compiler, {duration(plan, 'compile')}; traced and lowered in {duration(plan, 'trace')}"
        )
    lasting = ", ".join(f"{name} {gigabytes(plan.memory[name])}" for name in LASTING)
    temporaries = f", temporaries {gigabytes(plan.memory['temporaries'])}" if "temporaries" in plan.memory else ""
    table.add_row("a chip holds", lasting + temporaries)
    table.add_row("peak", verdict(plan))
    table.add_row("products", f"{plan.flops:.3e} FLOPs a step, {plan.flops / plan.chips:.3e} a chip")
    parts: list[RenderableType] = [table]
    if plan.collectives:
        parts += ["", traffic_table(plan)]
    if plan.bounds is not None:
        parts += ["", bounds_table(plan, topology)]
    return Group(*parts)


def verdict(plan: Plan) -> str:
    """Whether it fits, in a line."""
    if plan.fits:
        assert plan.peak is not None
        return f"{gigabytes(plan.peak)} of {gigabytes(plan.hbm)} HBM ({plan.peak / plan.hbm:.0%}): fits"
    if plan.needed is None or plan.available is None:
        return f"does not fit into {gigabytes(plan.hbm)} of HBM"
    return f"at least {gigabytes(plan.needed)} needed, {gigabytes(plan.available)} there for programs: does not fit"


def traffic_table(plan: Plan) -> Table:
    """Collectives by kind."""
    table = Table(title="collectives of a step, one chip", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("kind", "times", "results", "to receive"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, each in plan.collectives.items():
        table.add_row(kind, f"{each['count']:,}", gigabytes(each["bytes"]), gigabytes(each["wire"]))
    return table


def bounds_table(plan: Plan, topology: Topology) -> Table:
    """Lower bounds of a step, and what follows."""
    limits, chip = plan.bounds, CHIPS[topology.chip.name]
    assert limits is not None
    table = plain_table("a step takes at least")
    table.add_row("compute", f"{limits.compute * 1e3:,.1f} ms at {chip.flops / 1e12:,.0f} TFLOP/s")
    table.add_row("memory", f"{limits.memory * 1e3:,.1f} ms at {chip.bandwidth / 1e9:,.0f} GB/s")
    table.add_row("network", f"{limits.network * 1e3:,.1f} ms at {chip.network / 1e9:,.0f} GB/s into a chip")
    each = limits.tokens / plan.chips
    table.add_row("ceiling", f"{limits.tokens:,.0f} {plan.unit}/s ({each:,.0f} a chip), {limits.by}-bound")
    table.add_row("figures", chip.source)
    return table


def duration(plan: Plan, stage: str) -> str:
    """Seconds by the clock and of CPU time, which a busy machine stretches less."""
    stages = ("trace", "lower") if stage == "trace" else (stage,)
    clock, processor = (sum(plan.seconds[each + part] for each in stages) for part in ("", "_cpu"))
    return f"{clock:.0f} s ({processor:.0f} s of CPU)"


def gigabytes(size: float) -> str:
    """Bytes as 10⁹; small ones as MB."""
    return f"{size / GB:,.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.1f} MB"
