"""Every tensor that is written is compared with its checksum when it is read: adapters, checkpoints, compact models."""

import copy
import json
import zlib

import pytest
import torch
from helpers.files import compact, edit
from helpers.methods import adapter
from helpers.models import logits, make_bert, make_masked_lm
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_prune import MaskFormatError, SMPConfig, load_compact
from peft_prune.cli import main
from peft_prune.structure.seal import SEAL


FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder, method, final=True, **fields):
    """Save an adapter with a classifier on a tiny BERT."""
    model = adapter(make_bert(), method, final, task_type="SEQ_CLS", **fields)
    model.save_pretrained(folder)
    return model


def edit_tensors(folder, change, name=FILE):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def ending(tensors, end):
    return next(key for key in tensors if key.endswith(end))


def flip(end):
    def change(tensors):
        data = tensors[ending(tensors, end)].view(-1).view(torch.uint8)
        data[1] ^= 4

    return change


# item 9: kind of adapter, whether final, tensor
TENSORS = [
    ("dsee", True, ".dsee_A"),
    ("dsee", True, ".dsee_B"),
    ("dsee", True, ".dsee_sparse"),
    ("dsee", True, ".dsee_support"),
    ("dsee", True, "classifier.weight"),
    ("dsee", False, ".dsee_B"),
    ("dsee", False, ".dsee_bits"),
    ("smp", True, "classifier.bias"),
    ("smp", False, ".smp_scores"),
    ("smp", False, ".smp_progress"),
    ("movement", False, ".movement_update"),
    ("movement", False, "classifier.weight"),
    ("ppruning", True, "classifier.weight"),
]


@pytest.mark.parametrize(("method", "final", "end"), TENSORS)
def test_item_9_a_flipped_bit_is_rejected(tmp_path, method, final, end):
    saved(tmp_path, method, final)
    edit_tensors(tmp_path, flip(end))
    with pytest.raises(MaskFormatError, match=f"{end}.*does not match its record.*check_tensors|has positions from"):
        PeftModel.from_pretrained(make_bert(), tmp_path)
    if end == ".dsee_support":
        return  # its places have to lie in the matrix in any case
    edit(tmp_path, lambda config: config.update(check_tensors=False))
    PeftModel.from_pretrained(make_bert(), tmp_path)


@pytest.mark.parametrize(("method", "final", "end"), TENSORS)
def test_item_9_wrong_dtypes_are_rejected(tmp_path, method, final, end):
    saved(tmp_path, method, final)
    edit_tensors(tmp_path, lambda t: t.update({ending(t, end): t[ending(t, end)].double()}))
    with pytest.raises(MaskFormatError, match=f"{end}.*float64"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


def test_item_9_low_rank_scores(tmp_path):
    for end in ("scores_A", "scores_B"):
        saved(tmp_path, "smp", False, score="low_rank", score_rank=2)
        edit_tensors(tmp_path, flip(end))
        with pytest.raises(MaskFormatError, match=end):
            PeftModel.from_pretrained(make_bert(), tmp_path)


@pytest.mark.parametrize("end", [".dsee_B", "classifier.weight"])
def test_item_9_nan_is_rejected_even_without_a_record(tmp_path, end):
    saved(tmp_path, "dsee")
    edit_tensors(tmp_path, lambda t: t[ending(t, end)].view(-1).__setitem__(0, float("nan")))
    edit(tmp_path, lambda config: config.pop("checksums"))  # as an older version wrote it
    with pytest.raises(MaskFormatError, match=f"{end}.*NaN"):
        PeftModel.from_pretrained(make_bert(), tmp_path)


@pytest.mark.parametrize("method", ["dsee", "smp"])
def test_item_9_missing_and_superfluous_tensors(tmp_path, method):
    saved(tmp_path / "one", method)
    edit_tensors(tmp_path / "one", lambda t: t.pop(ending(t, "classifier.weight")))
    with pytest.raises(MaskFormatError, match=r"holds no .*classifier.weight"):
        PeftModel.from_pretrained(make_bert(), tmp_path / "one")
    saved(tmp_path / "two", method)
    edit_tensors(tmp_path / "two", lambda t: t.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)}))
    with pytest.raises(MaskFormatError, match=r"pooler.dense.bias.*does not know"):
        PeftModel.from_pretrained(make_bert(), tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "final", "change"),
    [
        ("dsee", True, {"lora_alpha": 32.0}),
        ("dsee", True, {"keep_sparse": True}),
        ("smp", False, {"score_init": "zeros", "score": "low_rank"}),
        ("smp", False, {"sparsity_pattern": {"query": 0.1}}),
        ("movement", False, {"threshold": 0.3}),
        ("smp", True, {"modules_to_save": ["score"]}),
    ],
)
def test_item_9_changed_fields_are_rejected(tmp_path, method, final, change):
    saved(tmp_path, method, final)
    edit(tmp_path, lambda config: config.update(change))
    with pytest.raises(ValueError, match=r"adapter_config.json do not match their checksum.*check_tensors"):
        PeftModel.from_pretrained(make_bert(), tmp_path)
    edit(tmp_path, lambda config: config.update(check_tensors=False))
    assert not PeftConfig.from_pretrained(tmp_path).check_tensors


