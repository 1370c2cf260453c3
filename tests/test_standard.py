"""Smaller models as ordinary checkpoints. They are loaded by a process in which this package cannot be imported."""

import pytest
import torch
from helpers import architectures
from helpers.data import tokenizer
from helpers.models import make_llama
from helpers.without_package import expect, load_there
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_prune import (
    PPruningConfig,
    StructuredPruningConfig,
    WandaConfig,
    calibrate,
    save_standard,
    use_sparse_kernels,
)
from peft_prune.structure.record import FIELD
from peft_prune.structure.shrink import keep_units
from peft_prune.structure.sites import HEADS, find_sites


FREE_HEADS = ("mistral", "qwen2", "qwen3", "gemma3_text")


def keep_some(model, heads=None):
    """In each layer other neurons, and as many; and of heads the first ones, where a number is given."""
    kept = {}
    for i, site in enumerate(find_sites(model)):
        if site.kind != HEADS:
            kept[site.output] = torch.arange(site.units).roll(i)[: site.units // 2].sort().values
        elif heads:
            kept[site.output] = torch.arange(heads)
    return keep_units(model, kept)


def many_heads():
    """A Llama with eight heads in four groups; with three of them the heads do not divide the hidden size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **architectures._GROUPED | {"num_attention_heads": 8, "num_key_value_heads": 4}, rope_theta=5000.0
    )
    return LlamaForCausalLM(config).eval()


CASES = {name: lambda name=name: keep_some(architectures.make(name)) for name in architectures.ARCHITECTURES}
CASES |= {f"{name}, heads": lambda name=name: keep_some(architectures.make(name), 1) for name in (*FREE_HEADS, "llama")}
CASES |= {
    "llama as mistral": lambda: keep_some(many_heads(), 3),
    "bfloat16": lambda: keep_some(many_heads().bfloat16(), 3),
    "untouched": lambda: architectures.make("llama"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case, saved here and loaded there."""
    folder = tmp_path_factory.mktemp("standard")
    for number, (name, make) in enumerate(CASES.items()):
        model, kind = make(), name.split(",")[0]
        kind = kind if kind in architectures.ARCHITECTURES else "llama"
        auto, inputs = architectures.ARCHITECTURES[kind][1].__name__, architectures.inputs(kind)
        place = folder / f"{number:02}"
        save_standard(model, place)
        expect(model, place, auto, inputs)
    there = load_there(folder)
    return {name: (*there[f"{n:02}"], folder / f"{n:02}") for n, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it_without_this_package(saved, name):
    expected, found, place = saved[name]
    rounded = {"atol": 1e-2, "rtol": 0} if name == "bfloat16" else {}  # positions are kept in float32 there
    torch.testing.assert_close(found["logits"], expected["logits"], **rounded)
    if expected["generates"]:
        assert torch.equal(found["ids"], expected["ids"])
    config = (place / "config.json").read_text()
    assert FIELD not in config and "peft_prune" not in config
    assert "loads without that package" in (place / "README.md").read_text()
    as_mistral = name in ("llama as mistral", "bfloat16") or name.startswith("mistral")
    assert found["class"].startswith("Mistral") == as_mistral


def test_a_tokenizer_and_a_generation_config_go_along(tmp_path):
    model = keep_some(many_heads(), 3)
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = None
    config = save_standard(model, tmp_path, tokenizer())
    assert config.model_type == "mistral" and (config.num_attention_heads, config.num_key_value_heads) == (6, 3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3 and (tmp_path / "tokenizer_config.json").exists()
    assert loaded.generate(torch.tensor([[5, 6]]), do_sample=False).shape == (1, 5)


def test_uniform_shapes_take_no_head_when_only_neurons_are_to_go():
    model = many_heads()
    with torch.no_grad():
        for layer in model.model.layers:  # removing these heads would cost nothing
            layer.self_attn.o_proj.weight[:, : model.config.head_dim] = 0
    model = get_peft_model(
        model, StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=0.9, shapes="uniform", lambda_ffn=1e6)
    )
    shares = calibrate(model, [{"input_ids": torch.randint(64, (8, 32))}])
    assert shares["heads"] == 1.0 and shares["neurons"] < 1.0


@pytest.mark.parametrize("config", [StructuredPruningConfig, PPruningConfig])
def test_uniform_shapes_are_what_it_takes(config, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "keep_ratio": 0.6, "sequence_length": 12, "repair": True, "num_samples": 4}
    model = get_peft_model(many_heads(), config(**fields, shapes="uniform", multiple_of=8))
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    assert 0.4 < calibrate(model, [{"input_ids": ids}])["flops"] <= 0.6
    model.save_pretrained(tmp_path / "adapter")
    smaller = PeftModel.from_pretrained(many_heads(), tmp_path / "adapter").merge_and_unload()
    config = save_standard(smaller, tmp_path / "model")
    assert config.intermediate_size % 8 == 0 and config.intermediate_size < 48
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(ids).logits, smaller(ids).logits)
    with_lora = get_peft_model(loaded, LoraConfig(target_modules="all-linear"))  # an ordinary model in every way
    with_lora(input_ids=ids, labels=ids).loss.backward()
    again = get_peft_model(with_lora.unload(), WandaConfig(task_type="CAUSAL_LM", sparsity=0.75, num_samples=4))
    calibrate(again, [{"input_ids": ids}])
    sparse = again.merge_and_unload().eval()
    expected = sparse(ids).logits
    use_sparse_kernels(sparse, tokens=48, margin=1.0)
    torch.testing.assert_close(sparse(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_whole_layers_that_are_gone(tmp_path):
    config = StructuredPruningConfig(task_type="CAUSAL_LM", keep_ratio=1.0, keep_layers=2, num_samples=4)
    model = get_peft_model(make_llama(num_hidden_layers=4), config)
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    calibrate(model, [{"input_ids": ids}])
    smaller = model.merge_and_unload()
    assert save_standard(smaller, tmp_path).num_hidden_layers == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, smaller(ids).logits)


def test_what_transformers_has_no_config_for_is_told_before_anything_is_written(tmp_path):
    uneven = make_llama()
    site = next(site for site in find_sites(uneven) if site.kind != HEADS)
    keep_units(uneven, {site.output: torch.arange(5)})
    with pytest.raises(ValueError, match="layers keep from 5 to 48 neurons.*shapes='uniform'"):
        save_standard(uneven, tmp_path / "a")
    for name in ("bert", "gpt2", "opt", "t5", "vit", "bart"):
        with pytest.raises(ValueError, match="no config for a .* with fewer heads.*save_compact"):
            save_standard(keep_some(architectures.make(name), 2), tmp_path / "a")
    biased = many_heads()
    biased.config.attention_bias = True
    with pytest.raises(ValueError, match="6 heads do not divide the hidden size 32.*attention_bias=True"):
        save_standard(keep_some(biased, 3), tmp_path / "a")
    with pytest.raises(TypeError, match="merge_and_unload"):
        save_standard(get_peft_model(make_llama(), StructuredPruningConfig()), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_weights_that_no_config_describes_are_told(tmp_path):
    model = make_llama()
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.ones(32, 7))
    with pytest.raises(ValueError, match="down_proj.weight' has the shape .32, 7., and LlamaForCausalLM .* wants"):
        save_standard(model, tmp_path / "a")
