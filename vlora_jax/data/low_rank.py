"""Low-rank matrix completion: some entries of a random matrix are seen, the others are held out.

The synthetic task of deep matrix completion, as in arXiv 2406.04112: a matrix of low rank, a uniformly random subset of
its entries, and the squared error of these; what is asked for is the error of the rest.
"""

from dataclasses import dataclass

import numpy as np

from vlora_jax.data.dataset import DataSet, Example, fingerprint
from vlora_jax.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix, of which those entries count that `mask` says; both `(rows, columns)`."""

    matrix: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, index: int) -> Example:
        row = np.int32(index)
        return {"tokens": row, "targets": self.matrix[index], "mask": self.mask[index], "id": row}


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
        train=Rows(matrix, seen),
        held_out=Rows(matrix, ~seen),
        fingerprint=fingerprint(matrix, seen),
        facts={"rows": rows, "columns": columns},
    )
