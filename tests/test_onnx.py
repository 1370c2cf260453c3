"""ONNX files: causal language models with a cache of keys and values, int8, fine-tuned smaller models, all inputs."""

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers.commands import run
from helpers.data import tokenizer
from helpers.models import make_bert, make_llama
from helpers.onnx_session import OnnxModel
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_prune import load_compact, save_compact, save_sparse, shrink
from peft_prune.report import export_onnx


pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CAUSAL = [name for name, (_, auto) in architectures.ARCHITECTURES.items() if auto is AutoModelForCausalLM]


def smaller(name, attention="eager"):
    """Other numbers of heads and neurons in each layer, and a layer less."""
    model = architectures.make(name, attention)
    architectures.zero_some(model)
    return shrink(model)


def fine_tuned(name):
    """All weights trained for some steps."""
    model = smaller(name).train()
    batch = architectures.inputs(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_language_model_generates_token_by_token(name, attention, tmp_path):
    model = smaller(name, attention)
    before = model.config.use_cache
    other = OnnxModel(export_onnx(model, tmp_path / "model.onnx", use_cache=True))
    assert model.config.use_cache == before and not model.training
    ids, mask = torch.randint(3, 120, (3, 9), generator=torch.Generator().manual_seed(0)), torch.ones(3, 9).long()
    mask[1, :4] = 0  # one prompt is shorter, padded on the left
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert np.array_equal(other.greedy(ids.numpy(), mask.numpy(), 12), expected.numpy())
    # one token after the other, or all at once, or one half and then the other: the same logits
    row, ones = ids[:1].numpy(), np.ones((1, 9), np.int64)
    whole, _ = other(row, ones)
    first, past = other(row[:, :5], ones[:, :5])
    second, past = other(row[:, 5:], ones, past)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-4)
    with torch.no_grad():
        cache = model(ids[:1], use_cache=True)
    np.testing.assert_allclose(whole, cache.logits.numpy(), atol=1e-4)
    shapes = [tuple(t.shape) for t in past]
    layers = cache.past_key_values.layers
    assert len(shapes) == 2 * model.config.num_hidden_layers and shapes[0][2] == 9
    assert [shape[1] for shape in shapes[::2]] == [layer.keys.shape[1] for layer in layers]


def test_a_sliding_window_that_is_shorter_than_the_text(tmp_path):
    torch.manual_seed(0)
    model = smaller("gemma3_text")
    assert model.config.sliding_window < 20
    other = OnnxModel(export_onnx(model, tmp_path / "model.onnx", use_cache=True))
    ids = torch.randint(3, 120, (1, 12))
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert np.array_equal(other.greedy(ids.numpy(), np.ones((1, 12), np.int64), 12), expected.numpy())


def test_a_model_in_training_is_exported_and_left_as_it_was(tmp_path):
    model, ids = smaller("llama"), np.array([[5, 6, 7]])
    expected = architectures.logits(model, {"input_ids": torch.from_numpy(ids)}).numpy()
    model.train()
    model.model.norm.eval()
    model.gradient_checkpointing_enable()  # which wants no cache while training
    found, _ = OnnxModel(export_onnx(model, tmp_path / "model.onnx", use_cache=True))(ids, np.ones_like(ids))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert model.training and model.model.layers[0].training and not model.model.norm.training


def test_a_fine_tuned_smaller_model_in_int8(tmp_path):
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = fine_tuned("llama")
    assert not torch.equal(model.lm_head.weight, smaller("llama").lm_head.weight)
    path, small = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    export_onnx(model, path, use_cache=True)
    how = {"per_channel": True, "op_types_to_quantize": ["MatMul"]}
    quantize_dynamic(path, small, weight_type=QuantType.QInt8, **how)
    ids, mask = architectures.inputs("llama").values()
    expected = architectures.logits(model, {"input_ids": ids[:1]}).numpy()
    found, past = OnnxModel(small)(ids[:1].numpy(), np.ones((1, 10), np.int64))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    step, _ = OnnxModel(small)(ids[:1, :1].numpy(), np.ones((1, 11), np.int64), past)
    assert step.shape == (1, 1, 120) and np.isfinite(step).all()
    matrices = {m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)}
    stored = [t for t in onnx.load(small).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert matrices <= {int(np.prod(t.dims)) for t in stored}


@pytest.mark.parametrize("name", ["t5", "bart", "vit", "deberta-v2", "modernbert"])
def test_other_inputs_of_any_size(name, tmp_path):
    import onnxruntime

    model = smaller(name)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "model.onnx"))
    for batch in (architectures.inputs(name), architectures.inputs(name, batch=4, tokens=13)):
        assert {value.name for value in session.get_inputs()} == set(batch)
        (found,) = session.run(["logits"], {key: value.numpy() for key, value in batch.items()})
        np.testing.assert_allclose(found, architectures.logits(model, batch).numpy(), atol=1e-4, rtol=1e-4)


