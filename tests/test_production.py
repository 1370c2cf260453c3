"""The table of docs/production.md, cell by cell: what loads which smaller model, and the error where nothing does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import architectures
from helpers.architectures import ARCHITECTURES
from helpers.onnx_session import OnnxModel
from helpers.without_package import expect, load_there

from peft_prune import load_compact, model_size, save_compact, save_standard
from peft_prune.report import export_onnx, save_gguf
from peft_prune.structure.depth import find_stack, remove_blocks
from peft_prune.structure.shrink import keep_units
from peft_prune.structure.sites import HEADS, find_sites


PAGE = (Path(__file__).parents[1] / "docs" / "production.md").read_text()
ROW = re.compile(r"^\| ([^|]+) \| (neurons alike|all alike|free|layers dropped) \| (.*) \|$", re.MULTILINE)
COLUMNS = ("AutoModel", "GGUF", "onnxruntime", "load_compact")
SPELLED = {
    "Gemma 3": "gemma3_text", "GPT-NeoX": "gpt_neox", "GPT-2": "gpt2", "GPT-J": "gptj", "XLM-RoBERTa": "xlm-roberta",
    "T5": "t5 t5-gated", "DeBERTa": "deberta-v2 deberta-v3",
}  # fmt: skip
WHY = {
    "AutoModel": "Transformers has one number for all layers|no config for a .* with fewer heads",
    "GGUF": "save_gguf writes causal language models of the Llama family",
}


def read_table():
    """What the page says: `(architecture, shapes, column) -> cell`."""
    cells = {}
    for names, shapes, rest in ROW.findall(PAGE):
        for name in names.split(", "):
            for kind in SPELLED.get(name, name.lower()).split():
                for column, cell in zip(COLUMNS, rest.split(" | "), strict=True):
                    cells[kind, shapes, column] = cell
    return cells


CELLS = read_table()
WORKS = [key for key, cell in CELLS.items() if cell.startswith(("yes", "written"))]
FAILS = [key for key, cell in CELLS.items() if cell.startswith("no")]
NEVER = [key for key, cell in CELLS.items() if cell == "–"]


def of(column, keys):
    return [(name, shapes) for name, shapes, where in keys if where == column]


def smaller(name, shapes):
    """A model from which heads and neurons, or its second layer, were taken out."""
    model = architectures.make(name)
    if shapes == "layers dropped":
        return remove_blocks(model, find_stack(model).blocks[1:2])
    kept = {}
    for i, site in enumerate(find_sites(model)):
        half = torch.arange(max(1, site.units // 2))
        if shapes == "free":
            kept[site.output] = torch.arange(1 + i % site.units if site.kind == HEADS else 40 - 2 * i)
        elif site.kind != HEADS:
            kept[site.output] = half + i  # others in each layer, and as many
        elif shapes == "all alike":
            kept[site.output] = half
    return keep_units(model, kept)


def test_the_table_has_every_architecture_and_every_cell():
    shapes = ("neurons alike", "all alike", "free", "layers dropped")
    assert set(CELLS) == {(n, s, c) for n in ARCHITECTURES for s in shapes for c in COLUMNS}
    assert len(WORKS) + len(FAILS) + len(NEVER) == len(CELLS)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    for name, shapes in of("AutoModel", WORKS):
        model, place = smaller(name, shapes), folder / f"{name}, {shapes}"
        save_standard(model, place)
        expect(model, place, ARCHITECTURES[name][1].__name__, architectures.inputs(name))
    return load_there(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shapes"), of("AutoModel", WORKS))
def test_auto_model_loads_it_where_this_package_is_not(there, name, shapes):
    expected, found = there[f"{name}, {shapes}"]
    torch.testing.assert_close(found["logits"], expected["logits"])
    if expected["generates"]:
        assert torch.equal(found["ids"], expected["ids"])


@pytest.mark.parametrize(("name", "shapes"), of("load_compact", WORKS))
def test_load_compact_loads_it(name, shapes, tmp_path):
    model, batch = smaller(name, shapes), architectures.inputs(name)
    save_compact(model, tmp_path)
    loaded = load_compact(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(architectures.logits(loaded, batch), architectures.logits(model, batch))
    assert model_size(loaded) == model_size(model)
    assert model_size(loaded).parameters < model_size(architectures.make(name)).parameters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "shapes"), of("onnxruntime", WORKS))
def test_onnxruntime_answers_as_transformers_does(name, shapes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, batch, path = smaller(name, shapes), architectures.inputs(name), tmp_path / "model.onnx"
    if "cache" not in CELLS[name, shapes, "onnxruntime"]:
        session = onnxruntime.InferenceSession(export_onnx(model, path))
        found = session.run(["logits"], {key: value.numpy() for key, value in batch.items()})[0]
        np.testing.assert_allclose(found, architectures.logits(model, batch).numpy(), atol=1e-4, rtol=1e-4)
        return
    other = OnnxModel(export_onnx(model, path, use_cache=True))
    ids = batch["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert np.array_equal(other.greedy(ids.numpy(), np.ones_like(ids.numpy()), 8), expected.numpy())


@pytest.mark.parametrize(("name", "shapes"), of("GGUF", WORKS))
def test_a_gguf_file_holds_the_shapes_of_each_layer(name, shapes, tmp_path):
    gguf = pytest.importorskip("gguf")
    model = smaller(name, shapes)
    reader = gguf.GGUFReader(save_gguf(model, tmp_path / "model.gguf", dtype="float32"))
    arch = reader.fields["general.architecture"].contents()
    assert arch == ("deci" if shapes == "free" else "llama")
    assert arch in CELLS[name, shapes, "GGUF"]
    assert reader.fields[f"{arch}.block_count"].contents() == len(model.model.layers)
    weights = {tensor.name: tensor.data for tensor in reader.tensors}
    for i, layer in enumerate(model.model.layers):
        for part, module in (("ffn_down", layer.mlp.down_proj), ("attn_v", layer.self_attn.v_proj)):
            np.testing.assert_array_equal(weights[f"blk.{i}.{part}.weight"], module.weight.detach())


@pytest.mark.parametrize(("name", "shapes", "column"), FAILS)
def test_where_it_says_no_an_error_says_why(name, shapes, column, tmp_path):
    model = smaller(name, shapes)
    with pytest.raises(ValueError, match=WHY[column]):
        save_standard(model, tmp_path / "a") if column == "AutoModel" else save_gguf(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("name", "shapes"), of("load_compact", NEVER))
def test_there_is_no_such_model(name, shapes):
    with pytest.raises(ValueError, match="Whole layers cannot be removed from"):
        smaller(name, shapes)
