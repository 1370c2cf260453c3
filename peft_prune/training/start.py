"""A calibrated start in the middle of a `Trainer`: examples of its training data, before the first step."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..calibration.batches import first_examples
from ..stages.calibrate import calibrate
from ..stages.schedule import trained_adapters


logger = logging.getLogger(__name__)


def calibrate_on_training_data(model: nn.Module, dataloader: Any, args: Any, tell: bool = True) -> None:
    """Calibrate the start of each active adapter that waits for it; nothing happens if none does.

    Args:
        model (`nn.Module`): the model that is trained.
        dataloader (`DataLoader`): of the training data. It is not iterated itself, so training sees what it would have.
        args ([`~transformers.TrainingArguments`]): batch size, and the seed by which examples are chosen.
        tell (`bool`): whether to log what is done.
    """
    for name, layers in trained_adapters(model).items():
        if dataloader is None or not layers[0].waits_for_start(name):
            continue
        config = layers[0].config(name)
        if tell:
            logger.warning(
                f"The scores of adapter {name!r} start at score_init={config.score_init!r}: calibrating on up to "
                f"{config.num_samples} examples of the training data (num_samples). Call peft_prune.calibrate(model, "
                "batches) before training to choose others."
            )
        with _random_numbers_kept():
            calibrate(model, _examples(dataloader, config.num_samples, args), name)


def examples_for_stages(model: nn.Module, dataloader: Any, args: Any) -> Optional[list[Any]]:
    """Batches of training data for adapters that prune by what layers see, in the middle of training.

    Args:
        model, dataloader, args: see [`calibrate_on_training_data`].

    Returns:
        `list`, *optional*: as many examples as the adapters' `num_samples`; `None` if none of them needs any.
    """
    needing = [
        layers[0].config(name).num_samples
        for name, layers in trained_adapters(model).items()
        if layers[0].host[name].recipe.needs_activations
    ]
    if dataloader is None or not needing:
        return None
    with _random_numbers_kept():
        return first_examples(_examples(dataloader, max(needing), args), max(needing))


def _examples(dataloader: Any, number: int, args: Any) -> DataLoader:
    """Examples of a data loader's data: chosen at random, or the first ones of a stream; the same in all processes."""
    dataset = dataloader.dataset
    how = {"batch_size": args.per_device_train_batch_size, "collate_fn": dataloader.collate_fn}
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, **how)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
    return DataLoader(dataset, sampler=order[:number].tolist(), **how)


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Training goes on as if no random number had been drawn."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
