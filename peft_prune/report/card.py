"""The model card of a saved adapter, with what it keeps and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..model_card import HEADING, is_as_saved, loading_instructions, put_block
from ..names import code
from .adapter_file import AdapterFile, read_adapter, size_of_masks
from .plots import density_figure
from .summary import by_kind


PICTURE = "density.png"


def density_markdown(adapter: AdapterFile) -> str:
    """Density by kind as a Markdown table."""
    lines = ["| kind | weights | kept | density | lowest | highest |", "|---|---:|---:|---:|---:|---:|"]
    for kind, size, kept, lowest, highest in by_kind(adapter.rows):
        lines.append(f"| {code(kind)} | {size:,} | {kept:,} | {kept / size:.4f} | {lowest:.4f} | {highest:.4f} |")
    return "\n".join(lines)


def write_model_card(
    folder: str, evaluation: Optional[Mapping[str, float]] = None, dataset: Optional[str] = None
) -> str:
    """Write README.md and a plot of the density into an adapter's folder.

    Only what stands between `<!-- peft_prune:begin -->` and `<!-- peft_prune:end -->` is replaced, and a README.md that
    is still PEFT's empty template. Otherwise your text and metadata are kept; without such comments the block is added.

    Args:
        folder (`str`): an adapter saved by `save_pretrained`.
        evaluation (`Mapping[str, float]`, *optional*): your results, such as `{"accuracy": 0.847}`.
        dataset (`str`, *optional*): Hub id of the data set that they were measured on.

    Returns:
        `str`: the path of README.md.
    """
    adapter = read_adapter(folder)
    path = Path(folder) / "README.md"
    data, text = ModelCardData(), ""
    if path.exists():
        old = ModelCard.load(path)
        data, text = old.data, old.text
    config = adapter.config
    data.library_name = "peft"
    data.tags = sorted({*(data.tags or []), "peft_prune", "pruning"})
    if config.base_model_name_or_path and not Path(config.base_model_name_or_path).exists():
        data.base_model = config.base_model_name_or_path
    if evaluation:
        data.model_name = data.model_name or Path(folder).resolve().name
        new = [
            EvalResult(
                task_type="text-classification" if config.task_type == "SEQ_CLS" else "other",
                dataset_type=dataset or "unknown",
                dataset_name=dataset or "unknown",
                metric_type=name,
                metric_value=value,
            )
            for name, value in evaluation.items()
        ]
        measured = {(result.dataset_name, result.metric_type) for result in new}
        others = [r for r in data.eval_results or [] if (r.dataset_name, r.metric_type) not in measured]
        data.eval_results = others + new
    if is_as_saved(text):
        text = f"# A mask adapter\n\n{HEADING}\n"
    text = put_block(text, _block(adapter, evaluation, dataset)).lstrip("\n")
    density_figure(adapter.rows).savefig(path.parent / PICTURE, dpi=150)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    card.save(path)
    return str(path)


def _block(adapter: AdapterFile, evaluation: Optional[Mapping[str, float]], dataset: Optional[str]) -> str:
    parts = [
        loading_instructions(adapter.config),
        "## What it keeps\n",
        density_markdown(adapter) + "\n",
        f"The masks take {size_of_masks(adapter)}. Modules trained in full take {adapter.other_bytes:,} bytes.\n",
        f"![Weights kept by block and kind]({PICTURE})\n",
    ]
    if evaluation:
        parts.append(f"## Evaluation\n\nAs given by the author{f', on {code(dataset)}' if dataset else ''}:\n")
        parts.append("\n".join(f"- {code(f'{name}: {value:g}')}" for name, value in evaluation.items()) + "\n")
    return "\n".join(parts)
