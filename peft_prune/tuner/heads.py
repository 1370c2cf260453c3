"""Granularity `"head"`: which rows or columns of a matrix are a head depends on the matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..selection.granularity import BlockGranularity
from ..structure.sites import HEADS, Site, find_sites


def head_granularity(model: nn.Module) -> dict[str, BlockGranularity]:
    """Block that is a head, for each projection: rows of queries, keys and values, columns of the output.

    Where heads share keys and values, the group of them is one block.

    Args:
        model (`nn.Module`): a model whose architecture is known.

    Returns:
        `dict[str, BlockGranularity]`: by module name. Fused projections, whose heads are no blocks, are left out.
    """
    blocks: dict[str, BlockGranularity] = {}
    for site in find_sites(model):
        if site.kind == HEADS:
            blocks |= _of_site(site)
    return blocks


def _of_site(site: Site) -> Mapping[str, BlockGranularity]:
    blocks = {site.output: BlockGranularity(0, site.width)}
    for name, rows in site.rows.items():
        height = rows.shape[1]
        if torch.equal(rows.flatten(), torch.arange(rows.numel())):  # consecutive
            blocks[name] = BlockGranularity(height, 0)
    return blocks
