"""Several processes, one mask: parameters that are split among them (FSDP, ZeRO-3), made whole for a moment.

A mask follows from all scores of a matrix, and no process holds them between two forward passes. What needs them, which
is the schedule, the end of training and the penalty's value, goes through [`gathered`]. Every process holds the whole
mask, in bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def gathered(layers: Sequence[Any], frozen: bool = False) -> Iterator[Any]:
    """Yield layers one by one, each with whole parameters of full precision until the next one is asked for.

    Where nothing is sharded the layers are yielded as they are. Otherwise every process has to get here, and masks come
    out the same on all, because all see the same numbers.

    Args:
        layers: pruning layers.
        frozen (`bool`): whether frozen parameters, the base weights, are needed too.
    """
    if not _several_processes():
        yield from layers
        return
    for layer in layers:
        with _whole(layer, frozen):
            yield layer


@contextmanager
def all_gathered(layers: Sequence[Any]) -> Iterator[None]:
    """All layers whole at once, base weights too, for what compares weights of different ones."""
    with ExitStack() as stack:
        for layer in layers if _several_processes() else ():
            stack.enter_context(_whole(layer, True))
        yield


def agreed(choice: Any) -> Any:
    """What the first process chose, in all of them; every process has to get here."""
    if not _several_processes():
        return choice
    choices = [choice]
    torch.distributed.broadcast_object_list(choices)
    return choices[0]


_BEFORE = "Call it before the model is prepared for training, or on one that is loaded in one process."


def refuse_sharded(layers: Sequence[Any], what: str, fix: str = _BEFORE) -> None:
    """Raise `ValueError` if base weights are split among processes, where `what` needs them whole."""
    for layer in layers:
        weight = layer.weight
        if weight.dim() != 2 or hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
            raise ValueError(
                f"{what}: the weight of {layer.module_name!r} is split among processes (FSDP or ZeRO-3). {fix}"
            )


def unsplit(name: str, module: Any) -> Any:
    """A module that is yet to be pruned; raises `ValueError` if DeepSpeed has split it."""
    if hasattr(module.weight, "ds_id"):
        raise ValueError(
            f"The weight of {name!r} is already split among processes by DeepSpeed ZeRO-3, so it cannot be read. "
            "Load the model and call get_peft_model before TrainingArguments(deepspeed=...) is created."
        )
    return module


def without_shards(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """State of a final adapter without scores and updates: they are still there if they were split in training."""
    trained = (f".{prefix}scores", f".{prefix}update.")  # of low rank, too
    return {key: tensor for key, tensor in state.items() if not any(part in key for part in trained)}


_DATA_PARALLEL = (
    "torch.nn.DataParallel cannot be used with pruning adapters: it copies the model to all GPUs in each forward "
    "pass, and the copies share the state of the masks. Start one process per GPU: `torchrun --nproc_per_node N "
    "script.py` or `accelerate launch script.py`; Trainer does the rest. To use a single GPU, set "
    "CUDA_VISIBLE_DEVICES=0."
)


def refuse_data_parallel(model: Any = None, gpus: int = 1) -> None:
    """Raise `ValueError` if a model is, or holds, a `DataParallel`, or if `Trainer` will wrap it for several GPUs."""
    if gpus > 1 or (model is not None and any(isinstance(part, nn.DataParallel) for part in model.modules())):
        raise ValueError(_DATA_PARALLEL)


class NotReplicated:
    """A module of which `DataParallel` makes no copies."""

    def _replicate_for_data_parallel(self) -> Any:
        raise ValueError(_DATA_PARALLEL)


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_wrapping(model: nn.Module, layers: Sequence[Any]) -> None:
    """Raise `ValueError` if the model is split or copied in a way that cannot be pruned or saved."""
    refuse_data_parallel(model)
    if not _several_processes():
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            "The model is wrapped by FSDP version 1, from which PEFT saves adapters without any tensors. Use version "
            "2: fsdp_config={'version': 2} in TrainingArguments (the default), "
            "FullyShardedDataParallelPlugin(fsdp_version=2), or `fsdp_version: 2` in Accelerate's config."
        )
    if any(name.endswith("_checkpoint_wrapped_module") for name, _ in model.named_modules()):
        raise ValueError(
            "Activation checkpointing of FSDP renames modules, and PEFT then saves adapters without any tensors. Use "
            "TrainingArguments(gradient_checkpointing=True), or model.gradient_checkpointing_enable()."
        )
    for layer in layers:
        for name, part in layer.named_modules():
            if part is not layer and isinstance(part, FSDPModule):
                raise ValueError(
                    f"FSDP wraps {name!r} inside the pruned layer {layer.module_name!r} as a separate unit, so "
                    "weight and scores are never whole at the same time. Wrap whole blocks: "
                    "fsdp_config={'transformer_layer_cls_to_wrap': ['BertLayer']}, or your model's class of "
                    "blocks."
                )


@contextmanager
def _whole(layer: Any, frozen: bool) -> Iterator[None]:
    """Parameters of a layer as one process would have them."""
    places = [(module, key, p) for module in layer.modules() for key, p in module._parameters.items() if p is not None]
    wanted = [place for place in places if frozen or place[2].requires_grad]
    split = [place for place in wanted if hasattr(place[2], "full_tensor")]
    partitioned = [p for _, _, p in wanted if hasattr(p, "ds_id")]
    if not split and not partitioned:
        yield
        return
    _note_shards(layer)
    with _zero3(partitioned):
        layer.is_whole = True
        try:
            for module, key, p in split:
                whole = p.full_tensor().detach()  # type: ignore[operator]
                module._parameters[key] = nn.Parameter(whole, p.requires_grad)
            yield
        finally:
            layer.is_whole = False
            for module, key, p in split:
                module._parameters[key] = p


def _zero3(parameters: list[Any]) -> AbstractContextManager[Any]:
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _note_shards(layer: Any) -> None:
    """Remember which adapters have parameters that are not ours to delete."""
    layer.cached_weight.enabled = False  # a whole weight that stays is what sharding is there to avoid
    for name in layer.progress.keys():
        layer.host[name].sharded = True
