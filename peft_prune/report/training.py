"""A picture of a training: what the log says of loss, sparsity, penalty and densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


DENSITY = "density/"
Curve = tuple[list[int], list[float]]


def training_curves(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Steps and values of everything that was logged with the training loss, by its name in the log.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`, or that of a checkpoint's `trainer_state.json`.

    Returns:
        `dict[str, tuple[list[int], list[float]]]`: for instance of `"loss"`, `"sparsity"`, `"penalty"` and
        `"density/attention.self.query"`.

    Raises:
        ValueError: no entry holds a sparsity.
    """
    entries = [entry for entry in log_history if "sparsity" in entry]
    if not entries:
        raise ValueError(
            "log_history holds no sparsity. It must be trainer.state.log_history of a training with PruningTrainer "
            "or PruningCallback, which logged at least once: lower TrainingArguments.logging_steps."
        )
    curves: dict[str, Curve] = {}
    for entry in entries:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(entry["step"]))
                values.append(float(value))
    return curves


def plot_training(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, sparsity and penalty, and density of each kind of matrix, over the steps of a training.

    Args:
        log_history (`Sequence[Mapping]`): `trainer.state.log_history`.

    Returns:
        `matplotlib.figure.Figure`: three sets of axes above each other, and a fourth for the scale of the penalty.

    Raises:
        ValueError: no entry holds a sparsity.
    """
    from matplotlib.figure import Figure

    curves = training_curves(log_history)
    figure = Figure(figsize=(7, 7), layout="constrained")
    loss, sparsity, density = figure.subplots(3, sharex=True)
    if "loss" in curves:
        loss.plot(*curves["loss"], color="tab:grey")
    loss.set_ylabel("loss")
    lines = sparsity.plot(*curves["sparsity"], color="tab:blue", label="sparsity")
    sparsity.set_ylabel("sparsity")
    sparsity.set_ylim(0, 1)
    penalty = sparsity.twinx()
    if "penalty" in curves:
        lines += penalty.plot(*curves["penalty"], color="tab:orange", label="penalty")
    penalty.set_ylabel("penalty")
    sparsity.legend(handles=lines)
    for name, curve in curves.items():
        if name.startswith(DENSITY):
            density.plot(*curve, label=name.removeprefix(DENSITY))
    density.set_ylabel("density")
    density.set_xlabel("step")
    if density.lines:
        for text in density.legend(fontsize=7).get_texts():
            text.set_parse_math(False)  # a $ in a name is no formula
    return figure
