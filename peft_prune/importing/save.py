"""An imported adapter as a folder, which says where it comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Optional

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..names import code
from ..report.adapter_file import read_adapter
from ..report.export import check_folder
from .report import ImportReport


HEADING = "## Where the masks come from"
_SECTION = re.compile(rf"\n*^{HEADING}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def check_out(out: Optional[str], sources: list[str]) -> None:
    """Raise `ValueError` if a folder cannot be written without harm to what is read; nothing to check for `None`."""
    if out is not None:
        check_folder(out, [str(Path(source).parent) if Path(source).is_file() else source for source in sources])


def save_imported(report: ImportReport, source: str, out: str) -> int:
    """Save an adapter, read it again, and name its source in its README.md.

    Args:
        report ([`ImportReport`]): what [`import_sparse`] returned.
        source (`str`): folder, file or Hub id of the sparse model.
        out (`str`): folder to write.

    Returns:
        `int`: bytes of the adapter's tensors, as a file.

    Raises:
        MaskFormatError: what was written cannot be read, for instance because the disk is full.
    """
    report.model.save_pretrained(out)
    read_adapter(out)
    path = Path(out) / "README.md"
    card = ModelCard.load(path)
    how = "equal its own" if not report.difference else f"differ from its own by {report.difference:.3g} at most"
    text = f"Imported from {code(source)} by `peft-prune import`; when merged, the pruned matrices {how}."
    card.text = f"{_SECTION.sub('', card.text).rstrip()}\n\n{HEADING}\n\n{text}\n"
    card.save(path)
    return (Path(out) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
