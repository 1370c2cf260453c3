"""`per_layer_config`: what Transformers makes of it today, and that our models have it at hand."""

import json

import pytest
import torch
from helpers import architectures
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Trainer, TrainingArguments

from peft_prune import load_compact, save_compact, shrink
from peft_prune.structure.per_layer import PER_LAYER
from peft_prune.structure.sites import HEADS, find_sites


GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
transformers_has_it = pytest.mark.skipif(
    not hasattr(PretrainedConfig, "per_layer_config"), reason="this Transformers has no per_layer_config"
)


def smaller(name):
    """Other numbers of heads and neurons in each layer, and a layer less."""
    model = architectures.make(name)
    architectures.zero_some(model)
    return shrink(model)


def written(model, folder):
    save_compact(model, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", GROUPED)
def test_it_says_what_each_layer_has(name, tmp_path):
    model = smaller(name)
    config = written(model, tmp_path)
    assert "per_layer_config" not in config, "that would hide the sizes which load_compact needs"
    sites = {(site.block.rpartition(".")[2], site.kind == HEADS): site for site in find_sites(model)}
    for layer, fields in config[PER_LAYER].items():
        attention = model.model.layers[int(layer)].self_attn
        if "num_key_value_heads" in fields:
            assert fields["num_key_value_heads"] == sites[layer, True].units
            assert fields["num_attention_heads"] * attention.head_dim == attention.q_proj.out_features
        if "intermediate_size" in fields:
            assert fields["intermediate_size"] == model.model.layers[int(layer)].mlp.down_proj.in_features
    whole = set(map(str, range(len(model.model.layers)))) - config[PER_LAYER].keys()
    for layer in whole:
        assert model.model.layers[int(layer)].mlp.down_proj.in_features == model.config.intermediate_size
    assert len(config[PER_LAYER]) > 1


def test_it_is_that_of_the_model_which_is_saved(tmp_path):
    model = smaller("llama")
    first = written(model, tmp_path / "one")[PER_LAYER]
    again = load_compact(tmp_path / "one")
    assert not hasattr(again.config, PER_LAYER)
    architectures.zero_some(again, seed=3)
    second = written(shrink(again), tmp_path / "two")[PER_LAYER]
    assert second != first
    trained = smaller("llama")
    arguments = TrainingArguments(str(tmp_path / "t"), report_to="none", use_cpu=True)
    Trainer(trained, arguments).save_model(str(tmp_path / "t"))
    assert json.loads((tmp_path / "t" / "config.json").read_text())[PER_LAYER] == first


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "opt"])
def test_it_is_left_out_where_no_field_holds_the_heads(name, tmp_path):
    assert PER_LAYER not in written(smaller(name), tmp_path)


def with_field(name, tmp_path, **more):
    """Config of a compact model with our text as Transformers' own field."""
    config = written(smaller(name), tmp_path)
    left_out = {key for key in config if key.startswith("peft_prune")}
    fields = {key: value for key, value in config.items() if key not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"per_layer_config": config[PER_LAYER]} | more))
    return config[PER_LAYER]


@transformers_has_it
@pytest.mark.parametrize("name", GROUPED)
def test_transformers_understands_the_text(name, tmp_path):
    text = with_field(name, tmp_path, allow_global_per_layer_attribute_access=True)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.is_heterogeneous
    for layer, fields in text.items():
        assert {key: getattr(config.per_layer_config[int(layer)], key) for key in fields} == fields


@transformers_has_it
@pytest.mark.parametrize("name", GROUPED)
def test_no_modelling_code_of_transformers_reads_it_yet(name, tmp_path):
    """When this fails, Transformers reads the field: write it as its own, and have `save_standard` use it."""
    now = "Transformers reads per_layer_config now: say so in docs/production.md, and let save_standard write it."
    with_field(name, tmp_path)
    with pytest.raises(RuntimeError, match="per-layer attribute"):  # reads one number for all layers, and finds several
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        pytest.fail(now)
    with_field(name, tmp_path, allow_global_per_layer_attribute_access=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    widths = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    assert widths == {architectures.ARCHITECTURES[name][0]().intermediate_size}, now
