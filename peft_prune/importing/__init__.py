"""Sparse checkpoints and mask files that others have made, as mask adapters."""

from .build import import_sparse, mask_from_zeros
from .report import ImportedMatrix, ImportReport


__all__ = ["ImportReport", "ImportedMatrix", "import_sparse", "mask_from_zeros"]
