"""Sparse models and mask files of others become adapters: compared with the sparse model itself, and with NumPy."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.commands import run
from helpers.models import logits, make_bert, make_gpt2, make_llama, make_masked_lm, snapshot
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertModel, LlamaForCausalLM

from peft_prune import MovementPruningConfig, PruningConfig, WandaConfig, calibrate, mask_from_zeros
from peft_prune.cli import main
from peft_prune.importing import import_sparse
from peft_prune.importing.matrices import agree, group_pattern
from peft_prune.layers.layer import PruningLayer, pruning_layers
from peft_prune.storage.codec import MaskFormatError


MAKERS = {"llama": make_llama, "bert": make_bert, "gpt2": make_gpt2}
BLOCKS = re.compile(r"\.(layers?|h)\.\d+\.")


def matrices(model):
    """Names of the linear layers inside blocks, by the models' own conventions."""
    kinds = (nn.Linear, sys.modules["transformers.pytorch_utils"].Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and BLOCKS.search(n)]


@torch.no_grad()
def sparsify(model, rewrite=(), shares=(0.4, 0.7), seed=1):
    """Zero a share of each matrix, another for each, and rewrite what stays of some."""
    generator = torch.Generator().manual_seed(seed)
    for i, name in enumerate(matrices(model)):
        weight = model.get_submodule(name).weight
        if any(name.endswith(end) for end in rewrite):
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator).to(weight))
        weight[torch.rand(weight.shape, generator=generator) < shares[i % len(shares)]] = 0
    return model


@torch.no_grad()
def two_of_four(model):
    """The two largest of four inputs stay."""
    for name in matrices(model):
        module = model.get_submodule(name)
        matrix = module.weight if isinstance(module, nn.Linear) else module.weight.T
        groups = matrix.abs().reshape(-1, 4)
        drop = groups.argsort(1)[:, :2]
        mask = torch.ones_like(groups).scatter(1, drop, 0).reshape(matrix.shape)
        matrix.mul_(mask)
    return model


def tokens():
    return {"input_ids": torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))}


