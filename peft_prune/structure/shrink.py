"""Taking heads and neurons out of a model: smaller matrices, the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .anatomy import Anatomy
from .depth import find_stack, has_stack, remove_blocks
from .record import FIELD, change_config, write_record
from .sites import HEADS, Site, find_sites, linear_matrix


# What attentions call the number of their heads, and the width of all of them together.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim")


def removable_units(
    model: nn.Module, site: Site, matrix_of: Callable[[nn.Module], torch.Tensor] = linear_matrix
) -> torch.Tensor:
    """Units that contribute exactly nothing.

    A unit is idle when all its columns of the output projection are zero, or when a head's rows of the values are,
    their bias included.

    Args:
        model (`nn.Module`): a model without tuner layers, unless `matrix_of` sees through them.
        site ([`Site`]): where to look.
        matrix_of (`Callable`): the weight (out, in) that a linear layer computes with.

    Returns:
        `torch.Tensor`: bool, shape (units,), on the CPU.
    """
    modules = dict(model.named_modules())
    columns = matrix_of(modules[site.output])[:, site.columns.flatten()] != 0
    idle = ~columns.any(0).view(site.units, -1).any(1)
    if site.kind == HEADS and site.attention is not None and not site.attention.fused:
        name = site.output.removesuffix(site.attention.output) + site.attention.value
        values = modules[name]
        active = (matrix_of(values) != 0).any(1)
        if values.bias is not None:
            active |= cast(torch.Tensor, values.bias) != 0
        idle |= ~active[site.rows[name].to(active.device)].any(1)
    return idle.cpu()


def shrink(model: nn.Module, anatomy: Optional[Anatomy] = None) -> nn.Module:
    """Take out, in place, every head and neuron that contributes nothing; what the model computes stays the same.

    A block in which no unit is left is removed as a whole where that changes nothing: in models with one stack of
    blocks and their norms before attention and feed-forward, except the first block. Otherwise a layer that would lose
    all its heads or neurons keeps the first one, whose output is zero. What was removed is recorded in the model's
    config, so that [`save_compact`] and [`load_compact`] work.

    Args:
        model (`nn.Module`): a model without tuner layers, such as `merge_and_unload()` returns.
        anatomy (`tuple[Block, ...]`, *optional*): where heads and neurons live, by default what is registered for
            `model.config.model_type`.

    Returns:
        `nn.Module`: the same model.

    Raises:
        ValueError: the architecture is not known.
    """
    sites = find_sites(model, anatomy)
    kept = {site.output: (~removable_units(model, site)).nonzero().flatten() for site in sites}
    empty: list[str] = []
    if has_stack(model, anatomy):
        blocks = find_stack(model, anatomy).blocks[1:]
        empty = [name for name in blocks if not any(len(kept[s.output]) for s in sites if s.block == name)]
    gone = {site.output for site in sites if site.block in empty}
    keep_units(model, {name: units for name, units in kept.items() if name not in gone}, anatomy)
    return remove_blocks(model, empty, anatomy) if empty else model


def keep_units(model: nn.Module, kept: Mapping[str, torch.Tensor], anatomy: Optional[Anatomy] = None) -> nn.Module:
    """Take out, in place, all units but some.

    Args:
        model (`nn.Module`): a model without tuner layers.
        kept (`Mapping[str, torch.Tensor]`): for each [`Site`] by the name of its output, which units stay: int64, one
            dimension, ascending. Of a site that would lose all, the first stays, with its columns set to zero.
        anatomy (`tuple[Block, ...]`, *optional*): by default what is registered for the architecture.

    Raises:
        ValueError: a name is not that of a site, or a unit is not there.
    """
    sites = {site.output: site for site in find_sites(model, anatomy)}
    for name, units in kept.items():
        if name not in sites:
            raise ValueError(f"kept: {name!r} is no output of heads or neurons. There are {list(sites)[:2]} and so on.")
        if len(units) and not 0 <= int(units.min()) <= int(units.max()) < sites[name].units:
            raise ValueError(f"kept: units of {name!r} must lie between 0 and {sites[name].units - 1}.")
    shared_bias = any(
        site.attention is not None and site.attention.position_bias == "shared" and len(kept[name]) < site.units
        for name, site in sites.items()
        if name in kept
    )
    if shared_bias:
        _unshare_position_bias(model, [site for site in sites.values() if site.kind == HEADS])
    record = dict(getattr(getattr(model, "config", None), FIELD, None) or {})
    for name, units in kept.items():
        if len(units) < sites[name].units:
            left = _remove(model, sites[name], units.cpu())
            key = sites[name].key
            record[key] = write_record(record.get(key), left, sites[name].units)
    if record:
        change_config(model, **{FIELD: record})
    return model


def _remove(model: nn.Module, site: Site, units: torch.Tensor) -> torch.Tensor:
    output = model.get_submodule(site.output)
    if not len(units):
        units = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            linear_matrix(output)[:, site.columns[0]] = 0
    for name, rows in site.rows.items():
        _take(model.get_submodule(name), 0, rows[units].flatten().sort().values)
    _take(output, 1, site.columns[units].flatten())
    if site.attention is not None:
        _resize_attention(model.get_submodule(site.module), site, units)
    return units


def _take(module: nn.Module, dim: int, index: torch.Tensor) -> None:
    """Keep some rows (`dim` 0) or columns (1) of a linear layer, with the bias of the rows."""
    old = cast(nn.Parameter, module.weight)
    index = index.to(old.device)
    # contiguous, since safetensors stores nothing else
    weight = old.detach().index_select(1 - dim if isinstance(module, Conv1D) else dim, index).contiguous()
    module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    if dim == 0 and module.bias is not None:
        bias = cast(nn.Parameter, module.bias)
        module.bias = nn.Parameter(bias.detach()[index].clone(), requires_grad=bias.requires_grad)
    rows, columns = linear_matrix(module).shape
    names = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
    for name, size in zip(names, (rows, columns), strict=True):
        setattr(module, name, size)


def _resize_attention(attention: nn.Module, site: Site, units: torch.Tensor) -> None:
    share = len(units) / site.units
    for name in (*_COUNTS, *_WIDTHS):
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, round(getattr(attention, name) * share))
    entry = site.attention
    if entry is not None and entry.position_bias:
        if entry.position_bias == "given":
            _select_heads(attention, units)
        elif getattr(attention, "has_relative_attention_bias", False):
            _take_bias_columns(attention, units)


def _select_heads(attention: nn.Module, units: torch.Tensor) -> None:
    if hasattr(attention, "kept_heads"):  # shrunk before, and hooked
        units = cast(torch.Tensor, attention.kept_heads)[units]
    else:
        attention.register_forward_pre_hook(_select_position_bias, with_kwargs=True)
    # persistent: Transformers fills buffers that are not stored with whatever is in memory
    attention.register_buffer("kept_heads", units.clone())


def _select_position_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hand an attention the position bias of its own heads."""
    heads = cast(torch.Tensor, module.kept_heads)
    if kwargs.get("position_bias") is not None:
        kwargs = kwargs | {"position_bias": kwargs["position_bias"][:, heads]}
    elif len(args) > 2 and args[2] is not None:
        args = (*args[:2], args[2][:, heads], *args[3:])
    return args, kwargs


