"""Low-rank matrix completion: some entries of a random matrix are seen, the others are held out.

The synthetic task of deep matrix completion, as in arXiv 2406.04112: a matrix of low rank, a uniformly random subset of
its entries, and the squared error of these; what is asked for is the error of the rest.
"""

from dataclasses import dataclass

import numpy as np

from vlora_jax.data.dataset import DataSet, Example, fingerprint
from vlora_jax.errors import DataError


@dataclass(frozen=True)
class Entries:
    """A matrix as the only example there is, of which those entries count that `mask` says; both `(rows, columns)`."""

    matrix: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        rows = np.arange(len(self.matrix), dtype=np.int32)
        return {"tokens": rows, "targets": self.matrix, "mask": self.mask, "id": np.int32(index)}


def load(rows: int, columns: int, rank: int, observed: float, seed: int) -> DataSet:
    """A product of two normal matrices, with entries of mean square 1, so that a loss is a share of the whole.

    Args:
      observed: share of the entries to learn from, each drawn by itself.
      seed: of the matrix and of what is seen of it.

    Raises:
      DataError: the rank is above the smaller side, or no entry is seen or none held out.
    """
    if rank > min(rows, columns):
        raise DataError(f"data.rank {rank} is above the smaller side of a {rows} × {columns} matrix")
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    matrix = (matrix / np.sqrt((matrix**2).mean())).astype(np.float32)
    seen = rng.uniform(size=matrix.shape) < observed
    if seen.all() or not seen.any():
        raise DataError(f"data.observed {observed} of {matrix.size} entries leaves none to learn from or to hold out")
    return DataSet(
        name=f"a {rows} × {columns} matrix of rank {rank}",
        task="matrix_completion",
        train=Entries(matrix, seen),
        held_out=Entries(matrix, ~seen),
        fingerprint=fingerprint(matrix, seen),
        facts={"rows": rows, "columns": columns},
    )
