"""What a calibration is given: a model, the layers of one adapter in it, and what they are to be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import nn

from ..calibration.batches import first_examples
from ..calibration.observers import Observer
from ..calibration.walk import AS_IS, Manner, walk
from ..layers.layer import PruningLayer
from ..recipe import Recipe
from ..structure.sites import find_sites


@dataclass(frozen=True)
class CalibrationRun:
    """One call of [`calibrate`], as its stages see it.

    Attributes:
        model (`nn.Module`): the model.
        name (`str`): the adapter.
        layers (`Mapping[str, PruningLayer]`): its layers by their name in the model; at least one.
        decoders (`Mapping[str, bool]`): by the same names, whether a layer sees the decoder's tokens.
        batches (`Iterable`): batches of inputs; empty for methods that look at weights alone.
        device (*optional*): where blocks are run that are walked one by one, by default where they are.
    """

    model: nn.Module
    name: str
    layers: Mapping[str, PruningLayer]
    decoders: Mapping[str, bool]
    batches: Iterable[Any]
    device: Optional[torch.device | str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str,
        layers: list[PruningLayer],
        batches: Optional[Iterable[Any]],
        device: Optional[torch.device | str],
    ) -> CalibrationRun:
        """With the layers' names, and what they see: by anatomy, or by name where that is not known."""
        ours = set(map(id, layers))
        by_path = {path: module for path, module in model.named_modules() if id(module) in ours}
        try:
            known = {site.output: site.decoder for site in find_sites(model)}
        except ValueError:
            known = {}
        two_sides = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        decoders = {
            path: known.get(path, two_sides and "decoder" in layer.module_name.split("."))
            for path, layer in by_path.items()
        }
        return cls(model, name, by_path, decoders, batches if batches is not None else (), device)  # type: ignore[arg-type]

    @property
    def config(self) -> Any:
        """The adapter's config."""
        return next(iter(self.layers.values())).config(self.name)

    @property
    def recipe(self) -> Recipe:
        """The method."""
        return next(iter(self.layers.values())).host[self.name].recipe

    @property
    def watched(self) -> dict[str, tuple[PruningLayer, bool]]:
        """The layers as a walk wants them."""
        return {path: (layer, self.decoders[path]) for path, layer in self.layers.items()}

    def only(self, layers: Mapping[str, PruningLayer]) -> CalibrationRun:
        """The same, for some of the layers."""
        return replace(self, layers=layers)

    def with_first_examples(self) -> CalibrationRun:
        """The same, with as many examples as the config asks for, held so that they can be looked at again."""
        return replace(self, batches=first_examples(self.batches, self.config.num_samples))

    def walk(
        self,
        observer: Observer,
        after_block: Optional[Callable[[list[str]], Optional[float]]] = None,
        manner: Manner = AS_IS,
    ) -> None:
        """Have an observer see the layers, see [`walk`](peft_prune.calibration.walk.walk)."""
        samples = self.config.num_samples
        walk(self.model, self.watched, self.batches, observer, samples, after_block, self.device, manner)
