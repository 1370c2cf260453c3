"""A mask adapter out of a sparse model: matrix by matrix, and each compared with the sparse model afterwards."""

from __future__ import annotations

import warnings
from typing import Any, Optional

from peft import PeftModel

from ..config_checks import check_choice
from ..layers.layer import pruning_layers
from ..storage.values import VALUE_DTYPES
from ..tuner.adapter_names import check_adapter_name
from .adapter import config_of, make_adapter
from .base import find_matrices, load_base
from .mask_file import MaskFile
from .names import Names
from .report import ImportedMatrix, ImportReport, make_report
from .rest_of_model import check_others, check_saved, check_structure, copy_saved
from .scan import Found, check_sparse, look_at, named_by, own_dtype
from .sources import Weights, open_source
from .verify import verify


def mask_from_zeros(
    base: Any,
    sparse_model: Any,
    target_modules: Optional[list[str] | str] = None,
    modules_to_save: Optional[list[str]] = None,
    value_dtype: Optional[str] = None,
    task_type: Optional[str] = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Turn a sparse model into a mask adapter: checkpoints of Wanda or SparseGPT, MaskLLM's mask files, any model with
    zeros.

    Weights that are zero in the sparse model are removed. If all kept weights of a matrix equal the base's, only its
    mask is stored, otherwise its kept values, too. Everything else must equal the base. Each merged matrix is then
    compared with the sparse model.

    A sparse model given as a path is read one tensor at a time.

    Args:
        base (`PreTrainedModel` or `str`): the dense model that the sparse one was made from, as a model, which becomes
            part of the result, or as a folder or Hub id.
        sparse_model (`nn.Module` or `str`): the sparse model, or a folder, file or Hub id of it, or of a mask file
            (`.npz`): an array for each parameter, as bits packed by `numpy.packbits`, or of its shape.
        target_modules (`Union[list[str], str]`, *optional*): modules that may have been pruned, as in
            [`PruningConfig`]; by default the linear layers inside the numbered blocks. A mask file names them itself.
        modules_to_save (`list[str]`, *optional*): modules that differ from the base's and are stored in full, such as
            a classifier.
        value_dtype (`str`, *optional*): how values are stored, `"float32"`, `"float16"`, `"bfloat16"` or `"int8"`; by
            default as in the sparse model, which is exact.
        task_type (`str`, *optional*): as in PEFT's configs; by default from the class of a language model.
        adapter_name (`str`): name of the adapter.

    Returns:
        `PeftModel`: the base model with the adapter, which is final: `save_pretrained` and `merge_and_unload` work.

    Raises:
        ValueError: the two do not belong together, or something differs that an adapter cannot hold. The message names
            the tensor; the base model is unchanged.
        MaskFormatError: a mask file is damaged, or was made for another model.
    """
    report = import_sparse(base, sparse_model, target_modules, modules_to_save, value_dtype, task_type, adapter_name)
    for text in report.warnings:
        warnings.warn(f"mask_from_zeros: {text}", UserWarning, stacklevel=2)
    return report.model


def import_sparse(
    base: Any,
    sparse_model: Any,
    target_modules: Optional[list[str] | str] = None,
    modules_to_save: Optional[list[str]] = None,
    value_dtype: Optional[str] = None,
    task_type: Optional[str] = None,
    adapter_name: str = "default",
) -> ImportReport:
    """[`mask_from_zeros`], with a report of what was found. Arguments and errors are the same.

    Returns:
        [`ImportReport`]: the model, a row for each matrix, notes and warnings.
    """
    check_adapter_name(adapter_name)
    if value_dtype is not None:
        check_choice("value_dtype", value_dtype, tuple(VALUE_DTYPES))
    if base is sparse_model or (isinstance(base, str) and base == sparse_model):
        raise ValueError("base and sparse_model are the same. base must be the dense model.")
    source = open_source(sparse_model)
    model, random = load_base(base, source.architecture)
    names = Names(model, source.names(), source.label)
    saved: list[str] = []
    unplaced: list[str] = []
    if isinstance(source, MaskFile):
        if target_modules is not None or modules_to_save is not None:
            raise ValueError("A mask file names its modules: leave target_modules and modules_to_save out.")
        layers = named_by(source, names)
    else:
        check_structure(model, source, names)
        layers = find_matrices(model, target_modules, modules_to_save)
        check_saved(layers, modules_to_save)
        own = own_dtype(source, names, layers)
        value_dtype = value_dtype or own
        unplaced = names.without_place()
        saved = check_others(model, source, names, layers, modules_to_save, random)
    found = look_at(layers, source, names, value_dtype)
    check_sparse(found, source.label)
    config = config_of(model, found, modules_to_save, value_dtype, task_type)
    made = make_adapter(model, config, adapter_name, found)
    try:
        rows = _verified(made, adapter_name, source, names, saved, found)
    except BaseException:
        made.unload()
        raise
    return make_report(made, rows, found, source, unplaced, adapter_name)


def _verified(
    model: PeftModel, name: str, source: Weights | MaskFile, names: Names, saved: list[str], found: Found
) -> list[ImportedMatrix]:
    """Fill what is stored in full, and compare every matrix with the sparse model."""
    if isinstance(source, Weights):
        missing = set(saved) - copy_saved(model, name, source, names)
        if missing:
            raise ValueError(f"modules_to_save does not cover {min(missing)!r}. Name the module that contains it.")
    return [
        ImportedMatrix(
            layer.module_name,
            layer.shape,
            layer.kept(name),
            found.patterns[layer.module_name],
            found.changed[layer.module_name],
            verify(layer, name, source, names),
        )
        for layer in pruning_layers(model, name)
    ]
