"""Configs from strangers: a typed error that names the field, in bounded time and memory, and nothing imported."""

import json
import sys
import tracemalloc

import pytest
from helpers.files import compact, edit
from helpers.methods import adapter
from helpers.models import make_bert, make_masked_lm
from peft import PeftModel

from peft_prune import DSEEConfig, SMPConfig, load_compact
from peft_prune.cli import main
from peft_prune.matching import matches


HOSTILE = "(([a-z._0-9])+)+[!]"


def hostile(folder, method, final=True, make=make_bert, given=None, **changes):
    """An adapter whose config was changed by somebody who knows `check_tensors`."""
    adapter(make(), method, final, **(given or {})).save_pretrained(folder)
    edit(folder, lambda config: config.update(changes, check_tensors=False))


def test_item_14_a_mask_of_a_huge_shape(tmp_path, capsys):
    make_bert().save_pretrained(tmp_path / "base")
    hostile(tmp_path / "mask", "smp")

    def lie(config):
        for info in config["mask_info"].values():
            info["shape"] = [32768, 32768]

    edit(tmp_path / "mask", lie)
    mask = str(tmp_path / "mask")
    for command in (["verify", mask, "--base", str(tmp_path / "base")], ["diff", mask, mask], ["inspect", mask]):
        tracemalloc.start()
        code = main(command)
        assert tracemalloc.get_traced_memory()[1] < 2**26
        tracemalloc.stop()
        error = capsys.readouterr().err
        assert code == (0 if command[0] == "inspect" else 1)
        assert command[0] == "inspect" or "32768" in error


def test_item_14_diff_of_other_shapes_unpacks_nothing(tmp_path, capsys):
    for name, make in (("one", make_bert), ("two", lambda: make_bert(hidden_size=64))):
        adapter(make(), "smp").save_pretrained(tmp_path / name)
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert "(32, 32)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "mapping",
    [
        {"parent_library": "antigravity", "base_model_class": "BertForSequenceClassification"},
        {"parent_library": "transformers", "base_model_class": "AutoTokenizer"},
        {"parent_library": "transformers.utils.import_utils", "base_model_class": "os"},
        {"parent_library": 5, "base_model_class": None},
        {"parent_library": "transformers"},
        "antigravity",
    ],
)
def test_item_19_auto_mapping_imports_nothing(tmp_path, mapping, capsys):
    make_bert().save_pretrained(tmp_path / "base")
    hostile(tmp_path / "mask", "smp", auto_mapping=mapping)
    sys.modules.pop("antigravity", None)
    assert main(["verify", str(tmp_path / "mask"), "--base", str(tmp_path / "base")]) == 2
    assert "antigravity" not in sys.modules
    assert "auto_mapping" in capsys.readouterr().err


