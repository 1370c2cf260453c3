"""What form each layer was given, as rows and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerForm:
    """A layer: its name, (out, in) shape, share of weights that are not 0, form, time of dense over the form's."""

    name: str
    shape: tuple[int, ...]
    density: float
    form: str
    speed_up: float


class SparseReport(list[LayerForm]):
    """What [`use_sparse_kernels`] did: a list of [`LayerForm`]."""

    @property
    def sparse(self) -> list[LayerForm]:
        """Layers that are no longer dense."""
        return [row for row in self if row.form != "dense"]

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for row in self:
            counts[row.form] = counts.get(row.form, 0) + 1
        return ", ".join(f"{form}: {n}" for form, n in sorted(counts.items())) or "no linear layers"

    def table(self) -> Table:
        """A `rich` table; needs `pip install 'peft_prune[report]'`."""
        from rich.table import Table

        table = Table(title="Forms of linear layers")
        table.add_column("layer", no_wrap=True)
        for heading in ("shape", "density", "form", "speed-up"):
            table.add_column(heading, justify="right")
        for row in self:
            shape = f"{row.shape[0]} × {row.shape[1]}"
            table.add_row(row.name, shape, f"{row.density:.4f}", row.form, f"{row.speed_up:.2f}")
        return table
