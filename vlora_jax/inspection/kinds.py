"""The kinds of sheets: for each kind of record a title, a legend and the columns that are shown."""

from dataclasses import dataclass
from typing import Any

from vlora_jax.inspection.sheets import FOUR, SIX, THREE, TWO, Column, Sheet, percent, shape, shapes, spread, thousands


@dataclass(frozen=True)
class Kind:
    """How records of one kind are shown."""

    title: str
    legend: str
    columns: tuple[Column, ...]


PATH, LAYER = Column("path", "path", numeric=False), Column("layer", "layer")
NUMBERS, NORM = Column("numbers", "numbers", thousands), Column("norm", "‖ΔW‖", FOUR)
KINDS = {
    "changes": Kind(
        "Changes",
        "Rank is the exponential of the entropy of ΔW's singular values (Roy and Vetterli 2007): 1 for one direction, "
        "r for r equal ones. Energy is the share of ‖ΔW‖² in the leading directions. Dead directions carry less than "
        "a thousandth of the strongest.",
        (
            PATH, LAYER, Column("shapes", "shapes", shapes, numeric=False), NUMBERS, NORM,
            Column("relative", "‖ΔW‖/‖W‖", FOUR), Column("rank", "rank (low–high)", spread),
            Column("energy", "energy", percent), Column("dead", "dead", thousands),
        ),
    ),
    "parameters": Kind(
        "Parameters",
        "Rms is the root mean square of the entries.",
        (
            PATH, Column("shape", "shape", shape, numeric=False), Column("dtype", "type", numeric=False), NUMBERS,
            Column("rms", "rms", FOUR),
        ),
    ),
    "alignment": Kind(
        "Alignment with the base",
        "Share of ‖ΔW‖² in W's leading singular subspaces, and that of a random direction; amplification is "
        "‖ΔW‖ / ‖Uᵀ W V‖ (arXiv 2106.09685, section 7.3).",
        (
            PATH, LAYER, Column("input", "input side", percent), Column("chance_input", "chance", percent),
            Column("output", "output side", percent), Column("chance_output", "chance", percent),
            Column("amplification", "amplification", TWO),
        ),
    ),
    "intruders": Kind(
        "Intruder dimensions",
        "Of the strongest singular vectors of W + ΔW, those that are like none of W's (arXiv 2410.21228).",
        (
            PATH, LAYER, Column("output", "output side"), Column("input", "input side"),
            Column("cosines", "cosines", lambda each: " ".join(f"{value:.2f}" for value in each), numeric=False),
        ),
    ),
    "merge": Kind(
        "What a merge loses",
        "What bfloat16 makes of ΔW when it is merged: its relative error, and the entries that do not move at all.",
        (PATH, LAYER, Column("lost", "lost", percent), Column("unmoved", "entries unmoved", percent)),
    ),
    "vectors": Kind(
        "Trained vectors",
        "Saturation is the share of a vector's entries that do the work: 1 if all are equally large.",
        (
            PATH, Column("name", "vector", numeric=False), LAYER, Column("size", "size", thousands),
            Column("rms", "rms", FOUR), Column("spread", "spread", TWO),
            Column("saturation", "saturation", percent), Column("small", "near zero", percent),
        ),
    ),
    "drift": Kind(
        "Drift over the checkpoints",
        "How each change came about: how far it moved since the checkpoint before, as a share of the last one's norm, "
        "and how like the last one it was already.",
        (
            PATH, Column("step", "step", thousands), NORM, Column("moved", "moved", percent),
            Column("cosine", "cosine to last", THREE), Column("output", "φ to last", THREE),
        ),
    ),
    "diff": Kind(
        "Changes beside each other",
        "Distance is ‖ΔW' - ΔW‖ / ‖ΔW‖; φ is the overlap of the subspaces on either side (arXiv 2106.09685, equation "
        "4), chance what independent ones have on average.",
        (
            PATH, LAYER, NORM, Column("other_norm", "‖ΔW'‖", FOUR), Column("distance", "distance", THREE),
            Column("cosine", "cosine", THREE), Column("input", "φ input", THREE),
            Column("chance_input", "chance", THREE), Column("output", "φ output", THREE),
            Column("chance_output", "chance", THREE),
        ),
    ),
    "parameter_diff": Kind(
        "Parameters beside each other",
        "Distance is ‖θ' - θ‖ / ‖θ‖.",
        (
            PATH, Column("shape", "shape", shape, numeric=False), Column("distance", "distance", FOUR),
            Column("cosine", "cosine", SIX),
        ),
    ),
}  # fmt: skip


def sheet(key: str, rows: list[Any], layers: bool = True) -> Sheet:
    """The sheet of some records.

    Args:
      key: of `KINDS`.
      layers: with a column of layers, where there is one.
    """
    kind = KINDS[key]
    columns = tuple(column for column in kind.columns if layers or column is not LAYER)
    return Sheet(key, kind.title, kind.legend, columns, rows, "numbers" if NUMBERS in columns else None)
