"""`import peft_prune` is all that PEFT needs."""

import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from peft_prune import SMPConfig, SMPModel
from peft_prune.tuner.registration import register_method


def test_member_behaves_like_peft_s_own():
    member = PeftType("SMP")
    assert member is PeftType.SMP is PeftType["SMP"] and member == "SMP" and isinstance(member, PeftType)
    assert member in list(PeftType) and "SMP" in list(PeftType) and len(PeftType) == len(list(PeftType))
    assert pickle.loads(pickle.dumps(member)) is member
    assert (member.name, member.value, repr(member)) == ("SMP", "SMP", "<PeftType.SMP: 'SMP'>")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SMPConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SMPModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "smp_"


def test_registering_twice_does_nothing():
    before = list(PeftType)
    register_method("smp", SMPConfig, SMPModel)
    assert list(PeftType) == before


def test_taken_names_are_told():
    with pytest.raises(ImportError, match="'LORA'.*peft.tuners.lora.config.LoraConfig"):
        register_method("lora", SMPConfig, SMPModel)

    class Other(SMPConfig):
        pass

    with pytest.raises(ImportError, match="peft_prune.methods.smp.SMPConfig"):
        register_method("smp", Other, SMPModel)


def test_without_the_import_peft_says_that_it_does_not_know_the_type(tmp_path):
    SMPConfig().save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert bare.returncode != 0 and "KeyError: 'SMP'" in bare.stderr
    with_import = subprocess.run([sys.executable, "-c", "import peft_prune; " + code], capture_output=True, text=True)
    assert with_import.returncode == 0, with_import.stderr
