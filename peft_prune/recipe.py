"""What a method is: importance × rule × update × moment. Each config says its own with `recipe()`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .importance.base import Importance
    from .rules.base import Rule
    from .updates.base import Update


class Moment(str, Enum):
    """When a mask is chosen."""

    START = "when the adapter is made"
    EVERY_STEP = "every step of training"
    ONCE = "at some steps of training"
    CALIBRATION = "at calibration, without training"


@dataclass(frozen=True)
class Recipe:
    """The four parts of a method. Parts are independent: any importance goes with any update where it makes sense.

    Attributes:
        importance ([`Importance`]): what ranks units; may own trained scores.
        rule ([`Rule`]): how many units are kept, and which of them compete. update ([`Update`]): what happens to the
        kept weights; owns its tensors, its stored form and its merge. moment ([`Moment`]): when the mask is chosen.
    """

    importance: Importance
    rule: Rule
    update: Update
    moment: Moment

    @property
    def trained(self) -> bool:
        """Whether anything is trained: scores, or an update."""
        return bool(self.importance.tensors or self.update.tensors)

    @property
    def needs_weights(self) -> bool:
        """Whether the mask follows from the base weights, and not from trained scores alone."""
        return self.importance.needs_weights or self.rule.needs_weights

    @property
    def needs_activations(self) -> bool:
        """Whether calibration needs inputs: to choose, or for the weights that stay."""
        return self.importance.reads_activations or self.update.fits or self.rule.reads_activations

    @property
    def by_block(self) -> bool:
        """Whether calibration walks the model block by block, and a block sees what pruned ones put out."""
        return self.needs_activations and (self.update.fits or not self.rule.across_layers)

    @property
    def chosen_layer_by_layer(self) -> bool:
        """Whether a layer can find its mask by itself, again and again."""
        return self.moment in (Moment.START, Moment.EVERY_STEP)

    def describe(self) -> dict[str, str]:
        """The four parts in words, for tables: `importance`, `rule`, `update`, `moment`; and what is `stored`."""
        return {
            "importance": self.importance.label if self.rule.ranks else "–",
            "rule": self.rule.label,
            "update": self.update.label,
            "moment": self.moment.value,
            "stored": self.update.stores,
        }