def same_weights(one, other):
    """Whether two models hold equal tensors under equal names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("rewrite", [False, True])
def test_a_sparse_model_becomes_an_adapter(kind, rewrite, tmp_path):
    make = MAKERS[kind]
    names = matrices(make())
    sparse = sparsify(make(), rewrite=names if rewrite else ())
    model = mask_from_zeros(make(), sparse)
    assert isinstance(model, PeftModel)
    expected = logits(sparse, tokens())
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    kinds = {key.rpartition(".")[2] for key in stored}
    assert kinds == ({"movement_mask", "movement_values"} if rewrite else {"movement_mask"})
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(logits(loaded, tokens()), expected, atol=1e-6)
    assert same_weights(loaded.merge_and_unload(), sparse)  # bit exact
    config = PruningConfig.from_pretrained(tmp_path)
    zeros = {n: (sparse.get_submodule(n).weight == 0).sum().item() for n in names}
    sizes = {n: sparse.get_submodule(n).weight.numel() for n in names}
    assert config.sparsity == pytest.approx(sum(zeros.values()) / sum(sizes.values()), abs=1e-9)
    assert {n: sizes[n] - info["kept"] for n, info in config.mask_info.items()} == zeros
    assert len({round(zeros[n] / sizes[n], 1) for n in names}) > 1  # sparsities of layers differ
    assert config.granularity == "weight" and config.finalized and config.from_existing_zeros
    assert config.update == ("full" if rewrite else "none")


def test_values_are_stored_where_weights_differ_only():
    sparse = sparsify(make_llama(), rewrite=["down_proj"])
    report = import_sparse(make_llama(), sparse)
    rows = {row.name: row for row in report.matrices}
    for name, row in rows.items():
        weight = sparse.get_submodule(name).weight
        kept = int((weight != 0).sum())
        differ = int(((weight != make_llama().get_submodule(name).weight) & (weight != 0)).sum())
        assert (row.kept, row.changed, row.values) == (kept, differ, kept if name.endswith("down_proj") else 0)
    assert report.difference == 0 and report.value_dtype == "float32" and not report.notes and not report.warnings
    held = [name for name, layer in zip(rows, pruning_layers(report.model), strict=True) if layer.values]
    assert held == [name for name in rows if name.endswith("down_proj")]
    assert same_weights(report.model.merge_and_unload(safe_merge=True), sparse)


def test_weights_of_wanda_come_back_as_the_masks_they_were():
    model = get_peft_model(make_llama(), WandaConfig(sparsity=0.5))
    calibrate(model, [tokens()])
    masks = {layer.module_name: layer.get_mask("default") for layer in pruning_layers(model)}
    imported = mask_from_zeros(make_llama(), model.merge_and_unload())
    assert {layer.module_name for layer in pruning_layers(imported)} == set(masks)
    assert all(torch.equal(layer.get_mask("default"), masks[layer.module_name]) for layer in pruning_layers(imported))


def test_the_task_is_read_off_a_language_model(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    sparsify(make_llama()).save_pretrained(tmp_path / "sparse")
    model = mask_from_zeros(str(tmp_path / "base"), tmp_path / "sparse")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    assert model.generate(**tokens(), max_new_tokens=2, do_sample=False).shape == (3, 11)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    assert mask_from_zeros(make_bert(), sparsify(make_bert())).peft_config["default"].task_type is None


def test_masks_combine_and_switch(tmp_path):
    one, two = (sparsify(make_llama(), seed=seed) for seed in (1, 2))
    mask_from_zeros(make_llama(), two).save_pretrained(tmp_path)
    model = mask_from_zeros(make_llama(), one)
    model.load_adapter(tmp_path, "two")
    model.add_weighted_adapter(["default", "two"], adapter_name="both", combination_type="intersection")
    model.set_adapter("both")
    for layer in pruning_layers(model):
        name = layer.module_name
        kept = (one.get_submodule(name).weight != 0) & (two.get_submodule(name).weight != 0)
        assert torch.equal(layer.get_mask("both"), kept)


# ------------------------------------------------------------------------ n:m


@pytest.mark.parametrize("kind", MAKERS)
def test_two_of_four_is_told(kind, tmp_path):
    sparse = two_of_four(MAKERS[kind]())
    report = import_sparse(MAKERS[kind](), sparse)
    config = report.model.peft_config["default"]
    assert report.pattern == config.granularity == "2:4" and config.sparsity == 0.5
    report.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MAKERS[kind](), tmp_path)
    assert same_weights(loaded.merge_and_unload(), sparse)


def test_patterns_of_groups():
    generator = torch.Generator().manual_seed(0)

    def grouped(n, m, rows=64, columns=64):
        order = torch.rand(rows * columns // m, m, generator=generator).argsort(1)
        return (order < n).reshape(rows, columns)

    for n, m in ((2, 4), (1, 4), (3, 4), (6, 8), (5, 16)):
        assert group_pattern(grouped(n, m)) == f"{n}:{m}"
    assert group_pattern(torch.rand(64, 64, generator=generator) < 0.5) is None
    assert group_pattern(torch.rand(64, 64, generator=generator) < 0.05) is None  # few in a group by chance
    assert group_pattern(torch.ones(8, 8, dtype=torch.bool)) is None
    assert group_pattern(torch.zeros(8, 8, dtype=torch.bool)) is None
    assert group_pattern(grouped(2, 4)[:, :63]) is None
    rounded = grouped(2, 4)
    rounded[0, rounded[0].nonzero()[0]] = False  # a value that float16 rounded to zero
    assert group_pattern(rounded) == "2:4"
    more = grouped(2, 4)
    more[0, :4] = True
    assert group_pattern(more) is None


def test_one_matrix_of_another_pattern_leaves_single_weights():
    sparse = two_of_four(make_llama())
    sparse.model.layers[0].mlp.up_proj.weight.data[0, :4] = 1.0
    report = import_sparse(make_llama(), sparse)
    assert report.pattern is None and report.model.peft_config["default"].granularity == "weight"
    assert sorted(row.name for row in report.matrices if row.pattern is None) == ["model.layers.0.mlp.up_proj"]


# ------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    "of_base, of_sparse, told",
    [
        (torch.float32, torch.float16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.float32, False),
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.float16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float64, False),
    ],
)
def test_rounding_to_another_dtype_changes_nothing(of_base, of_sparse, told):
    base = make_llama().to(of_base)
    sparse = sparsify(make_llama().to(of_base).to(of_sparse))
    report = import_sparse(base, sparse)
    assert report.value_dtype is None and all(row.values == 0 for row in report.matrices)
    assert any("up to rounding" in note for note in report.notes) == told == (report.difference > 0)
    dense = make_llama().to(of_base)
    for name in matrices(dense):
        kept = sparse.get_submodule(name).weight != 0
        merged = report.model.base_model.model.get_submodule(name).adapted("default", dense.get_submodule(name).weight)
        assert torch.equal(merged, dense.get_submodule(name).weight * kept)


def test_copies_in_half_precision_agree_and_neighbours_do_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator) * 10.0 ** torch.randint(-9, 2, (200_000,), generator=generator)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for one in dtypes:
        for two in dtypes:
            assert bool(agree(x.to(one), x.to(two)).all())
    normal = x[x.abs() > 1e-3]
    for one, two in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        for factor in (1 + 2.0**-6, 1 - 2.0**-6):  # one or two units in the last place of bfloat16
            assert not bool(agree(normal.to(one), (normal * factor).to(two)).any())
    for factor in (1 + 2.0**-9, 1 - 2.0**-9):
        assert not bool(agree(normal, (normal * factor).half()).any())


def test_a_float32_copy_of_what_the_base_rounds_is_the_base():
    base, sparse = make_llama().bfloat16(), sparsify(make_llama())
    report = import_sparse(base, sparse)
    assert report.value_dtype is None and 0 < report.difference < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_exact_in_the_dtype_of_the_sparse_model(dtype):
    names = matrices(make_llama())
    sparse = sparsify(make_llama(), rewrite=names).to(dtype)
    report = import_sparse(make_llama().to(dtype), sparse)
    assert report.value_dtype == str(dtype).removeprefix("torch.") and report.difference == 0
    assert same_weights(report.model.merge_and_unload(), sparse)


def test_values_can_be_stored_in_fewer_bits():
    sparse = sparsify(make_llama(), rewrite=matrices(make_llama()))
    sizes = {}
    for value_dtype in ("float32", "bfloat16", "int8"):
        report = import_sparse(make_llama(), sparse, value_dtype=value_dtype)
        sizes[value_dtype] = report.adapter_bytes
        merged = report.model.merge_and_unload()
        pairs = [(merged.get_submodule(n).weight, sparse.get_submodule(n).weight) for n in matrices(sparse)]
        worst = max(float((one - two).detach().abs().max()) for one, two in pairs)
        assert report.difference == pytest.approx(worst, rel=1e-6) and (worst == 0) == (value_dtype == "float32")
        assert all(bool((one[two == 0] == 0).all()) for one, two in pairs)
        assert any(value_dtype in note for note in report.notes) == (value_dtype != "float32")
    assert sizes["int8"] < sizes["bfloat16"] < sizes["float32"]
    with pytest.raises(ValueError, match="value_dtype='int4' is unknown"):
        mask_from_zeros(make_llama(), sparse, value_dtype="int4")


def test_values_beyond_the_dtype_are_told():
    sparse = sparsify(make_llama(), rewrite=["up_proj"])
    sparse.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="value_dtype='float16'.*layers.0.mlp.up_proj.*float32"):
        mask_from_zeros(make_llama(), sparse, value_dtype="float16")


def test_values_are_rounded_to_a_narrower_base_and_it_is_told():
    sparse = sparsify(make_llama(), rewrite=["up_proj"]).half()
    report = import_sparse(make_llama().bfloat16(), sparse)
    assert 0 < report.difference < 1e-2
    assert any("base's dtype" in note for note in report.notes)


# ------------------------------------------------------------------------ odd matrices


def test_matrices_that_are_the_base_are_left_out():
    sparse = sparsify(make_llama())
    for i in (0, 1):
        name = f"model.layers.{i}.mlp.down_proj"
        sparse.get_submodule(name).load_state_dict(make_llama().get_submodule(name).state_dict())
    report = import_sparse(make_llama(), sparse)
    assert report.dense == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert not isinstance(report.model.base_model.model.model.layers[0].mlp.down_proj, PruningLayer)
    assert "mlp.down_proj" not in report.model.peft_config["default"].target_modules
    assert any("leaves it out" in note for note in report.notes)
    sparse.get_submodule("model.layers.0.mlp.down_proj").weight.data[0, 0] = 0  # now only one block has it
    report = import_sparse(make_llama(), sparse)
    targets = report.model.peft_config["default"].target_modules
    assert "model.layers.0.mlp.down_proj" in targets and len(report.matrices) == 13
    assert same_weights(report.model.merge_and_unload(), sparse)


def test_a_dense_matrix_that_was_changed_is_stored():
    sparse = sparsify(make_llama())
    sparse.model.layers[0].mlp.down_proj.load_state_dict(make_llama(seed=5).model.layers[0].mlp.down_proj.state_dict())
    report = import_sparse(make_llama(), sparse)
    row = next(row for row in report.matrices if row.name == "model.layers.0.mlp.down_proj")
    assert row.sparsity == 0 and row.values == row.size
    assert same_weights(report.model.merge_and_unload(), sparse)


def test_weights_of_another_model_are_warned_of():
    sparse = sparsify(make_llama())
    other = make_llama(seed=5)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        weight = other.get_submodule(name).weight
        sparse.get_submodule(name).weight.data.copy_(weight * (sparse.get_submodule(name).weight != 0))
    with pytest.warns(UserWarning, match=r"layers.0.mlp.up_proj' \(2 such matrices\): .*another base model"):
        model = mask_from_zeros(make_llama(), sparse)
    assert same_weights(model.merge_and_unload(), sparse)


def test_a_matrix_of_zeros_is_warned_of():
    sparse = sparsify(make_llama())
    sparse.model.layers[1].self_attn.v_proj.weight.data.zero_()
    with pytest.warns(UserWarning, match="'model.layers.1.self_attn.v_proj': all weights are zero"):
        model = mask_from_zeros(make_llama(), sparse)
    assert same_weights(model.merge_and_unload(), sparse)


def test_zeros_of_the_base():
    def with_zeros():
        base = make_llama()
        base.model.layers[0].mlp.up_proj.weight.data[:5] = 0
        return base

    report = import_sparse(with_zeros(), sparsify(with_zeros()))
    assert any("The base itself has 160 zeros" in note for note in report.notes)
    assert same_weights(report.model.merge_and_unload(), sparsify(with_zeros()))
    filled = sparsify(with_zeros())
    filled.model.layers[0].mlp.up_proj.weight.data[:5] = 0.5  # what is zero in the base need not be zero afterwards
    assert same_weights(mask_from_zeros(with_zeros(), filled).merge_and_unload(), filled)


def test_only_named_modules_are_masked():
    sparse = make_llama()
    untouched = {n for n in matrices(sparse) if not n.endswith("up_proj")}
    for layer in sparse.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    model = mask_from_zeros(make_llama(), sparse, target_modules=["up_proj"])
    assert {layer.module_name for layer in pruning_layers(model)} == set(matrices(sparse)) - untouched
    with pytest.raises(ValueError, match="'model.layers.0.mlp.up_proj.weight'.*no mask covers"):
        mask_from_zeros(make_llama(), sparse, target_modules=["down_proj"])
    with pytest.raises(ValueError, match="matches no module"):
        mask_from_zeros(make_llama(), sparse, target_modules=["nothing"])
    with pytest.raises(TypeError, match="cannot be pruned"):
        mask_from_zeros(make_llama(), sparse, target_modules=["up_proj", "input_layernorm"])


def test_a_pruned_head_has_to_be_named():
    def with_head():
        sparse = sparsify(make_llama())
        sparse.lm_head.weight.data[::3] = 0
        return sparse

    with pytest.raises(ValueError, match="'lm_head.weight'.*target_modules"):
        mask_from_zeros(make_llama(), with_head())
    model = mask_from_zeros(make_llama(), with_head(), target_modules=["lm_head", *{
        name.rpartition(".")[2] for name in matrices(make_llama())}])  # fmt: skip
    assert torch.allclose(logits(model, tokens()), logits(with_head(), tokens()), atol=1e-6)


# ------------------------------------------------------------------------ what does not belong together


def changed(change):
    sparse = sparsify(make_llama())
    change(sparse)
    return sparse


@pytest.mark.parametrize(
    "sparse, message",
    [
        (lambda: sparsify(make_llama(vocab_size=91)), r"'model.embed_tokens.weight' is \(90, 32\).*\(91, 32\)"),
        (lambda: sparsify(make_llama(intermediate_size=64)), r"layers.0.mlp.gate_proj.*\(48, 32\).*\(64, 32\)"),
        (lambda: sparsify(make_llama(num_hidden_layers=1)), "holds no 'model.layers.1.*architectures differ"),
        (lambda: sparsify(make_llama(num_hidden_layers=3)), "'model.layers.2.*has no place.*architectures differ"),
        (lambda: sparsify(make_bert()), "holds no 'model.*LlamaForCausalLM has"),
        (lambda: sparsify(make_llama(attention_bias=True)), "k_proj.bias', for which LlamaForCausalLM has no place"),
        (lambda: changed(lambda m: m.model.norm.weight.data.add_(1)), r"'model.norm.weight'.*\['model.norm'\]"),
        (lambda: changed(lambda m: m.model.embed_tokens.weight.data.add_(1)), r"\['model.embed_tokens'\]"),
        (lambda: changed(lambda m: m.lm_head.weight.data.add_(1)), r"modules_to_save=\['lm_head'\]"),
        (
            lambda: changed(lambda m: m.model.layers[1].mlp.up_proj.weight.data[0].fill_(float("nan"))),
            "'model.layers.1.mlp.up_proj.weight': it holds NaN or infinity",
        ),
        (make_llama, "every matrix that could be pruned equals the base's"),
        (lambda: make_llama(seed=3), "which no mask covers"),
        (lambda: sparsify(make_llama(), shares=(2.0,)), "all matrices are zero"),
        (lambda: get_peft_model(sparsify(make_llama()), LoraConfig()), "holds adapters.*merge_and_unload"),
        (lambda: 7, "must be a model, a path or a Hub id, not int"),
        (lambda: "no/such/file", "is neither a file or folder here"),
    ],
)
def test_what_does_not_belong_together_is_told_and_the_base_left_as_it_was(sparse, message):
    base = make_llama()
    before, modules = snapshot(base), [type(m) for m in base.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        mask_from_zeros(base, sparse())
    assert [type(m) for m in base.modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_only_changed_weights_are_no_sparse_model():
    sparse = make_llama()
    for name in matrices(sparse):
        sparse.get_submodule(name).weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="it has no zeros that the base does not have"):
        mask_from_zeros(make_llama(), sparse)


def test_the_base_has_to_be_the_dense_model_itself(tmp_path):
    sparse = sparsify(make_llama())
    with pytest.raises(ValueError, match="base and sparse_model are the same"):
        mask_from_zeros(sparse, sparse)
    with pytest.raises(ValueError, match="base is the sparse model.*from_existing_zeros=True"):
        mask_from_zeros(sparsify(make_llama()), sparse)
    with pytest.raises(ValueError, match="base holds an adapter"):
        mask_from_zeros(get_peft_model(make_llama(), LoraConfig()), sparse)
    with pytest.raises(TypeError, match="base must be a model, a path or a Hub id"):
        mask_from_zeros(None, sparse)
    with torch.device("meta"):
        empty = make_llama()
    with pytest.raises(ValueError, match="base: .* is not loaded"):
        mask_from_zeros(empty, sparse)
    with pytest.raises(ValueError, match="adapter_name='a.b'"):
        mask_from_zeros(make_llama(), sparse, adapter_name="a.b")


def test_a_tied_head_cannot_be_masked_by_itself():
    def tied():
        sparse = sparsify(make_llama(tie_word_embeddings=True))
        sparse.lm_head.weight.data[:, ::2] = 0
        return sparse

    with pytest.raises(ValueError, match="'lm_head' shares its weight with 'model.embed_tokens'"):
        mask_from_zeros(make_llama(tie_word_embeddings=True), tied(), target_modules=["lm_head", "q_proj"])


# ------------------------------------------------------------------------ modules stored in full


def test_norms_and_heads_are_stored_in_full_if_asked_for(tmp_path):
    def trained():
        sparse = sparsify(make_llama())
        for module in (sparse.model.norm, *(layer.input_layernorm for layer in sparse.model.layers)):
            module.weight.data.add_(0.5)
        sparse.lm_head.weight.data.mul_(2)
        return sparse

    with pytest.raises(ValueError) as stop:
        mask_from_zeros(make_llama(), trained())
    offer = json.loads(re.search(r"modules_to_save=(\[.*?\])", str(stop.value))[1].replace("'", '"'))
    assert offer == ["input_layernorm", "lm_head", "model.norm"]
    model = mask_from_zeros(make_llama(), trained(), modules_to_save=offer)
    expected = logits(trained(), tokens())
    assert torch.allclose(logits(model, tokens()), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.allclose(logits(loaded, tokens()), expected, atol=1e-6)
    assert same_weights(loaded.merge_and_unload(), trained())


def test_a_name_that_reaches_pruned_modules_is_refused():
    with pytest.raises(ValueError, match="ends with 'proj', such as .*_proj"):
        mask_from_zeros(make_llama(), sparsify(make_llama()), modules_to_save=["proj"])


def test_biases_of_pruned_modules_have_no_place():
    sparse = sparsify(make_bert())
    sparse.bert.encoder.layer[0].output.dense.bias.data.add_(1)
    with pytest.raises(ValueError, match="A bias of a pruned module, such as .*layer.0.output.dense.bias"):
        mask_from_zeros(make_bert(), sparse)


def test_a_classifier_that_the_base_lacks(tmp_path):
    """A sparse classifier, whose base is the language model without it."""
    make_masked_lm().save_pretrained(tmp_path / "base")
    sparse = make_bert(initializer_range=0.3)
    missing = sparse.bert.load_state_dict(make_masked_lm().bert.state_dict(), strict=False).missing_keys
    assert missing == ["pooler.dense.weight", "pooler.dense.bias"]
    sparsify(sparse).save_pretrained(tmp_path / "sparse")
    base, source = str(tmp_path / "base"), tmp_path / "sparse"
    with pytest.raises(
        ValueError, match=r"The base has no 'bert.pooler.dense.weight'.*\['bert.pooler.dense', 'classifier'\]"
    ):
        mask_from_zeros(base, source)
    model = mask_from_zeros(base, source, modules_to_save=["bert.pooler.dense", "classifier"])
    assert type(model.get_base_model()).__name__ == "BertForSequenceClassification"
    assert torch.allclose(logits(model, tokens()), logits(sparse, tokens()), atol=1e-6)


# ------------------------------------------------------------------------ files


@pytest.fixture
def folders(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    sparse = sparsify(make_llama(), rewrite=["up_proj"])
    sparse.save_pretrained(tmp_path / "sparse")
    return tmp_path, sparse


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_checkpoints_are_read_in_every_form(folders, shards, safe):
    folder, sparse = folders
    if shards:
        sparse.save_pretrained(folder / "sparse", max_shard_size="20KB")
        (folder / "sparse" / "model.safetensors").unlink(missing_ok=True)
        assert len(list((folder / "sparse").glob("*.safetensors"))) > 1
    if not safe:
        for path in (folder / "sparse").glob("*.safetensors"):
            torch.save(load_file(path), path.with_name(path.name.replace("model", "pytorch_model")).with_suffix(".bin"))
            path.unlink()
        for path in (folder / "sparse").glob("*.index.json"):
            text = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "sparse" / "pytorch_model.bin.index.json").write_text(text)
            path.unlink()
    model = mask_from_zeros(str(folder / "base"), folder / "sparse")
    assert same_weights(model.merge_and_unload(), sparse)


def test_a_tensor_is_read_when_it_is_needed(folders, monkeypatch):
    """Of the sparse model one tensor is in memory at a time, each read to be compared and to be verified."""
    from peft_prune.importing import sources

    folder, sparse = folders
    alive, most, read = [0], [0], []

    class Counted:
        def __init__(self, tensor):
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            self.tensor = tensor

        def __del__(self):
            alive[0] -= 1

    original = sources.FileWeights.get

    def get(self, name):
        tensor = original(self, name)
        read.append(name)
        tensor.counted = Counted(tensor.shape)
        return tensor

    monkeypatch.setattr(sources.FileWeights, "get", get)
    mask_from_zeros(make_llama(), folder / "sparse")
    assert most[0] <= 2 < len(read)  # the last one is let go when the next one is there
    assert all(read.count(f"{name}.weight") == 2 for name in matrices(sparse))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", ""])
def test_an_index_cannot_lead_out_of_its_folder(folders, name):
    folder, _ = folders
    shutil.copy(folder / "sparse" / "model.safetensors", folder / "outside.safetensors")
    (folder / "sparse" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "sparse" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not name the files of a checkpoint"):
        mask_from_zeros(make_llama(), folder / "sparse")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_told(folders, text):
    folder, _ = folders
    (folder / "sparse" / "model.safetensors").unlink()
    (folder / "sparse" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="does not name the files of a checkpoint"):
        mask_from_zeros(make_llama(), folder / "sparse")


def test_shards_that_are_missing_or_hold_a_tensor_twice(folders):
    folder, sparse = folders
    sparse.save_pretrained(folder / "shards", max_shard_size="20KB")
    paths = sorted((folder / "shards").glob("*.safetensors"))
    first, second = load_file(paths[0]), load_file(paths[1])
    save_file(second | {next(iter(first)): next(iter(first.values()))}, paths[1])
    with pytest.raises(ValueError, match="two files hold the tensor"):
        mask_from_zeros(make_llama(), folder / "shards")
    paths[1].unlink()
    with pytest.raises(ValueError, match=f"{paths[1].name}' is missing"):
        mask_from_zeros(make_llama(), folder / "shards")


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no weights and no masks"):
        mask_from_zeros(make_llama(), tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="'.gguf' cannot be read"):
        mask_from_zeros(make_llama(), tmp_path / "weights.gguf")


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="Unsupported|weights_only|Weights only"):
        mask_from_zeros(make_llama(), tmp_path)
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        mask_from_zeros(make_llama(), tmp_path)


def test_compressed_and_quantised_checkpoints_are_named(tmp_path):
    tensors = sparsify(make_llama()).state_dict()
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    packed = {"model.layers.0.self_attn.q_proj.weight_packed": torch.ones(3, dtype=torch.uint8)}
    save_file(tensors | packed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="compressed or quantised, and holds '.*weight_packed' instead. Load it with"):
        mask_from_zeros(make_llama(), tmp_path)
    as_integers = {"model.layers.0.self_attn.q_proj.weight": weight.to(torch.int8)}
    save_file(tensors | as_integers, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_proj.weight' is quantised"):
        mask_from_zeros(make_llama(), tmp_path)


def test_tied_heads_are_stored_once(tmp_path):
    sparse = sparsify(make_llama(tie_word_embeddings=True))
    sparse.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = mask_from_zeros(make_llama(tie_word_embeddings=True), tmp_path)
    assert same_weights(model.merge_and_unload(), sparse)


def test_names_with_and_without_the_prefix_of_a_head(tmp_path):
    """The original BERT names norms as TensorFlow does, and GPT-2 was saved without its head."""
    sparse = sparsify(make_bert())
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in sparse.state_dict().items()
    }
    save_file(old, tmp_path / "model.safetensors")
    assert same_weights(mask_from_zeros(make_bert(), tmp_path).merge_and_unload(), sparse)
    sparse = sparsify(make_gpt2())
    headless = {k: v.clone() for k, v in sparse.transformer.state_dict().items()}
    headless |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(headless, tmp_path / "model.safetensors")
    model = mask_from_zeros(make_gpt2(), tmp_path)
    assert same_weights(model.merge_and_unload(), sparse)
    torch.manual_seed(0)
    base = BertModel(make_bert().config)
    base.load_state_dict(make_bert().bert.state_dict())
    with pytest.warns(UserWarning, match="'classifier.bias'.*no place"):  # a head that the base does not have
        model = mask_from_zeros(base, sparsify(make_bert()))
    assert same_weights(model.merge_and_unload(), sparsify(make_bert()).bert)


def test_a_sparse_model_on_the_hub(tmp_path, monkeypatch):
    """By its id, in the form in which the client caches it."""
    for kind, model in (("dense", make_llama()), ("sparse", sparsify(make_llama()))):
        repository = tmp_path / f"models--user--{kind}"
        model.save_pretrained(repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    model = mask_from_zeros(make_llama(), "user/sparse")
    assert same_weights(model.merge_and_unload(), sparsify(make_llama()))
    with pytest.raises(ValueError, match="'user/absent' holds no weights and no masks"):
        mask_from_zeros(make_llama(), "user/absent")


@pytest.mark.parametrize("name", ["os", "PreTrainedTokenizerFast", "AutoTokenizer", "pipeline", "NoSuchModel", None])
def test_the_class_of_a_file_is_a_model_of_transformers_or_nothing(folders, name):
    folder, _ = folders
    for kind in ("base", "sparse"):
        path = folder / kind / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": name and [name]}))
    with pytest.raises(ValueError, match="is not part of Transformers"):
        mask_from_zeros(str(folder / "base"), folder / "sparse")


# ------------------------------------------------------------------------ mask files


def packed_masks(model, suffix=".mask"):
    """As MaskLLM's tool_compress_mask writes them: bits of the parameter in its own layout."""
    found = {}
    for name in matrices(model):
        weight = model.get_submodule(name).weight.detach().numpy()
        found[f"{name}.weight{suffix}"] = np.packbits(weight != 0)
    return found


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_masks_of_maskllm(kind, write, tmp_path):
    sparse = two_of_four(MAKERS[kind]())
    write(tmp_path / "mask_compressed.npz", **packed_masks(sparse))
    for source in (tmp_path, tmp_path / "mask_compressed.npz"):  # a folder as on the Hub, or the file
        report = import_sparse(MAKERS[kind](), source)
        assert report.pattern == "2:4" and report.sparsity == 0.5 and report.difference == 0
        assert report.checkpoint_bytes == (tmp_path / "mask_compressed.npz").stat().st_size
        assert same_weights(report.model.merge_and_unload(), sparse)


