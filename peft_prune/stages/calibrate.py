"""Calibration: a look at inputs, and the masks are there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from ..calibration.checks import check_device
from ..layers.layer import PruningLayer, pruning_layers
from ..layers.sharding import refuse_data_parallel, refuse_sharded
from ..recipe import Moment, Recipe
from .across_layers import choose_across_layers, set_all
from .calibration_run import CalibrationRun
from .finalize import switch_over, tell_sparsity
from .layer_by_layer import choose_layer_by_layer
from .own_config import own_config
from .sparsity_by_outliers import allot_by_outliers
from .start import adapters_that_wait, calibrate_start
from .taken_back import taken_back_on_error


def calibrate(
    model: nn.Module,
    batches: Optional[Iterable[Any]] = None,
    adapter_name: Optional[str] = None,
    device: Optional[torch.device | str] = None,
    dataloader: Optional[Iterable[Any]] = None,
) -> dict[str, float]:
    """Choose what stays by what comes into the layers, and make the masks final.

    Of a trained method with a calibrated start, such as `SMPConfig(score_init="wanda")`, it fills the scores, and
    training follows.

    Runs the model on `config.num_samples` examples. Methods that choose layer by layer are walked block by block: a
    block sees what the pruned blocks before it put out, and memory is that of the model, of one block, and of the
    examples' hidden states (`docs/calibration.md`). If it is interrupted, nothing is pruned. Adapters of other kinds
    stay in force meanwhile. Of several processes, all have to call it, and all get the choice of the first. Progress
    bars show how far it is; `transformers.utils.logging.disable_progress_bar()` switches them off.

    Args:
        model (`nn.Module`): any model with an adapter of a calibrated method, or with a calibrated start, that is not
            calibrated yet.
        batches (`Iterable`, *optional*): batches as the model takes them, mappings of tensors, for instance a
            `DataLoader`; labels are not needed. May be left out for methods that look at weights alone, such as
            `PPruningConfig(criterion="magnitude")`.
        adapter_name (`str`, *optional*): adapter to calibrate, by default the one that is not calibrated.
        device (*optional*): where blocks are run, one at a time, such as `"cuda"`; by default where they are. For
            methods that choose layer by layer.
        dataloader (`Iterable`, *optional*): deprecated name of `batches`.

    Returns:
        `dict[str, float]`: for P-pruning the shares that stay, `flops`, `heads` and `neurons`; for others `sparsity`,
            for a start that which training begins with. Of methods that note Gram matrices also `loss`, the mean over
            all layers of `‖(Ŵ − W)Xᵀ‖² / ‖WXᵀ‖²`.

    Raises:
        ValueError: no adapter waits for calibration, there is no data or it does not fit the model, the model is
            wrapped by `DataParallel`, the device is not there, or the budget cannot be met. The adapter is as it was
            then.
    """
    if dataloader is not None:
        warnings.warn("calibrate: dataloader= is called batches= now.", FutureWarning, stacklevel=2)
        batches = dataloader
    refuse_data_parallel(model)
    name, layers = _uncalibrated(model, adapter_name)
    recipe, config = layers[0].host[name].recipe, layers[0].config(name)
    if any(layer.merged for layer in layers):
        raise ValueError("calibrate: adapters are merged. Call model.unmerge_adapter() first.")
    if isinstance(batches, Mapping):  # iterated, it gives the names of its entries
        raise ValueError(
            f"calibrate: batches is a single batch with the entries {list(batches)}. Pass a list of batches: "
            "calibrate(model, [batch])."
        )
    starts = recipe.importance.calibrated_start is not None
    if (recipe.needs_activations or starts) and batches is None:
        raise ValueError("calibrate(model, batches): this method needs batches of the task's inputs.")
    refuse_sharded(layers, "calibrate")
    if device is not None:
        _check_device(device, recipe)
    run = CalibrationRun.of(model, name, layers, batches, device)
    if starts:
        _check_active(run)
        return calibrate_start(run)
    with taken_back_on_error(name, layers):
        losses = _choose(run)
        shares = recipe.rule.shares(model, name, layers)
        forms = [layer.final_form(name) for layer in layers]
    config = own_config(model, name)
    tell_sparsity(name, layers, config)
    switch_over(name, layers, config, forms)
    return shares | ({"loss": sum(losses.values()) / len(losses)} if losses else {})


def _choose(run: CalibrationRun) -> dict[str, float]:
    """Put masks in force, of all layers at once or block by block; return the layers' losses, where they are known."""
    recipe, layers = run.recipe, list(run.layers.values())
    for layer in layers:  # dense, whatever was in force before
        layer.start_bits(run.name, torch.ones(layer.shape, dtype=torch.bool))
    if not recipe.needs_activations:
        set_all(run.name, layers, recipe.rule.choose_all(run.model, run.name, layers, None))
        return {}
    if recipe.by_block:
        _check_active(run)
    if recipe.rule.by_outliers:
        run = run.with_first_examples()
        allot_by_outliers(run)
    return choose_across_layers(run) if recipe.rule.across_layers else choose_layer_by_layer(run)


def _check_active(run: CalibrationRun) -> None:
    if any(run.name not in layer.active_adapters for layer in run.layers.values()):
        raise ValueError(
            f"calibrate: adapter {run.name!r} is not active, and blocks are calibrated behind pruned ones. Call "
            f"model.set_adapter({run.name!r}) first."
        )


def _check_device(device: torch.device | str, recipe: Recipe) -> None:
    starts = recipe.importance.calibrated_start is not None
    if not (starts or recipe.by_block or recipe.importance.by_block):
        raise ValueError(
            f"calibrate: device={device!r} is for methods that are calibrated block by block. This one runs "
            f"the whole model: move it there, model.to({str(device)!r}), and leave device out."
        )
    check_device(device)


def _uncalibrated(model: nn.Module, adapter_name: Optional[str]) -> tuple[str, list[PruningLayer]]:
    waiting = adapters_that_wait(model)
    done: set[str] = set()
    for layer in pruning_layers(model):
        for name, host in layer.host.items():
            if host.recipe.moment is Moment.CALIBRATION:
                if host.config.finalized:
                    done.add(name)
                else:
                    waiting.setdefault(name, []).append(layer)
            elif host.recipe.importance.calibrated_start and name not in waiting:
                done.add(name)
    if adapter_name is None and len(waiting) == 1:
        adapter_name = next(iter(waiting))
    if adapter_name not in waiting:
        raise ValueError(_why_none(adapter_name, list(waiting), sorted(done)))
    return adapter_name, waiting[adapter_name]


def _why_none(asked: Optional[str], waiting: list[str], done: list[str]) -> str:
    if asked in done:
        return f"calibrate: adapter {asked!r} is calibrated already. To choose again, add another adapter."
    if not (waiting or done):
        return (
            "calibrate: this model has no adapter of a calibrated method, such as P-pruning, or with a calibrated "
            "start. Add one: get_peft_model(model, PPruningConfig(keep_ratio=0.5))."
        )
    if asked is not None:
        return f"calibrate: adapter_name={asked!r} is no adapter to calibrate in this model. It has {waiting + done}."
    if waiting:
        return f"calibrate: several adapters wait for calibration, {waiting}. Say which one by adapter_name."
    return f"calibrate: {done} is calibrated already. To choose again, add another adapter."