def test_item_9_changed_label_words_are_rejected(tmp_path):
    spec = {"task": "SEQ_CLS", "words": ["bad", "good"], "token_ids": [5, 6], "mask_token_id": 4}
    adapter(make_masked_lm(), "smp", verbalizer=spec).save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config["verbalizer"].update(token_ids=[6, 5]))
    with pytest.raises(ValueError, match="checksum"):
        PeftModel.from_pretrained(make_masked_lm(), tmp_path)


@pytest.mark.parametrize("method", ["smp", "movement", "dsee", "ppruning"])
def test_fields_that_anybody_may_change(tmp_path, batch, method):
    expected = logits(saved(tmp_path, method), batch)
    free = {"base_model_name_or_path": "/elsewhere", "revision": "x", "inference_mode": False, "check_base": False}
    edit(tmp_path, lambda config: config.update(free))
    assert torch.equal(logits(PeftModel.from_pretrained(make_bert(), tmp_path), batch), expected)


@pytest.mark.parametrize("method", ["smp", "movement", "dsee"])
@pytest.mark.parametrize("final", [True, False])
def test_half_precision_saved_again_and_other_names(tmp_path, batch, method, final):
    """Checksums are of what is saved, whatever its dtype and the adapter's name, and of no earlier state."""
    model = saved(tmp_path / "one", method, final)
    half = model.half()
    half.save_pretrained(tmp_path / "half")
    PeftModel.from_pretrained(make_bert(), tmp_path / "half")
    again = PeftModel.from_pretrained(make_bert(), tmp_path / "one", adapter_name="mine", is_trainable=True)
    with torch.no_grad():
        for parameter in (p for p in again.parameters() if p.requires_grad):
            parameter.mul_(1.5)
    state = get_peft_model_state_dict(again, adapter_name="mine")
    again.save_pretrained(tmp_path / "two")
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "two" / "mine")
    assert torch.equal(logits(loaded, batch), logits(again, batch))
    set_peft_model_state_dict(loaded, {key: 2 * t if t.is_floating_point() else t for key, t in state.items()})
    again.save_pretrained(tmp_path / "two", safe_serialization=False)


def test_a_config_in_python_may_be_changed(tmp_path):
    """What the file says is checked when it is read; what a program does with it then is its own business."""
    saved(tmp_path, "dsee")
    config = PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 1.0
    for _ in range(2):
        PeftModel.from_pretrained(make_bert(), tmp_path, config=config)
    fresh = copy.copy(PeftConfig.from_pretrained(tmp_path))
    fresh.save_pretrained(tmp_path / "other")
    assert PeftConfig.from_pretrained(tmp_path / "other").to_dict() == fresh.to_dict() | {"checksums": None}