FORMS = {
    "bool": lambda m: m,
    "uint8": lambda m: m.astype(np.uint8),
    "float32": lambda m: m.astype(np.float32),
    "big-endian": lambda m: m.astype(">f8"),
    "columns": np.asfortranarray,
    "flat": lambda m: m.reshape(-1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".weight.mask", ".weight", ".mask", ""])
def test_masks_in_other_forms(form, suffix, tmp_path):
    sparse = sparsify(make_gpt2())
    masks = {n: sparse.get_submodule(n).weight.detach().numpy() != 0 for n in matrices(sparse)}
    np.savez(tmp_path / "mask.npz", **{name + suffix: FORMS[form](mask) for name, mask in masks.items()})
    assert same_weights(mask_from_zeros(make_gpt2(), tmp_path / "mask.npz").merge_and_unload(), sparse)


def test_a_mask_file_may_leave_matrices_out_and_keeps_zeros_of_the_base(tmp_path):
    base = make_llama()
    base.model.layers[0].mlp.up_proj.weight.data[0] = 0
    mask = np.ones((48, 32), dtype=bool)
    mask[:, 0] = False
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    np.savez(tmp_path / "mask.npz", **{names[0]: mask, names[1]: np.ones_like(mask)})
    report = import_sparse(base, tmp_path / "mask.npz")
    assert [row.name for row in report.matrices] == ["model.layers.0.mlp.up_proj"]
    assert report.dense == ["model.layers.1.mlp.up_proj"]
    assert np.array_equal(pruning_layers(report.model)[0].get_mask("default").numpy(), mask)
    assert report.sparsity == pytest.approx(1 / 32)


