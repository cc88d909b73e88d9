"""What `inspect` shows of a subject: its sheets, and its page."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import yaml

from vlora_jax.adapters.adapter import Adapter, count
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import BaseMismatchError, ConfigError, nearest
from vlora_jax.inspection.alignment import alignment_rows
from vlora_jax.inspection.intruders import intruder_rows
from vlora_jax.inspection.kinds import sheet
from vlora_jax.inspection.report.charts import Heat
from vlora_jax.inspection.report.page import Report
from vlora_jax.inspection.report.views import curves, heat_of, spectrum_charts
from vlora_jax.inspection.rounding import rounding_rows
from vlora_jax.inspection.sheets import FOUR, TWO, Sheet, compact, percent
from vlora_jax.inspection.similarity import drift_rows
from vlora_jax.inspection.spectra import Spectrum, adapter_spectra, vertical_spectra
from vlora_jax.inspection.tables import ChangeRow, adapter_rows, increment_rows, kernel_rows, parameter_rows
from vlora_jax.inspection.vectors import vector_rows
from vlora_jax.training.results import adapters_of
from vlora_jax.training.runs import whole_metrics
from vlora_jax.training.subjects import Subject

LINES = "Singular values of ΔW, one line a layer: the first ones faint, the last ones strong."
NEED_BASE = ("alignment", "intruders", "merge")
ALSO: dict[str, Callable[[Subject, Tree | None, Adapter, int], list[Any]]] = {
    "alignment": lambda subject, base, adapter, leading: alignment_rows(base, adapter, leading),
    "intruders": lambda subject, base, adapter, leading: intruder_rows(base, adapter),
    "merge": lambda subject, base, adapter, leading: rounding_rows(base, adapter),
    "vectors": lambda subject, base, adapter, leading: vector_rows(adapter),
    "drift": lambda subject, base, adapter, leading: drift(subject, base),
}


def known_tables(names: Sequence[str]) -> list[str]:
    """Further tables, each once.

    Raises:
      ConfigError: there is no such table.
    """
    unknown = next((name for name in names if name not in ALSO), None)
    if unknown is not None:
        raise ConfigError(f"there is no table {unknown!r}; nearest: {', '.join(nearest(unknown, ALSO))}")
    return list(dict.fromkeys(names))


def sheets_of(subject: Subject, layers: bool, further: Sequence[str], leading: int, first: bool = True) -> list[Sheet]:
    """The tables of a subject.

    Args:
      layers: a row for each layer.
      further: tables of `ALSO`.
      leading: how many directions count as leading ones.
      first: with changes and parameters.

    Raises:
      ConfigError: a further table is about adapters and there is none.
      BaseMismatchError: it needs the base, which was not found.
    """
    if further and not subject.adapters:
        raise ConfigError(f"{further[0]} is about adapters, and {subject.where} is a model")
    base, sheets = subject.dense_base if subject.adapters else subject.base, []
    if first:
        sheets += [
            sheet("changes", change_rows(subject, base, layers, leading), layers),
            sheet("parameters", [] if subject.adapters else parameter_rows(base)),
        ]
    for name in further:
        if base is None and name in NEED_BASE:
            raise BaseMismatchError(f"the table {name} needs the base: {subject.missing}")
        rows = [row for adapter in subject.adapters for row in ALSO[name](subject, base, adapter, leading)]
        sheets.append(sheet(name, rows))
    return sheets


def change_rows(subject: Subject, base: Tree | None, layers: bool, leading: int) -> list[ChangeRow]:
    """What is changed: by adapters, or by the increments of a vertical model."""
    if not subject.adapters:
        return increment_rows(subject.graphdef, subject.base, layers, leading)
    return [row for adapter in subject.adapters for row in adapter_rows(base, adapter, layers, leading)]


def drift(subject: Subject, base: Tree | None) -> list[Any]:
    """Rows over a run's checkpoints."""
    if subject.trained is None:
        raise ConfigError(f"drift is over the checkpoints of a run; {subject.where} is a {subject.kind}")
    return drift_rows(adapters_of(subject.trained), base)


def title_of(subject: Subject) -> str:
    """A subject in half a line."""
    if subject.trained is None:
        return f"{subject.where}: {subject.kind}"
    return f"{subject.where}: {'adapter' if subject.adapters else 'model'} at step {subject.trained.step}"


def notes_of(subject: Subject) -> list[str]:
    """What the reader must know."""
    notes = [f"‖ΔW‖/‖W‖ is unknown without the base: {subject.missing}"] if subject.missing else []
    gated = [each.method.name for each in subject.adapters if not each.method.mergeable]
    return notes + [f"{name} depends on the input: it has no ΔW to be measured" for name in gated]


