"""The layer against autograd's own gradient, the base model, and PEFT's ways of switching and merging."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import prune, randomize_scores
from helpers.models import BERT_TARGET_WEIGHTS, logits, make_bert, make_gpt2, make_llama, snapshot
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_prune import SMPConfig, finalize, update_schedule
from peft_prune.layers.layer import pruning_layers
from peft_prune.layers.linear import PrunedLinear, PrunedLinearConv1D
from peft_prune.stages.schedule import sparsity


WORDS = {"task": "SEQ_CLS", "words": ["bad", "good"], "token_ids": [1, 2], "mask_token_id": 3}


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("penalty", [0.0, 50.0])
def test_gradient_is_an_independent_autograd_computation(conv1d, granularity, penalty):
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(24, 32) if conv1d else nn.Linear(32, 24))
    sparsity = None if granularity == "2:4" else 0.8
    model = get_peft_model(
        base, SMPConfig(target_modules=["0"], sparsity=sparsity, granularity=granularity, penalty=penalty)
    )
    randomize_scores(model)
    update_schedule(model, 5, 10)
    (layer,) = pruning_layers(model)
    assert type(layer) is (PrunedLinearConv1D if conv1d else PrunedLinear)
    x, target = torch.randn(3, 5, 32), torch.randn(3, 5, 24)
    model.train()
    loss = F.mse_loss(model(x), target)
    loss.backward()

    # straight through, written as a sum whose forward value is the mask and whose gradient is that of the scores
    weight = base[0].get_base_layer().weight.detach()
    weight = weight.T if conv1d else weight
    scores = layer.scores["default"].detach().clone().requires_grad_()
    mask = layer.get_mask("default").float() + scores - scores.detach()
    reference = F.mse_loss(F.linear(x, weight * mask, base[0].get_base_layer().bias.detach()), target)
    lambda_now = penalty * (1 - 0.5**3)
    (reference + lambda_now * torch.sigmoid(scores).mean()).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(layer.scores["default"].grad, scores.grad)
    assert layer.get_base_layer().weight.grad is None


@pytest.mark.parametrize(
    ("make", "n"), [(make_bert, BERT_TARGET_WEIGHTS), (make_gpt2, 2 * 12 * 32 * 32), (make_llama, 2 * (3072 + 4608))]
)
@pytest.mark.parametrize("allocation", ["local", "score", "global"])
def test_default_targets_and_exact_sparsity(make, n, allocation):
    model = prune(make(), 0.9, allocation=allocation)
    layers = pruning_layers(model)
    assert sum(layer.shape[0] * layer.shape[1] for layer in layers) == n
    assert not any(part in m.module_name for m in layers for part in ("classifier", "pooler", "lm_head", "emb", "wte"))
    kept = [int(layer.get_mask("default").sum()) for layer in layers]
    if allocation == "local":
        assert kept == [round((1 - 0.9) * m.shape[0] * m.shape[1]) for m in layers]
    else:
        kinds = {m.module_name.split(".", 4)[-1] for m in layers}
        assert abs(sum(kept) - 0.1 * n) <= (0.5 if allocation == "global" else len(kinds))
        assert len(set(kept)) > 2
    assert sparsity(layers, "default") == pytest.approx(1 - sum(kept) / n)


def test_new_adapter_is_the_dense_model_bit_for_bit(batch):
    base = make_bert()
    expected = logits(base, batch)
    assert torch.equal(logits(get_peft_model(base, SMPConfig(sparsity=0.9)), batch), expected)


def test_conv1d_equals_masked_base(gpt2, batch):
    reference = copy.deepcopy(gpt2)
    model = prune(gpt2)
    assert all(isinstance(layer, PrunedLinearConv1D) for layer in pruning_layers(model))
    for layer in pruning_layers(model):
        reference.get_submodule(layer.module_name).weight.data *= layer.get_mask("default").T
    assert torch.equal(logits(model, batch), logits(reference, batch))


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
def test_merge_and_unmerge_restore_every_bit(make, batch):
    base = make()
    layer_weight = next(p for n, p in base.named_parameters() if n.endswith(("query.weight", "c_attn.weight")))
    layer_weight.data[0, :3] = torch.tensor([-0.0, 1e-40, 3e38])
    before = snapshot(base)
    model = prune(base, 0.8)
    pruned = logits(model, batch)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, batch), pruned)
    assert (layer_weight == 0).float().mean() == pytest.approx(0.8, abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()  # the second time nothing happens
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), pruned)
    after = snapshot(model.unload())
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # compared as integers: -0.0 == 0.0
        assert torch.equal(tensor.view(torch.int32), after[key].view(torch.int32)), key


def test_merge_and_unload_gives_a_plain_model(bert, batch):
    model = prune(bert)
    pruned = logits(model, batch)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged, batch), pruned)
    assert not pruning_layers(merged) and not any("smp_" in name for name in merged.state_dict())
    weight = merged.bert.encoder.layer[1].output.dense.weight
    assert (weight == 0).sum() == weight.numel() - round(0.3 * weight.numel())


def test_unloading_with_a_composite_module_to_save(batch):
    model = prune(make_bert(), task_type="SEQ_CLS", modules_to_save=["pooler"])
    with torch.no_grad():
        for wrapper in (model.base_model.model.bert.pooler, model.base_model.model.classifier):
            for parameter in wrapper.modules_to_save["default"].parameters():
                parameter.mul_(2)
    pruned = logits(model, batch)
    assert torch.equal(logits(model.merge_and_unload(), batch), pruned)


def test_safe_merge_tells_of_a_broken_base(bert):
    model = prune(bert)
    bert.bert.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected.*adapter default.*not finite.*layer.0.output.dense"):
        model.merge_adapter(safe_merge=True)
    model = prune(make_bert())
    pruning_layers(model)[0].scores["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected.*adapter default.*query"):
        model.merge_adapter(safe_merge=True)


def test_a_weight_that_is_used_without_calling_its_layer_is_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    with pytest.raises(TypeError, match="self_attn.out_proj.*cannot be pruned"):
        get_peft_model(copy.deepcopy(model), SMPConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="specify `target_modules`"):  # in eval mode none of its layers is called
        get_peft_model(copy.deepcopy(model), SMPConfig())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert get_peft_model(model, SMPConfig()).peft_config["default"].target_modules == {"linear1", "linear2"}
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(("make", "last"), [(make_bert, (48, 32)), (make_gpt2, (128, 32))])
def test_layers_say_how_wide_they_are_as_linear_layers_do(make, last):
    layer = pruning_layers(prune(make()))[-1]
    assert (layer.in_features, layer.out_features) == last


def test_several_adapters(bert, batch):
    dense = logits(bert, batch)
    model = prune(bert, 0.5)
    one = logits(model, batch)
    model.add_adapter("other", SMPConfig(sparsity=0.8))
    randomize_scores(model, seed=5, name="other")
    assert torch.equal(logits(model, batch), one)
    model.set_adapter("other")
    update_schedule(model, 10, 10)
    other = logits(model, batch)
    assert not torch.allclose(one, other)
    finalize(model, "other")
    assert torch.equal(logits(model, batch), other)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), dense)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), one)

    # both at once: what both keep, and merged one after the other
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, batch)
    reference = make_bert()
    for layer in pruning_layers(model):
        keep = layer.get_mask("default") & layer.get_mask("other")
        reference.get_submodule(layer.module_name).weight.data *= keep
    assert torch.equal(both, logits(reference, batch))
    model.base_model.merge_adapter()
    assert torch.equal(logits(model, batch), both)
    model.base_model.unmerge_adapter()
    model.base_model.set_adapter("default")
    assert torch.equal(logits(model, batch), one)

    model.delete_adapter("other")
    assert all(layer._get_available_adapters() == {"default"} for layer in pruning_layers(model))
    assert torch.equal(logits(model, batch), one)


def test_only_scores_and_modules_to_save_are_trainable(bert):
    model = get_peft_model(bert, SMPConfig(task_type="SEQ_CLS", modules_to_save=["pooler"]))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".smp_scores." in n or ".modules_to_save." in n for n in trainable)
    assert any("pooler" in name for name in trainable) and any("classifier" in name for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == BERT_TARGET_WEIGHTS + 32 * 32 + 32 + 2 * 32 + 2


def test_status_lists_the_adapters(bert):
    model = prune(bert)
    model.add_adapter("other", SMPConfig())
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.peft_types["other"] == "SMP"
    assert set(status.available_adapters) == {"default", "other"}
    assert all(s.available_adapters == ["default", "other"] for s in model.get_layer_status())


def test_scores_are_float32_on_a_bfloat16_base(batch):
    model = prune(make_bert().bfloat16())
    assert {layer.scores["default"].dtype for layer in pruning_layers(model)} == {torch.float32}
    assert model(input_ids=batch["input_ids"]).logits.dtype == torch.bfloat16
    model.train()
    model(input_ids=batch["input_ids"]).logits.float().sum().backward()
    assert pruning_layers(model)[0].scores["default"].grad.dtype == torch.float32


def test_selection_of_modules_is_pefts(bert):
    def names(**fields):
        model = get_peft_model(make_bert(), SMPConfig(**fields))
        return {layer.module_name.removeprefix("bert.encoder.layer.") for layer in pruning_layers(model)}

    assert names(target_modules=["query"]) == {"0.attention.self.query", "1.attention.self.query"}
    assert names(target_modules=r".*layer\.1.*(query|key)") == {"1.attention.self.query", "1.attention.self.key"}
    assert all(n.startswith("1.") for n in names(layers_to_transform=[1])) and len(names(layers_to_transform=1)) == 6
    assert len(names(exclude_modules=["query", "intermediate.dense"])) == 8
    assert "bert.pooler.dense" in names(target_modules="all-linear", task_type="SEQ_CLS")


def test_second_adapter_finds_the_pruned_layers(bert):
    model = get_peft_model(bert, SMPConfig())
    model.add_adapter("all", SMPConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    model.add_adapter("default_targets", SMPConfig())
    assert len(pruning_layers(model, "default_targets")) == len(pruning_layers(model, "default")) == 12
    assert len(pruning_layers(model, "all")) >= 13


def test_sparsity_pattern(bert):
    pattern = {"query": 0.25, r"layer\.1\.output\.dense": 0.5}
    for allocation in ("local", "score", "global"):
        model = prune(make_bert(), 0.9, sparsity_pattern=pattern, allocation=allocation)
        for layer in pruning_layers(model):
            share = 1 - layer.get_mask("default").float().mean().item()
            if layer.module_name.endswith("query"):
                assert share == pytest.approx(0.25, abs=1e-3)
            elif layer.module_name.endswith("layer.1.output.dense"):
                assert share == pytest.approx(0.5, abs=1e-3)
            else:
                assert share > 0.6


BAD_MODELS = [
    ({"target_modules": ["nothing"]}, "nothing.*not found"),
    ({"granularity": "2:4", "target_modules": ["odd"]}, "granularity='2:4'.*'odd' has 30 inputs"),
    ({"sparsity_pattern": {"qurey": 0.5}, "target_modules": ["odd"]}, r"sparsity_pattern\['qurey'\] matches none"),
    ({"target_modules": ["conv"]}, "'conv' of type ConvTranspose2d cannot be pruned"),
    ({"target_modules": ["special"]}, "'special' of type Special cannot be pruned"),
    ({}, "target_modules was not given"),
    ({"verbalizer": WORDS, "target_modules": ["odd"]}, "verbalizer: Net has no masked-LM head"),
]


class Special(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Linear(30, 8)
        self.conv = nn.ConvTranspose2d(3, 3, 3)
        self.special = Special(8, 8)


@pytest.mark.parametrize(("fields", "message"), BAD_MODELS, ids=[str(f) for f, _ in BAD_MODELS])
def test_what_does_not_fit_the_model_is_told_and_nothing_is_replaced(fields, message):
    net = Net()
    before = snapshot(net)
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(net, SMPConfig(**fields))
    assert not pruning_layers(net)
    assert snapshot(net).keys() == before.keys()


def test_unsupported_calls_are_told(bert, batch, gpt2):
    model = prune(bert)
    tied = get_peft_model(gpt2, SMPConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        tied.merge_and_unload()
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["query"]))


def test_other_adapters_in_the_way_are_told(bert):
    model = prune(make_bert())
    model.merge_adapter()
    with pytest.raises(
        ValueError, match=r"starts from the weight.*\['default'\] are merged. Call model.unmerge_adapter"
    ):
        model.add_adapter("other", SMPConfig())
    lora = get_peft_model(bert, LoraConfig(target_modules=["query"]))
    with pytest.raises(
        TypeError, match="query' is adapted already, by peft.tuners.lora.layer.Linear.*merge_and_unload"
    ):
        get_peft_model(lora.base_model.model, SMPConfig())


def test_hooks_on_the_base_layer_are_told(bert, batch):
    model = prune(bert)
    pruning_layers(model)[0].get_base_layer().register_forward_hook(lambda *a: None)
    with pytest.warns(UserWarning, match="hooks. They are ignored"):
        model(input_ids=batch["input_ids"])


def test_mask_is_computed_once_a_step(bert, batch, monkeypatch):
    from peft_prune.selection import granularity

    calls = []
    original = granularity.topk_mask
    monkeypatch.setattr(granularity, "topk_mask", lambda scores, k, *last: calls.append(k) or original(scores, k))
    model = prune(bert)
    assert len(calls) == 12
    mask = pruning_layers(model)[0].get_mask("default")
    with torch.no_grad():
        pruning_layers(model)[0].scores["default"].mul_(-1)  # as an optimizer would
    for _ in range(3):
        logits(model, batch)
    assert len(calls) == 12 and torch.equal(pruning_layers(model)[0].get_mask("default"), mask)
    update_schedule(model, 10, 10)
    assert len(calls) == 24 and not torch.equal(pruning_layers(model)[0].get_mask("default"), mask)
