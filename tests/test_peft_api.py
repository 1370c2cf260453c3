"""The one door to PEFT: every private name that we use is there, and takes what we pass."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers.models import make_bert
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peft_prune import peft_api
from peft_prune.methods import SMPModel


PACKAGE = Path(peft_api.__file__).parent
# what we call or override, with the arguments that we pass or accept
SIGNATURES = {
    (BaseTuner, "inject_adapter"): ["model", "adapter_name"],
    (BaseTuner, "merge_adapter"): ["adapter_names", "safe_merge"],
    (BaseTuner, "_unload_and_optionally_merge"): ["merge", "progressbar", "safe_merge", "adapter_names"],
    (BaseTuner, "_prepare_adapter_config"): ["peft_config", "model_config"],
    (BaseTuner, "_prepare_model"): ["peft_config", "model"],
    (BaseTuner, "_create_and_replace"): [
        "peft_config", "adapter_name", "target", "target_name", "parent", "current_key",
    ],
    (BaseTuner, "_replace_module"): ["parent", "child_name", "new_module", "child"],
    (BaseTuner, "_check_target_module_exists"): ["peft_config", "key"],
    (BaseTuner, "_get_adapter_state_dict"): [
        "model", "config", "adapter_name", "state_dict", "unwanted_adapter_names",
    ],
    (BaseTuner, "_remap_adapter_state_dict_for_load"): ["model", "config", "adapter_name", "state_dict"],
    (BaseTuner, "_remove_adapter_name_from_key"): ["key", "adapter_name"],
    (BaseTuner, "_check_merge_allowed"): [],
    (PeftModel, "_enable_peft_forward_hooks"): [],
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer"): ["adapter_name"],
    (BaseTunerLayer, "set_adapter"): ["adapter_names", "inference_mode"],
    (BaseTunerLayer, "delete_adapter"): ["adapter_name"],
    (BaseTunerLayer, "_get_available_adapters"): [],
}  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda part: getattr(part, "__name__", part))
def test_what_we_override_is_there_with_these_arguments(owner, name):
    parameters = inspect.signature(inspect.unwrap(getattr(owner, name))).parameters
    missing = [arg for arg in SIGNATURES[owner, name] if arg not in parameters]
    assert not missing, f"{owner.__name__}.{name}{inspect.signature(getattr(owner, name))} has no {missing}"


@pytest.mark.parametrize(
    ("owner", "name"), peft_api.METHODS_WE_REPLACE, ids=lambda part: getattr(part, "__name__", part)
)
def test_what_we_replace_is_replaced_once_and_calls_the_original(owner, name):
    replacement = vars(owner)[name]
    replacement = getattr(replacement, "__func__", replacement)
    assert replacement.replaced_by_peft_prune and callable(replacement.__wrapped__)
    peft_api.replace_method(owner, name, lambda original: pytest.fail("replaced twice"))
    assert getattr(vars(owner)[name], "__func__", vars(owner)[name]) is replacement


def test_only_listed_methods_can_be_replaced():
    with pytest.raises(KeyError, match="not listed"):
        peft_api.replace_method(BaseTuner, "unload", lambda original: original)


def test_nothing_private_of_peft_is_imported_elsewhere():
    """The door is the only one: other files take PEFT's documented names from `peft` and `peft.utils`."""
    inside = re.compile(r"^\s*(?:from|import) peft\.(?:config|tuners|mapping|utils\.(?:other|constants))", re.MULTILINE)
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "peft_api.py"]
    assert len(others) > 90
    assert not [str(path.relative_to(PACKAGE)) for path in others if inside.search(path.read_text())]


def test_names_behind_the_door_do_what_we_use_them_for():
    buffers = peft_api.BufferDict(persistent=True)
    buffers["a"] = torch.zeros(2)
    assert "a" in buffers and list(nn.ModuleDict({"b": buffers}).state_dict()) == ["b.a"]
    model = make_bert()
    config = peft_api.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("SMP")](target_modules=peft_api.ALL_LINEAR)
    config = peft_api.include_all_linear(config, model)
    assert "query" in {name.split(".")[-1] for name in config.target_modules}
    assert peft_api.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType("SMP")] == SMPModel.prefix == "smp_"
    assert "q_proj" in peft_api.LORA_TARGETS["llama"]