def test_item_19_transformers_own_classes_still_load(tmp_path):
    make_bert().save_pretrained(tmp_path / "base")
    adapter(make_bert(), "smp").save_pretrained(tmp_path / "mask")
    assert json.loads((tmp_path / "mask" / "adapter_config.json").read_text())["auto_mapping"]
    assert main(["verify", str(tmp_path / "mask"), "--base", str(tmp_path / "base")]) == 0


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("change", [{"r": 3_000_000}, {"num_sparse": 3_000_000_000}])
def test_item_20_sizes_beyond_the_matrix(tmp_path, final, change):
    hostile(tmp_path, "dsee", final, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=3000000"):
        PeftModel.from_pretrained(make_bert(), tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=3000000"):
        adapter(make_bert(), "dsee", **change)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("field", "method", "final"),
    [
        ("target_modules", "smp", True),
        ("target_modules", "smp", False),
        ("exclude_modules", "smp", False),
        ("sparsity_pattern", "smp", False),
        ("prune_target_modules", "dsee", False),
        ("layers_pattern", "smp", False),
        ("modules_to_save", "smp", False),
    ],
)
def test_item_20_patterns_that_would_not_end(tmp_path, field, method, final):
    values = {"sparsity_pattern": {HOSTILE: 0.5}, "layers_pattern": [HOSTILE], "modules_to_save": [HOSTILE]}
    changes = {field: values.get(field, HOSTILE)}
    if field == "layers_pattern":
        changes["layers_to_transform"] = [0]
    hostile(tmp_path, method, final, **changes)
    try:  # what ends is fine: where a pattern matches nothing that is not needed, the adapter may load
        PeftModel.from_pretrained(make_bert(), tmp_path)
    except ValueError:
        return
    assert field == "exclude_modules"


@pytest.mark.timeout(60)
def test_item_20_a_pattern_that_takes_too_long_is_named():
    with pytest.raises(ValueError, match="target_modules=.*takes more than 1 s.*list of names"):
        matches(
            "target_modules", r"([a-z._0-9]|[a-z._0-9][a-z._0-9])*[!A]", "bert.encoder.layer.0.attention.self.query"
        )


def test_item_20_honest_patterns_name_what_they_did():
    """As PEFT matches them, independently: by the modules that are pruned."""

    def pruned(**fields):
        model = adapter(make_bert(), "smp", **fields)
        return sorted(name for name, m in model.base_model.model.named_modules() if hasattr(m, "smp_mask"))

    queries = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert pruned(target_modules=r".*\.(\w+\.)*query") == pruned(target_modules=["query"]) == queries
    assert pruned(target_modules=["query"], exclude_modules=r".*layer\.0\..*") == queries[1:]
    assert pruned(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer") == queries[1:]
    assert pruned(target_modules=r".*layer\.1.*query") == queries[1:]


@pytest.mark.parametrize("info", ["x", 5, ["a"], [], {"a": 5}, {"a": None}, True])
def test_item_21_mask_info(tmp_path, info):
    hostile(tmp_path, "smp", mask_info=info)
    with pytest.raises(ValueError, match="mask_info"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


SPEC = {"task": "SEQ_CLS", "words": ["bad", "good"], "token_ids": [5, 6], "mask_token_id": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [5, 10**9]}, {"token_ids": [5, -1]}, {"token_ids": [5, "6"]}, {"token_ids": [5, 5]},
        {"token_ids": [5]}, {"token_ids": None}, {"words": [1, 2]}, {"words": "ab"}, {"task": "NER"}, {"task": []},
        {"mask_token_id": "4"}, {"mask_token_id": 10**9}, {"more": 1},
    ],
)  # fmt: skip
def test_item_21_verbalizers(tmp_path, change):
    hostile(tmp_path, "smp", make=make_masked_lm, given={"verbalizer": SPEC}, verbalizer=SPEC | change)
    with pytest.raises(ValueError, match="verbalizer"):
        PeftModel.from_pretrained(make_masked_lm(), tmp_path)


@pytest.mark.parametrize("value", ["x", 5, ["SEQ_CLS"]])
def test_item_21_a_verbalizer_is_a_dict(value):
    with pytest.raises(ValueError, match="verbalizer"):
        SMPConfig(verbalizer=value)


@pytest.mark.parametrize("names", [["AutoTokenizer"], ["BertConfig"], ["os"], [5], [None], "BertModel", 5, None, []])
def test_item_21_architectures(tmp_path, names):
    compact(tmp_path)
    edit(tmp_path, lambda config: config.update(architectures=names), "config.json")
    with pytest.raises((ValueError, TypeError), match="architectures"):
        load_compact(tmp_path, check_tensors=False)


@pytest.mark.parametrize("name", ["M0VEMENT", "LORA", 5, None, [], {}])
def test_item_21_peft_type(tmp_path, name):
    hostile(tmp_path, "smp", peft_type=name)
    with pytest.raises(ValueError, match="peft_type"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": [1]}, {"target_modules": 5}, {"target_modules": "("}, {"exclude_modules": {"a": 1}},
        {"modules_to_save": 5}, {"modules_to_save": "classifier"}, {"layers_to_transform": ["a"]},
        {"layers_to_transform": {}}, {"mask_format": [3]}, {"mask_format": "3"}, {"check_tensors": "no"},
        {"granularity": []}, {"target_modules": [[]]}, {"exclude_modules": [{}]}, {"sparsity_pattern": {"(": 0.5}},
        {"checksums": 5}, {"checksums": {"config": 1, "tensors": {}}},
        {"checksums": {"config": 1, "fields": ["r"], "tensors": {"a": 1}}},
    ],
)  # fmt: skip
def test_item_21_types_of_fields(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SMPConfig(**change)
    with pytest.raises(ValueError, match="prune_target_modules"):
        DSEEConfig(prune_target_modules=5)
