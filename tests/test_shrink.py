"""Taking heads and neurons out leaves what the model computes alone."""

import warnings

import pytest
import torch
from helpers.architectures import ARCHITECTURES, GENERATE, inputs, logits, make, zero_some, zero_units
from helpers.models import make_bert, make_gpt2
from peft import get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import peft_prune
from peft_prune import Attention, Block, FeedForward, SMPConfig, model_size, register_anatomy, shrink
from peft_prune.structure import anatomy
from peft_prune.structure.flops import unit_macs
from peft_prune.structure.shrink import keep_units
from peft_prune.structure.sites import find_sites


# the ones without SDPA in Transformers
CASES = [
    (name, attention)
    for name in ARCHITECTURES
    for attention in ("eager", "sdpa")
    if attention == "eager" or name not in ("mpnet", "deberta-v2", "deberta-v3")
]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_outputs_stay(name, attention):
    model, batch = make(name, attention), inputs(name)
    whole = logits(model, batch)
    left = zero_some(model)
    masked = logits(model, batch)
    assert (masked - whole).abs().max() > 1e-2, "removing units has to show, or the test shows nothing"
    before = model_size(model, 10)
    assert shrink(model) is model
    after = model_size(model, 10)
    assert (after.heads, after.neurons) == (left["heads"], left["neurons"])
    assert after.parameters < before.parameters and after.macs < before.macs
    torch.testing.assert_close(logits(model, batch), masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GENERATE)
def test_generate_with_cache(name):
    model, batch = make(name, "sdpa"), inputs(name, batch=1)
    zero_some(model)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | {
        key: batch[key] for key in ("input_ids", "attention_mask")
    }
    expected = model.generate(**arguments)
    shrink(model)
    assert torch.equal(model.generate(**arguments), expected)
    assert torch.equal(model.generate(**arguments, use_cache=False), expected)
    assert torch.equal(model.generate(**arguments, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mpnet", "t5", "gpt_neox", "modernbert"])
def test_shrinking_twice_is_shrinking_once(name):
    model, batch = make(name), inputs(name)
    sites = find_sites(model)
    zero_units(model, sites[0], torch.tensor([0]))
    shrink(model)
    zero_units(model, find_sites(model)[0], torch.tensor([0]))
    masked = logits(model, batch)
    shrink(model)
    assert find_sites(model)[0].units == max(1, sites[0].units - 2)
    torch.testing.assert_close(logits(model, batch), masked, atol=1e-5, rtol=1e-5)


def test_heads_whose_values_are_zero_go():
    model, batch = make("bert"), inputs("bert")
    values = model.get_submodule("bert.encoder.layer.0.attention.self.value")
    with torch.no_grad():
        values.weight[:8] = 0
        values.bias[:8] = 0
        values.weight[8:16] = 0  # its bias still gives the same vector at every token
    masked = logits(model, batch)
    shrink(model)
    assert find_sites(model)[0].units == 3
    torch.testing.assert_close(logits(model, batch), masked, atol=1e-5, rtol=1e-5)


def test_a_group_of_heads_stays_while_one_of_them_works():
    model = make("llama")  # 4 heads, 2 of which share keys and values
    site = find_sites(model)[0]
    assert site.units == 2 and site.width == 16
    with torch.no_grad():
        model.get_submodule(site.output).weight[:, :8] = 0
    shrink(model)
    assert find_sites(model)[0].units == 2


def test_mask_adapter_of_another_method_shrinks_when_asked():
    model = get_peft_model(make_bert(), SMPConfig(task_type="SEQ_CLS", sparsity=0.5, total_steps=1))
    site = find_sites(model)[0]
    layer = model.get_submodule(site.output)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "smp_scores"):
                module.scores["default"].fill_(1.0)
        layer.scores["default"][:, :8] = -1.0
    peft_prune.update_schedule(model, 1)
    peft_prune.finalize(model)
    batch = inputs("bert")
    masked = logits(model, batch)
    smaller = model.merge_and_unload(shrink=True)
    assert find_sites(smaller)[0].units == 3
    torch.testing.assert_close(logits(smaller, batch), masked, atol=1e-6, rtol=1e-5)


def test_a_mask_that_leaves_nothing_to_take_out_is_told():
    def masked(shrink):
        model = get_peft_model(make_bert(), SMPConfig(sparsity=0.5, total_steps=1))
        peft_prune.update_schedule(model, 1)
        peft_prune.finalize(model)
        return model.merge_and_unload(shrink=shrink)

    with pytest.warns(UserWarning, match=r"removed nothing.*granularity='head'.*PPruningConfig") as warned:
        masked(True), masked(True)
    assert len([w for w in warned if "removed nothing" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as silent:
        warnings.simplefilter("always")
        masked(None), masked(False)
    assert not [w for w in silent if "removed nothing" in str(w.message)]


def test_unknown_architecture_says_how_to_describe_it():
    model = make_bert()
    model.config.model_type = "my-bert"
    with pytest.raises(ValueError, match=r"model_type='my-bert'.*register_anatomy\('my-bert'"):
        shrink(model)
    peft_model = get_peft_model(model, SMPConfig(sparsity=0.5))
    with pytest.raises(ValueError, match="register_anatomy"):
        peft_model.merge_and_unload(shrink=True)
    assert not any(m.merged for m in peft_model.modules() if hasattr(m, "smp_scores")), "nothing was merged"


class Tiny(nn.Module):
    """A model that nobody else has."""

    def __init__(self):
        super().__init__()
        self.stack = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 10), "b": nn.Linear(10, 6)}) for _ in range(2)])

    def forward(self, x):
        for block in self.stack:
            x = x + block["b"](block["a"](x).relu())
        return x


