"""Layers that a block has shown already, when it is run again: what only they read is not recomputed.

The modules that make the units of an attention or feed-forward network, such as queries or gates, reach the rest of the
model through one layer only. Once that layer has been seen, it is given the input that it had, and they give zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..structure.sites import Site, linear_shape
from .calls import replaced_forwards


Feeders = Mapping[str, list[nn.Module]]  # by name of a layer: modules that nothing but this layer reads


def find_feeders(model: nn.Module, sites: Iterable[Site]) -> dict[str, list[nn.Module]]:
    """Modules that nothing but the output of a site reads, by its name: all their rows belong to its units."""
    sites = list(sites)
    users = Counter(name for site in sites for name in site.rows)
    return {
        site.output: [
            module
            for module, rows, name in ((model.get_submodule(name), rows, name) for name, rows in site.rows.items())
            if users[name] == 1 and rows.unique().numel() == linear_shape(module)[0]
        ]
        for site in sites
    }


class Replay:
    """What layers of one block were given, batch by batch, on the CPU.

    Args:
        layers (`Mapping[str, nn.Module]`): the block's layers that are seen one after the other.
        feeders (`Mapping`): see [`find_feeders`]; a layer that is not named is run as usual.
    """

    def __init__(self, layers: Mapping[str, nn.Module], feeders: Feeders) -> None:
        self.layers, self.feeders = layers, feeders
        self._given: dict[str, dict[int, list[torch.Tensor]]] = {}

    @contextmanager
    def run(self, batch: int, seeing: Iterable[str] = ()) -> Iterator[None]:
        """One run of the block: layers seen before get what they had, what others are given is noted.

        Args:
            batch (`int`): number of the batch.
            seeing (`Iterable[str]`): layers that are seen in this run.
        """
        with ExitStack() as stack:
            for key, given in self._given.items():
                if len(given.get(batch, ())) == 1:  # a layer that is called several times is run as usual
                    stack.callback(self.layers[key].register_forward_pre_hook(_giving(given[batch][0])).remove)
                    stack.enter_context(replaced_forwards({module: _zeros(module) for module in self.feeders[key]}))
            for key in self.feeders.keys() & set(seeing):
                noted = self._given.setdefault(key, {}).setdefault(batch, [])
                stack.callback(self.layers[key].register_forward_pre_hook(_noting(noted), prepend=True).remove)
            yield


def _giving(x: torch.Tensor) -> Any:
    return lambda module, args: (x.to(args[0].device), *args[1:])


def _noting(noted: list[torch.Tensor]) -> Any:
    def note(module: nn.Module, args: tuple) -> None:
        noted.append(args[0].detach().cpu())

    return note


def _zeros(module: nn.Module) -> Any:
    width = linear_shape(module)[0]
    return lambda x, *args, **kwargs: x.new_zeros(*x.shape[:-1], width)
