"""What an import has found: rows, notes, a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from peft import PeftModel
from peft.utils import get_peft_model_state_dict

from ..names import module_kind, one_line
from ..report.summary import common_prefix
from .mask_file import MaskFile
from .scan import Found
from .sources import Weights


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ImportedMatrix:
    """One pruned matrix.

    Attributes:
        name (`str`): name of the module in the base model.
        shape (`tuple[int, int]`): (out, in).
        kept (`int`): weights that are kept.
        pattern (`str`, *optional*): its n:m pattern, such as `"2:4"`; `None` if it has none.
        changed (`int`): kept weights that are not the base's. If there are any, all kept values are stored.
        difference (`float`): largest absolute difference of the merged matrix from the sparse model's.
    """

    name: str
    shape: tuple[int, int]
    kept: int
    pattern: Optional[str]
    changed: int
    difference: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of weights removed."""
        return 1.0 - self.kept / self.size

    @property
    def values(self) -> int:
        """Number of values stored."""
        return self.kept if self.changed else 0


@dataclass(frozen=True)
class ImportReport:
    """An adapter made of a sparse model, and what was found on the way.

    Attributes:
        model (`PeftModel`): the base model with the adapter.
        matrices (`list[ImportedMatrix]`): the pruned matrices.
        dense (`list[str]`): modules that could have been pruned and are the base's; the adapter leaves them out.
        value_dtype (`str`, *optional*): how values are stored; `None` if all kept weights are the base's.
        adapter_bytes (`int`): bytes of masks, values and modules stored in full.
        checkpoint_bytes (`int`): bytes of the sparse model, or of the mask file.
        notes (`list[str]`): what is worth knowing.
        warnings (`list[str]`): what may be a mistake.
    """

    model: PeftModel
    matrices: list[ImportedMatrix]
    dense: list[str]
    value_dtype: Optional[str]
    adapter_bytes: int
    checkpoint_bytes: int
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of weights removed from all pruned matrices together."""
        return 1.0 - sum(row.kept for row in self.matrices) / sum(row.size for row in self.matrices)

    @property
    def pattern(self) -> Optional[str]:
        """The n:m pattern that all matrices have, `None` if there is none."""
        patterns = {row.pattern for row in self.matrices}
        return patterns.pop() if len(patterns) == 1 else None

    @property
    def difference(self) -> float:
        """Largest absolute difference of a merged weight from the sparse model's."""
        return max(row.difference for row in self.matrices)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as JSON has it."""
        rows = [
            {"name": row.name, "shape": list(row.shape), "kept": row.kept, "sparsity": row.sparsity}
            | {"n:m": row.pattern, "changed": row.changed, "values": row.values, "difference": row.difference}
            for row in self.matrices
        ]
        return {
            "modules": len(self.matrices),
            "sparsity": self.sparsity,
            "n:m": self.pattern,
            "values": sum(row.values for row in self.matrices),
            "value_dtype": self.value_dtype,
            "difference": self.difference,
            "adapter_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "dense": self.dense,
            "notes": self.notes,
            "warnings": self.warnings,
            "matrices": rows,
        }

    def table(self) -> Table:
        """A row for each kind of matrix, and one for all, as a `rich` table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Imported masks")
        table.add_column("kind", overflow="fold")
        for heading in ("modules", "sparsity", "range", "n:m", "values stored", "difference"):
            table.add_column(heading, justify="right", no_wrap=True)
        kinds = {row.name: module_kind(row.name) for row in self.matrices}
        common = common_prefix(list(kinds.values()))
        for kind in dict.fromkeys(kinds.values()):
            group = [row for row in self.matrices if kinds[row.name] == kind]
            # as text, so that no markup is read out of a name
            table.add_row(Text(one_line(kind.removeprefix(common))), *_cells(group))
        table.add_section()
        table.add_row("all", *_cells(self.matrices), style="bold")
        return table


def _cells(rows: list[ImportedMatrix]) -> list[str]:
    weights, kept = sum(row.size for row in rows), sum(row.kept for row in rows)
    shares = [row.sparsity for row in rows]
    patterns = {row.pattern or "none" for row in rows}
    return [
        f"{len(rows)}",
        f"{1 - kept / weights:.4f}",
        f"{min(shares):.2f}–{max(shares):.2f}",
        patterns.pop() if len(patterns) == 1 else "mixed",
        f"{sum(row.values for row in rows):,}",
        f"{max(row.difference for row in rows):.3g}",
    ]


def make_report(
    model: PeftModel,
    rows: list[ImportedMatrix],
    found: Found,
    source: Weights | MaskFile,
    unplaced: list[str],
    adapter_name: str,
) -> ImportReport:
    """The report of an import that has succeeded."""
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    config: Any = model.peft_config[adapter_name]
    return ImportReport(
        model,
        rows,
        found.dense,
        config.value_dtype if any(row.changed for row in rows) else None,
        sum(tensor.nbytes for tensor in stored.values()),
        source.nbytes,
        _notes(rows, found, source.label, config.value_dtype),
        _warnings(rows, found, source.label, unplaced),
    )


def _notes(rows: list[ImportedMatrix], found: Found, label: str, value_dtype: str) -> list[str]:
    notes = []
    if found.dense:
        notes.append(f"{_some(found.dense)}: no new zeros, and the base's weights. The adapter leaves it out.")
    if found.rounded:
        notes.append(
            f"{_some(found.rounded)}: the base's weights up to rounding to the narrower of the two dtypes. The adapter "
            "keeps the base's."
        )
    if found.zeros_of_base:
        notes.append(f"The base itself has {found.zeros_of_base:,} zeros in the matrices that were compared.")
    lossy = [row for row in rows if row.changed and row.difference]
    if lossy:
        notes.append(
            f"{_some([row.name for row in lossy])}: differs from {label} by {max(row.difference for row in lossy):.3g} "
            f"at most, since values are rounded to {value_dtype} and to the base's dtype."
        )
    return notes


def _warnings(rows: list[ImportedMatrix], found: Found, label: str, unplaced: list[str]) -> list[str]:
    warnings = []
    if found.unlike:
        warnings.append(
            f"{_some(found.unlike)}: the weights of {label} have little in common with the base's. Was it made from "
            "another base model?"
        )
    if empty := [row.name for row in rows if not row.kept]:
        warnings.append(f"{_some(empty)}: all weights are zero in {label}. Was it saved completely?")
    if unplaced:
        warnings.append(
            f"{label} holds {unplaced[0]!r} ({len(unplaced)} such tensors), for which the base model has no "
            "place. They are not imported."
        )
    return warnings


def _some(names: list[str]) -> str:
    return repr(names[0]) + (f" ({len(names)} such matrices)" if len(names) > 1 else "")