def test_a_model_of_ones_own(monkeypatch):
    monkeypatch.setattr(anatomy, "_ANATOMIES", dict(anatomy._ANATOMIES))
    own = Block("stack.*", (), (FeedForward(("a",), "b"),))
    model, x = Tiny(), torch.randn(3, 6)
    zero_units(model, find_sites(model, (own,))[1], torch.tensor([1, 5, 9]))
    expected = model(x)
    shrink(model, anatomy=(own,))
    assert model.stack[1]["a"].weight.shape == (7, 6) and model.stack[1]["b"].in_features == 7
    torch.testing.assert_close(model(x), expected)
    register_anatomy("tiny", own)
    assert anatomy.anatomy_of("tiny") == (own,)
    with pytest.raises(ValueError, match="at least one Block"):
        register_anatomy("tiny")


def test_an_anatomy_that_does_not_fit_is_told():
    attention = Attention("attention.self", *["attention.self.query"] * 2, "attention.self.nothing", "x")
    with pytest.raises(ValueError, match=r"encoder\.layer\.0' has no module 'x'"):
        find_sites(make_bert(), (Block("encoder.layer.*", (attention,), ()),))
    with pytest.raises(ValueError, match="no blocks named 'decoder.layers"):
        find_sites(make_bert(), (Block("decoder.layers.*", (attention,), ()),))
    with pytest.raises(ValueError, match="layout='diagonal'"):
        Attention("a", "q", "k", "v", "o", layout="diagonal")


def test_units_that_are_not_there_are_told():
    model = make_gpt2()
    with pytest.raises(ValueError, match="'nowhere' is no output"):
        keep_units(model, {"nowhere": torch.tensor([0])})
    with pytest.raises(ValueError, match="between 0 and 3"):
        keep_units(model, {"transformer.h.0.attn.c_proj": torch.tensor([0, 4])})


def test_other_models_of_the_same_config_are_left_alone():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    one, two = BertModel(config), BertModel(config)
    keep_units(one, {"encoder.layer.0.output.dense": torch.tensor([1, 2])})
    assert not hasattr(two.config, "peft_prune_structure") and hasattr(one.config, "peft_prune_structure")


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_what_torch_counts(batch):
    """Attention in eager mode: two matrix products a head, which torch's own counter sees."""
    bert = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=72)
    llama = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=72,
    )  # fmt: skip
    for model in (
        BertModel._from_config(bert, attn_implementation="eager", add_pooling_layer=False).eval(),
        LlamaModel._from_config(llama, attn_implementation="eager").eval(),
    ):
        for _ in range(2):
            ids = torch.ones(batch, 9, dtype=torch.long)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(input_ids=ids)
            counted = sum(
                flops
                for operator, flops in counter.get_flop_counts()["Global"].items()
                if operator in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm)
            )
            assert counted == 2 * batch * model_size(model, 9).macs
            zero_some(model)
            shrink(model)


def test_unit_costs_are_the_papers():
    model = BertModel(BertConfig())  # 12 heads of 64, width 768
    heads, neurons = find_sites(model)[:2]
    n, d, width = 128, 768, 64
    assert unit_macs(model, heads, n) == n * d * width * 4 + 2 * n**2 * width
    assert unit_macs(model, neurons, n) == 2 * n * d


def test_shared_layers_are_counted_as_often_as_they_run():
    size = model_size(make("albert"), 10)
    assert size.macs == model_size(make("bert"), 10).macs and size.heads == 4


def test_frozen_stays_frozen():
    model = make("t5").requires_grad_(False)
    zero_some(model)
    assert not any(parameter.requires_grad for parameter in shrink(model).parameters())