def test_what_has_no_cache_is_told_before_any_work(tmp_path):
    path = tmp_path / "model.onnx"
    for model in (make_bert(), architectures.make("t5"), architectures.make("vit")):
        with pytest.raises(ValueError, match="causal language models .*use_cache=False"):
            export_onnx(model, path, use_cache=True)
    with pytest.raises(TypeError, match="merge_and_unload"):
        export_onnx(get_peft_model(make_llama(), LoraConfig()), path, use_cache=True)
    assert not path.exists()


# ------------------------------------------------------------------------ the command, of whole models


def saved_models(folder):
    """A compact model after fine-tuning, a sparse one, and an ordinary one, with their logits."""
    compact, sparse = fine_tuned("llama"), make_llama()
    save_compact(compact, folder / "compact")
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.mlp.up_proj.weight[:, ::2] = 0
    save_sparse(sparse, folder / "sparse")
    ordinary = make_llama(seed=1)
    ordinary.save_pretrained(folder / "ordinary")
    for name in ("compact", "sparse", "ordinary"):
        tokenizer().save_pretrained(folder / name)
    ids = torch.tensor([[5, 6, 7, 8]])
    return {n: (ids, m(ids).logits) for n, m in (("compact", compact), ("sparse", sparse), ("ordinary", ordinary))}


def test_the_command_takes_whole_models(tmp_path, capsys):
    for name, (ids, logits) in saved_models(tmp_path).items():
        out = tmp_path / f"{name}-onnx"
        path = run(capsys, "export", tmp_path / name, "--to", "onnx", "--output", out).out.strip()
        found, _ = OnnxModel(path)(ids.numpy(), np.ones((1, 4), np.int64))
        np.testing.assert_allclose(found, logits.detach().numpy(), atol=1e-4)
        gguf = run(capsys, "export", tmp_path / name, "--to", "gguf", "--output", tmp_path / f"{name}-gguf", code=2)
        assert "byte-level BPE" in gguf.err  # the tokenizer's kind, and nothing else, is in the way
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).unlink()
        run(capsys, "export", tmp_path / name, "--to", "gguf", "--output", tmp_path / f"{name}-gguf")


def test_the_command_changes_the_form_of_whole_models(tmp_path, capsys):
    models = saved_models(tmp_path)
    run(capsys, "export", tmp_path / "sparse", "--output", tmp_path / "dense")
    ids, logits = models["sparse"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits, logits)
    error = run(capsys, "export", tmp_path / "compact", "--output", tmp_path / "out", code=2).err
    assert "nothing to unpack for --to dense" in error and "--to transformers, gguf, onnx or compact" in error
    error = run(capsys, "export", tmp_path / "compact", "--to", "transformers", "--output", tmp_path / "o", code=2).err
    assert "shapes='uniform'" in error
    error = run(capsys, "export", tmp_path / "ordinary", "--to", "compact", "--output", tmp_path / "out", code=2).err
    assert "cannot be made smaller. Prune it first" in error
    error = run(
        capsys, "export", tmp_path / "compact", "--base", "x", "--to", "onnx", "--output", tmp_path / "out", code=2
    ).err
    assert "--base x is for adapters" in error and not (tmp_path / "out").exists()
    error = run(capsys, "export", tmp_path / "compact", "--to", "onnx", "--output", tmp_path / "compact", code=2).err
    assert "would be lost" in error


def test_the_command_takes_out_what_contributes_nothing(tmp_path, capsys):
    model = architectures.make("llama")
    architectures.zero_some(model)
    model.save_pretrained(tmp_path / "zeros")
    batch = architectures.inputs("llama")
    run(capsys, "export", tmp_path / "zeros", "--to", "compact", "--output", tmp_path / "small")
    small = load_compact(tmp_path / "small")
    torch.testing.assert_close(architectures.logits(small, batch), architectures.logits(model, batch))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    assert sizes[0] < sizes[1]


def test_where_a_file_goes(tmp_path):
    with pytest.raises(ValueError, match="is a folder. Name a file, such as .*model.onnx"):
        export_onnx(make_bert(), tmp_path)
    assert export_onnx(make_bert(), tmp_path / "new" / "model.onnx") == str(tmp_path / "new" / "model.onnx")
    assert (tmp_path / "new" / "model.onnx").stat().st_size > 0
