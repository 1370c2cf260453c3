"""What heads and neurons cost, and what a model costs with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from .anatomy import Anatomy
from .sites import HEADS, Site, find_sites, linear_shape


DEFAULT_LENGTH = 128
BUDGETS = ("flops", "parameters")


def unit_macs(model: nn.Module, site: Site, sequence_length: int) -> int:
    """Multiply-adds of one unit for one sequence (P-pruning, Wang et al. 2024, section 3.3).

    With `n` tokens, a head of width `d_h` costs `4·n·d·d_h + 2·n²·d_h`, a neuron `2·n·d`; groups of heads that share
    keys and values, gates and further projections are counted as what they are.

    Args:
        model (`nn.Module`): the model that `site` belongs to.
        site ([`Site`]): where the unit is.
        sequence_length (`int`): tokens of a sequence.
    """
    modules = dict(model.named_modules())
    out, _ = linear_shape(modules[site.output])
    weights = out * site.width
    for name, rows in site.rows.items():
        weights += linear_shape(modules[name])[1] * rows.shape[1]
    macs = sequence_length * weights
    if site.kind == HEADS:
        macs += 2 * sequence_length**2 * site.width
    return macs * site.repeats


def unit_parameters(model: nn.Module, site: Site) -> int:
    """Numbers in the parameters of one unit: its columns and rows, and the biases of these."""
    modules = dict(model.named_modules())
    count = linear_shape(modules[site.output])[0] * site.width
    for name, rows in site.rows.items():
        bias = getattr(modules[name], "bias", None) is not None
        count += (linear_shape(modules[name])[1] + bias) * rows.shape[1]
    return count


def unit_cost(model: nn.Module, site: Site, budget: str, sequence_length: int) -> int:
    """What one unit costs: [`unit_macs`] for the budget `"flops"`, [`unit_parameters`] for `"parameters"`."""
    return unit_macs(model, site, sequence_length) if budget == "flops" else unit_parameters(model, site)


def sites_macs(model: nn.Module, sites: Sequence[Site], sequence_length: int) -> int:
    """Multiply-adds of all attentions and feed-forward networks for one sequence."""
    return sum(site.units * unit_macs(model, site, sequence_length) for site in sites)


@dataclass(frozen=True)
class ModelSize:
    """Size and cost of a model.

    Attributes:
        parameters (`int`): numbers in all parameters, those that are shared once.
        bytes (`int`): bytes of all parameters.
        macs (`int`): multiply-adds of all attentions and feed-forward networks for one sequence; embeddings, norms and
            the head are not counted.
        sequence_length (`int`): tokens of that sequence.
        heads, neurons (`int`): units that are left; a group of heads that share keys and values counts once.
    """

    parameters: int
    bytes: int
    macs: int
    sequence_length: int
    heads: int
    neurons: int


def model_size(model: nn.Module, sequence_length: int = DEFAULT_LENGTH, anatomy: Optional[Anatomy] = None) -> ModelSize:
    """Size and cost of a model as it stands: of a masked model those of the dense one, of a compact one its own.

    Args:
        model (`nn.Module`): a Transformers model.
        sequence_length (`int`): tokens of a sequence.
        anatomy (`tuple[Block, ...]`, *optional*): by default what is registered for the architecture.

    Raises:
        ValueError: the architecture is not known.
    """
    sites = find_sites(model, anatomy)
    holders = [getattr(m, name) for m in model.modules() for name in getattr(m, "adapter_layer_names", ())]
    adapters = {id(p) for holder in holders for p in holder.parameters()}  # PEFT's word for what adapters hold
    parameters: list[torch.Tensor] = [p for p in model.parameters() if id(p) not in adapters]
    return ModelSize(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        macs=sites_macs(model, sites, sequence_length),
        sequence_length=sequence_length,
        heads=sum(site.units for site in sites if site.kind == HEADS),
        neurons=sum(site.units for site in sites if site.kind != HEADS),
    )