def _drop_position_bias(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Have an attention compute its own bias, that of other layers being for other heads."""
    return args, kwargs | {"position_bias": None}


def _unshare_position_bias(model: nn.Module, sites: list[Site]) -> None:
    """Give each attention of a stack a copy of the table that the first one computes the bias from (T5)."""
    for group in {(site.decoder, site.attention): None for site in sites}:
        members: list[Any] = [model.get_submodule(s.module) for s in sites if (s.decoder, s.attention) == group]
        table = next((m.relative_attention_bias for m in members if hasattr(m, "relative_attention_bias")), None)
        for attention in members:
            if getattr(attention, "computes_own_bias", False):
                continue
            attention.computes_own_bias = True
            attention.register_forward_pre_hook(_drop_position_bias, with_kwargs=True)
            if table is not None and not hasattr(attention, "relative_attention_bias"):
                weight, frozen = table.weight.detach().clone(), not table.weight.requires_grad
                attention.relative_attention_bias = nn.Embedding.from_pretrained(weight, freeze=frozen)
                attention.has_relative_attention_bias = True


def _take_bias_columns(attention: nn.Module, units: torch.Tensor) -> None:
    table = cast(nn.Embedding, attention.relative_attention_bias)
    old = table.weight
    weight = old.detach()[:, units.to(old.device)].contiguous()
    table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    table.embedding_dim = len(units)