def report_of(subject: Subject, sheets: Sequence[Sheet], everything: Sequence[Sheet]) -> Report:
    """A subject's page.

    Args:
      sheets: as they were asked for, for the tables.
      everything: with all of their rows, for the heat maps.

    Raises:
      CheckpointError: the run's metrics are damaged.
    """
    trained, base = subject.trained, subject.dense_base if subject.adapters else subject.base
    records = [] if trained is None else whole_metrics(trained.run)
    rows = [row for row in change_rows(subject, base, layers=True, leading=1) if row.rank is not None]
    spectra = spectra_of(subject, base)
    return Report(
        title=title_of(subject),
        lead=lead_of(subject),
        facts=facts_of(subject, rows),
        heats=heats_of(rows, everything) if rows or subject.adapters else heats_of_model(subject),
        charts=(("Training", "", tuple(curves(records))), ("Spectra", LINES, tuple(spectrum_charts(spectra)))),
        sheets=tuple(sheets),
        about=about_of(subject),
        config="" if trained is None else yaml.safe_dump(trained.config.plain(), sort_keys=False, allow_unicode=True),
    )


def spectra_of(subject: Subject, base: Tree | None) -> dict[str, Spectrum]:
    """Of all changes, by path."""
    if not subject.adapters:
        return vertical_spectra(subject.graphdef, base)
    return {path: found for each in subject.adapters for path, found in adapter_spectra(base, each).items()}


def heats_of(rows: Sequence[ChangeRow], sheets: Sequence[Sheet]) -> tuple[Heat, ...]:
    """How much is changed where and at what rank, and what further tables say of each layer."""
    size = heat_of("‖ΔW‖ / ‖W‖", rows, "relative") or heat_of("‖ΔW‖ (the base was not found)", rows, "norm")
    found = [size, heat_of("Effective rank of ΔW", rows, "rank", TWO)]
    wanted = {
        "alignment": (("input", "‖ΔW‖² in W's leading directions, input side", percent),
                      ("output", "‖ΔW‖² in W's leading directions, output side", percent)),
        "intruders": (("output", "Intruder dimensions, output side", compact),),
        "merge": (("unmoved", "Entries that a merge to bfloat16 does not move", percent),),
    }  # fmt: skip
    for each in sheets:
        found += [heat_of(title, each.rows, field, form) for field, title, form in wanted.get(each.key, ())]
    return tuple(heat for heat in found if heat is not None)


def heats_of_model(subject: Subject) -> tuple[Heat, ...]:
    """How large the kernels of a model are."""
    heat = heat_of("Root mean square of the kernels", kernel_rows(subject.dense_base), "rms")
    return () if heat is None else (heat,)


def lead_of(subject: Subject) -> str:
    """What a subject is, in a sentence."""
    model = subject.trained.model if subject.trained is not None else None
    parts = [f"{each.method.name}: {each.method.formula}" for each in subject.adapters]
    if model is not None:
        sharing = "" if model.vertical is None else ", vertical"
        parts.append(f"{model.family} of {model.layers} layers × {model.width}{sharing}")
    if subject.trained is not None and subject.trained.step:  # at step 0 it was trained elsewhere
        parts.append(f"trained on {subject.trained.config.data.name} for {subject.trained.step} steps")
    return "; ".join(parts) or "a model of transformers"


def facts_of(subject: Subject, rows: Sequence[ChangeRow]) -> tuple[tuple[str, str, str], ...]:
    """The figures to see first.

    Args:
      rows: of kernels whose change is known, a row for each layer.
    """
    whole = 0 if subject.base is None else count(subject.base)
    trained = sum(map(count, subject.adapters))
    share = f"{trained / whole:.2%} of the model's" if whole else ""
    facts = [("numbers trained", f"{trained:,}", share)] if subject.adapters else []
    facts += [("parameters", f"{whole:,}", "")] if whole else []
    most = max(rows, key=lambda row: row.relative or 0.0, default=None)
    if most is not None and most.relative is not None:
        layer = "" if most.layer is None else f", layer {most.layer}"
        facts.append(("largest ‖ΔW‖/‖W‖", FOUR(most.relative), f"{most.path}{layer}"))
    ranks = [row.rank.mean for row in rows if row.rank is not None]
    if ranks:
        directions = sum(row.directions or 0 for row in rows)
        facts.append(("mean effective rank", TWO(float(np.mean(ranks))), f"{min(ranks):.2f} to {max(ranks):.2f}"))
        facts.append(("dead directions", f"{sum(row.dead or 0 for row in rows):,}", f"of {directions:,}"))
    best = subject.trained.about.get("best") if subject.trained is not None else None
    if best:
        facts.append(("best held out", f"{best['accuracy']:.2%}", f"loss {best['loss']:.4f}, step {best['step']}"))
    return tuple(facts)


def about_of(subject: Subject) -> tuple[tuple[str, str], ...]:
    """Where it comes from."""
    saved = subject.trained.about if subject.trained is not None else subject.about
    pairs = {"looked at": subject.where, "kind": subject.kind, "base": subject.missing or saved.get("base") or "found"}
    prints = {f"{name} fingerprint": saved.get(f"{name}_fingerprint") for name in ("base", "data")}
    pairs |= {name: value for name, value in prints.items() if value}
    pairs |= {f"trained with {name}": version for name, version in (saved.get("versions") or {}).items()}
    if "progress" in saved:
        pairs["seconds"] = f"{saved['progress']['seconds']:.1f}"
    return tuple((name, str(value)) for name, value in (pairs | {"looked at with jax": jax.__version__}).items())