def test_item_9_a_state_loaded_under_a_name_that_is_there(tmp_path):
    """`Trainer` resumes and takes the best checkpoint this way."""
    model = saved(tmp_path, "smp", final=False)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    edit_tensors(tmp_path, flip(".smp_scores"))
    with pytest.raises(MaskFormatError, match="smp_scores"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    (tmp_path / CONFIG).unlink()
    model.load_adapter(tmp_path, "default", is_trainable=True)  # no record to compare with


@pytest.mark.parametrize(("final", "end"), [(True, ".dsee_B"), (True, ".dsee_support"), (False, ".dsee_A")])
def test_item_9_loaded_by_transformers(tmp_path, batch, final, end):
    """Its `load_adapter` calls no hook of a tuner."""
    model = adapter(make_bert(), "dsee", final)
    model.save_pretrained(tmp_path)
    good = make_bert()
    good.load_adapter(str(tmp_path))
    assert torch.equal(logits(good, batch), logits(model, batch))
    good.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(make_bert(), tmp_path / "again")
    edit_tensors(tmp_path, flip(end))
    with pytest.raises(MaskFormatError, match=end):
        make_bert().load_adapter(str(tmp_path))


def test_item_9_saved_by_transformers_over_another_adapter(tmp_path):
    """Transformers writes the config before the tensors: the file that is there is not the one to record."""
    adapter(make_bert(), "dsee").save_pretrained(tmp_path / "source")
    base = make_bert()
    base.load_adapter(str(tmp_path / "source"))
    adapter(make_bert(), "dsee", seed=5).save_pretrained(tmp_path / "target")
    base.save_pretrained(tmp_path / "target")
    PeftModel.from_pretrained(make_bert(), tmp_path / "target")
    edit_tensors(tmp_path / "target", flip(".dsee_A"))
    with pytest.raises(MaskFormatError, match="dsee_A"):
        PeftModel.from_pretrained(make_bert(), tmp_path / "target")


def test_item_9_verify(tmp_path, capsys):
    make_bert().save_pretrained(tmp_path / "base")
    saved(tmp_path / "mask", "dsee")
    command = ["verify", str(tmp_path / "mask"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    edit_tensors(tmp_path / "mask", flip("classifier.weight"))
    assert main(command) == 1
    assert "classifier.weight" in capsys.readouterr().err


def test_the_record_is_the_crc_of_the_bytes(tmp_path):
    saved(tmp_path, "dsee")
    record = json.loads((tmp_path / CONFIG).read_text())["checksums"]["tensors"]
    tensors = load_file(tmp_path / FILE)
    others = {key: t for key, t in tensors.items() if not key.endswith("_mask")}
    assert {f"base_model.model.{key}" for key in record} == others.keys()
    for key, tensor in others.items():
        info = record[key.removeprefix("base_model.model.")]
        assert info["shape"] == list(tensor.shape) and f"torch.{info['dtype']}" == str(tensor.dtype)
        assert info["crc32"] == f"{zlib.crc32(tensor.numpy().tobytes()):08x}"


# ------------------------------------------------------------------ compact models


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_item_9_compact_tensors(tmp_path, shard):
    compact(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(names) > 1) == (shard is not None)
    load_compact(tmp_path)
    load_compact(tmp_path, dtype=torch.bfloat16)
    edit_tensors(tmp_path, lambda t: flip(next(iter(t)))(t), names[-1])
    with pytest.raises(MaskFormatError, match=r"does not match its record.*check_tensors=False"):
        load_compact(tmp_path)
    load_compact(tmp_path, check_tensors=False)


@pytest.mark.parametrize("change", [{"layer_norm_eps": 0.1}, {"hidden_act": "relu"}, {"dtype": "float16"}])
def test_item_9_compact_config(tmp_path, change):
    compact(tmp_path)
    edit(tmp_path, lambda config: config.update(transformers_version="9"), "config.json")
    load_compact(tmp_path)
    edit(tmp_path, lambda config: config.update(change), "config.json")
    with pytest.raises(ValueError, match=r"config.json do not match their checksum"):
        load_compact(tmp_path)


def test_item_9_compact_saved_by_its_own_method_and_older_ones(tmp_path):
    compact(tmp_path / "one")
    model = load_compact(tmp_path / "one")
    with torch.no_grad():
        model.classifier.weight.add_(1)
    model.save_pretrained(tmp_path / "two")  # as Trainer does
    again = load_compact(tmp_path / "two")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    edit_tensors(tmp_path / "two", flip("classifier.weight"), "model.safetensors")
    with pytest.raises(MaskFormatError):
        load_compact(tmp_path / "two")
    edit(tmp_path / "two", lambda config: config.pop(SEAL), "config.json")
    load_compact(tmp_path / "two")


def test_models_that_are_not_ours_are_saved_as_ever(tmp_path):
    make_bert().save_pretrained(tmp_path)
    assert SEAL not in json.loads((tmp_path / "config.json").read_text())
    assert SMPConfig().checksums is None
