"""Merged sparse models on disk: the same model bit for bit, at the size of what is kept."""

import json

import pytest
import torch
from helpers import architectures
from helpers.models import make_bert, make_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.distributions import Bernoulli
from transformers import AutoModelForCausalLM, GenerationConfig

from peft_prune import WandaConfig, load_sparse, save_sparse
from peft_prune.storage.codec import MaskFormatError
from peft_prune.structure.sparse_checkpoint import FILE, SPARSE


def sparse(name="llama", sparsity=0.7, dtype=torch.float32):
    """A random model with zeros in the linear layers of its blocks."""
    model = architectures.make(name).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and any(part.isdigit() for part in path.split(".")):
                module.weight[torch.rand(module.weight.shape, generator=generator) < sparsity] = 0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5", "gpt2"])
def test_the_same_model_comes_back(name, dtype, tmp_path):
    model = sparse(name, dtype=dtype) if name != "gpt2" else sparse("opt", dtype=dtype)
    size = save_sparse(model, tmp_path)
    loaded = load_sparse(tmp_path)
    assert type(loaded) is type(model) and loaded.dtype == dtype and size["bytes"] < size["dense_bytes"]
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not hasattr(loaded.config, SPARSE)
    loaded.save_pretrained(tmp_path / "plain")  # an ordinary model from here on
    assert SPARSE not in (tmp_path / "plain" / "config.json").read_text()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_size_is_that_of_kept_values_and_of_the_entropy(sparsity, tmp_path):
    torch.manual_seed(0)
    model = make_llama(hidden_size=256, intermediate_size=512).half()
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    with torch.no_grad():
        for module in layers:
            module.weight[torch.rand(module.weight.shape) < sparsity] = 0
    size = save_sparse(model, tmp_path)
    pruned, kept = (sum(int(f(m.weight)) for m in layers) for f in (torch.numel, torch.count_nonzero))
    rest = sum(p.numel() for p in model.parameters()) - pruned
    entropy = float(Bernoulli(1 - sparsity).entropy()) / torch.log(torch.tensor(2.0)) / 8 * pruned
    assert size["bytes"] == pytest.approx(2 * rest + 2 * kept + float(entropy), rel=0.03)


def test_tied_weights_generation_and_other_classes(tmp_path):
    model = make_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    model.generation_config = GenerationConfig(max_new_tokens=3)
    save_sparse(model, tmp_path)
    loaded = load_sparse(tmp_path, AutoModelForCausalLM, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.generation_config.max_new_tokens == 3
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_from_pretrained_does_not_take_it_for_a_whole_model(tmp_path):
    save_sparse(sparse(), tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def damaged(folder, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def test_every_tensor_is_compared_with_its_record(tmp_path):
    save_sparse(sparse(), tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    names = list(load_file(tmp_path / FILE))
    kinds = {name.rpartition(".")[2]: name for name in names}
    for name in kinds.values():
        (tmp_path / FILE).write_bytes(whole)
        damaged(tmp_path, lambda tensors, name=name: tensors[name].view(-1).view(torch.uint8)[3].bitwise_xor_(64))
        with pytest.raises(MaskFormatError, match="match"):
            load_sparse(tmp_path)
        (tmp_path / FILE).write_bytes(whole)
        damaged(tmp_path, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(MaskFormatError, match="is missing from"):
            load_sparse(tmp_path)
    (tmp_path / FILE).write_bytes(whole)
    damaged(tmp_path, lambda tensors: tensors.update(odd=torch.ones(1)))
    with pytest.raises(MaskFormatError, match="'odd' is not expected"):
        load_sparse(tmp_path)
    (tmp_path / FILE).write_bytes(whole[:-9])
    with pytest.raises(MaskFormatError, match="cannot be read"):
        load_sparse(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(MaskFormatError, match="holds no"):
        load_sparse(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("of", [1, 2]),
        ("of", [-1, -2]),
        ("of", "x"),
        ("shape", [10**9, 10**9]),
        ("kept", -1),
        ("values", None),
        ("block", [2, 2]),
    ],
)
def test_a_record_that_cannot_be_is_refused(field, value, tmp_path):
    save_sparse(sparse(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    info = next(iter(config[SPARSE]["masks"].values()))
    info[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="damaged"):
        load_sparse(tmp_path)


def test_a_few_bytes_are_not_unpacked_to_any_size(tmp_path):
    save_sparse(sparse(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    info = next(iter(config[SPARSE]["masks"].values()))
    info["of"] = info["shape"] = [10**6, 10**6]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is recorded as .1000000, 1000000., and LlamaForCausalLM has"):
        load_sparse(tmp_path)


def test_misuse_is_told(tmp_path):
    with pytest.raises(TypeError, match="merge_and_unload"):
        save_sparse(get_peft_model(make_llama(), WandaConfig()), tmp_path)
    with pytest.raises(ValueError, match="enough zeros"):
        save_sparse(make_bert(), tmp_path)
    broken = sparse()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="up_proj.weight' holds values that are not finite"):
        save_sparse(broken, tmp_path)
    assert not (tmp_path / FILE).exists()
    make_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model of save_sparse"):
        load_sparse(tmp_path)


@pytest.mark.parametrize(("format", "known"), [(3, True), (2, False), (99, False), ("3", False)])
def test_files_of_the_format_before_are_read_and_others_refused(format, known, tmp_path):
    model = sparse()  # masks without a pattern, which both formats store alike
    save_sparse(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[SPARSE]["format"] = format
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not known:
        with pytest.raises(ValueError, match=f"format {format!r} is not known"):
            load_sparse(tmp_path)
        return
    for name, tensor in load_sparse(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