def test_a_mask_file_names_its_modules(tmp_path):
    np.savez(tmp_path / "mask.npz", **packed_masks(sparsify(make_llama())))
    for fields in ({"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="leave target_modules and modules_to_save out"):
            mask_from_zeros(make_llama(), tmp_path / "mask.npz", **fields)


NAME = "model.layers.0.mlp.up_proj.weight"
MASK = np.arange(48 * 32).reshape(48, 32) % 3 == 0
HOSTILE = {
    "objects": ({NAME: np.array([Evil()] * 1536, dtype=object)}, "neither a mask"),
    "unknown module": ({"model.layers.9.mlp.up_proj.weight.mask": np.packbits(MASK)}, "LlamaForCausalLM does not have"),
    "escape codes": ({"\x1b[2Jx": np.packbits(MASK)}, r"'\\x1b\[2Jx'"),
    "too few bits": ({NAME: np.packbits(MASK)[:-1]}, "191 elements of uint8 is neither a mask"),
    "too many bits": ({NAME: np.packbits(np.ones((48, 33), dtype=bool))}, "198 elements of uint8"),
    "another shape": ({NAME: MASK.T}, r"is \(32, 48\), but the parameter is \(48, 32\)"),
    "numbers": ({NAME: np.full((48, 32), 2, dtype=np.uint8)}, "numbers other than 0 and 1"),
    "not a number": ({NAME: np.full((48, 32), np.nan, dtype=np.float32)}, "numbers other than 0 and 1"),
    "complex": ({NAME: MASK.astype(np.complex64)}, "neither a mask"),
    "text": ({NAME: np.full((48, 32), "1")}, "neither a mask"),
    "fields": ({NAME: np.zeros((48, 32), dtype=[("a", "u1")])}, "neither a mask"),
    "large": ({NAME: np.zeros(10**7, dtype=np.uint8)}, "more than a mask can"),
    "a norm": ({"model.norm.weight": np.packbits(np.arange(32) < 5)}, "cannot be pruned"),
    "nothing removed": ({NAME: np.ones((48, 32), dtype=bool)}, "equals the base's"),
    "everything removed": ({NAME: np.zeros((48, 32), dtype=bool)}, "all matrices are zero"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_arrays_are_told(case, tmp_path):
    arrays, message = HOSTILE[case]
    np.savez_compressed(tmp_path / "mask.npz", **arrays)
    base = make_llama()
    before = snapshot(base)
    with pytest.raises((ValueError, TypeError), match=message):
        mask_from_zeros(base, tmp_path / "mask.npz")
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def npy(shape, data, descr="'|u1'", length=None):
    """An array's bytes by hand."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + (len(text) if length is None else length).to_bytes(2, "little") + text + data


ARCHIVES = {
    "a header that claims more than there is": ({f"{NAME}.npy": npy("(192,)", b"abc")}, "3 bytes are stored for 192"),
    "more data than the header says": ({f"{NAME}.npy": npy("(192,)", bytes(300))}, "193 bytes are stored"),
    "a shape of terabytes": ({f"{NAME}.npy": npy("(1000000, 1000000, 16)", b"")}, "neither a mask"),
    "a negative shape": ({f"{NAME}.npy": npy("(-1, -192)", bytes(192), "'|u1'")}, "cannot be read|bytes are stored"),
    "code in the header": ({f"{NAME}.npy": npy("__import__('os').getcwd()", bytes(192))}, "cannot be read"),
    "no header": ({f"{NAME}.npy": b"nothing"}, "cannot be read"),
    "a header that ends nowhere": ({f"{NAME}.npy": npy("(192,)", b"", length=65000)}, "cannot be read"),
    "another version": ({f"{NAME}.npy": b"\x93NUMPY\x09\x00" + bytes(192)}, "format .* is unknown"),
    "a file that is no array": ({"readme.txt": b"hello"}, "is not an array, or is there twice"),
    "two names for one": ({f"{NAME}.npy": npy("(192,)", bytes(192)), f"{NAME}.mask.npy": b""}, "there twice"),
    "nothing": ({}, "holds no masks"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archives_are_told(case, tmp_path):
    import zipfile

    files, message = ARCHIVES[case]
    with zipfile.ZipFile(tmp_path / "mask.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(MaskFormatError, match=message):
        mask_from_zeros(make_llama(), tmp_path / "mask.npz")


def test_damaged_archives_are_told(tmp_path):
    np.savez(tmp_path / "whole.npz", **{NAME: np.packbits(MASK)})
    whole = (tmp_path / "whole.npz").read_bytes()
    at = whole.index(np.packbits(MASK).tobytes())
    for damaged in (whole[: len(whole) // 2], whole[:at] + b"\xff" + whole[at + 1 :], b"", b"PK\x03\x04" * 9):
        (tmp_path / "mask.npz").write_bytes(damaged)
        with pytest.raises(MaskFormatError, match="not an .npz file|cannot be read"):
            mask_from_zeros(make_llama(), tmp_path / "mask.npz")


# ------------------------------------------------------------------------ the command


def test_the_command_writes_a_verified_adapter(folders, capsys):
    folder, sparse = folders
    out = folder / "adapter"
    arguments = ("import", folder / "sparse", "--base", folder / "base", "--out", out)
    answer = run(capsys, *arguments, "--json")
    assert answer["modules"] == 14 and answer["difference"] == 0 and answer["value_dtype"] == "float32"
    zeros = sum(int((sparse.get_submodule(n).weight == 0).sum()) for n in matrices(sparse))
    sizes = sum(sparse.get_submodule(n).weight.numel() for n in matrices(sparse))
    assert answer["sparsity"] == pytest.approx(zeros / sizes, abs=1e-9)
    assert answer["values"] == sum(int((layer.mlp.up_proj.weight != 0).sum()) for layer in sparse.model.layers)
    assert answer["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert answer["checkpoint_bytes"] == (folder / "sparse" / "model.safetensors").stat().st_size
    text = run(capsys, *arguments).out
    for part in ("mlp.up_proj", f"{answer['values']:,}", f"{answer['adapter_bytes']:,}", "merged weights equal"):
        assert part in text
    card = ModelCard.load(out / "README.md").text
    assert card.count("## Where the masks come from") == 1 and f"`{folder / 'sparse'}`" in card
    assert "import peft_prune" in card
    assert run(capsys, "verify", out, "--json")["masks"] == 14
    assert run(capsys, "inspect", out, "--json")["method"] == "MOVEMENT"
    run(capsys, "export", out, "--output", folder / "exported")
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder / "exported"), sparse)


def test_the_command_without_out_writes_nothing(folders, capsys):
    folder, _ = folders
    before = sorted(folder.rglob("*"))
    text = run(capsys, "import", folder / "sparse", "--base", folder / "base").out
    assert "nothing is written without --out" in text and sorted(folder.rglob("*")) == before


def test_the_command_on_a_mask_file_in_its_own_process(tmp_path):
    make_llama().half().save_pretrained(tmp_path / "base")
    sparse = two_of_four(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    np.savez_compressed(tmp_path / "mask.npz", **packed_masks(sparse))
    command = [sys.executable, "-m", "peft_prune.cli", "import", "mask.npz", "--base", "base", "--out", "adapter"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2:4" in done.stdout and "0.5000" in done.stdout and "written to     adapter" in done.stdout
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert loaded.dtype == torch.float16 and same_weights(loaded.merge_and_unload(), sparse)


def test_the_command_tells_errors(folders, capsys):
    folder, sparse = folders
    base, weights = str(folder / "base"), folder / "sparse"
    assert "lost" in run(capsys, "import", weights, "--base", base, "--out", weights, code=2).err
    assert "lost" in run(capsys, "import", weights, "--base", base, "--out", base, code=2).err
    (folder / "mask.npz").write_bytes(b"nothing")
    assert "not an .npz file" in run(capsys, "import", folder / "mask.npz", "--base", base, code=1).err
    assert "are the same" in run(capsys, "import", base, "--base", base, code=2).err
    error = run(capsys, "import", weights, "--base", base, "--target-modules", "nothing", "--json", code=2)
    assert error["type"] == "ValueError" and "target_modules=['nothing']" in error["error"]
    for arguments in ([], ["--base", base, "--value-dtype", "int4"]):
        with pytest.raises(SystemExit):
            main(["import", str(weights), *arguments])
    sparse.model.norm.weight.data.add_(1)
    sparse.save_pretrained(weights)
    assert "modules_to_save=['model.norm']" in run(capsys, "import", weights, "--base", base, code=2).err
    run(capsys, "import", weights, "--base", base, "--modules-to-save", "model.norm", "--out", folder / "adapter")
    assert run(capsys, "inspect", folder / "adapter", "--json")["other_bytes"] == 4 * 32


def test_nobody_else_gets_a_mask_that_trains_nothing():
    with pytest.raises(ValueError, match="update='none' leaves nothing to train"):
        MovementPruningConfig(from_existing_zeros=True, update="none")
