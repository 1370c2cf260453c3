"""Every field of the config is checked, and the message names field, value and fix."""

import copy
import dataclasses
import json
import pickle

import pytest
from peft import PeftConfig, TaskType

from peft_prune import SMPConfig


BAD = [
    ({"sparsity": 1.2}, r"sparsity=1\.2 must be a number in \[0, 1\)"),
    ({"sparsity": -0.1}, r"sparsity=-0\.1"),
    ({"sparsity": 1.0}, r"sparsity=1\.0"),
    ({"sparsity": "0.9"}, r"sparsity='0\.9'"),
    ({"sparsity": True}, r"sparsity=True"),
    ({"sparsity": float("nan")}, r"sparsity=nan"),
    ({"density": 0}, r"density=0 would remove every weight"),
    ({"density": 1.5}, r"density=1\.5"),
    ({"sparsity": 0.9, "density": 0.1}, r"Give sparsity=0\.9 or density=0\.1, not both"),
    ({"sparsity": 0.5, "density": 0.5}, r"not both"),
    ({"granularity": "rows"}, r"granularity='rows'"),
    ({"granularity": "2:4", "sparsity": 0.9}, r"sparsity=0\.9 cannot be reached with granularity='2:4'"),
    ({"granularity": "2:4", "allocation": "score"}, r"allocation='score'"),
    ({"granularity": "2:4", "sparsity_pattern": {"query": 0.5}}, r"sparsity_pattern="),
    ({"sparsity_pattern": {"query": 1.5}}, r"sparsity_pattern\['query'\]=1\.5"),
    ({"sparsity_pattern": ["query"]}, r"sparsity_pattern=\['query'\] must be a dict"),
    ({"sparsity_pattern": {"(": 0.5}}, r"sparsity_pattern: '\(' is not a module name or regular expression"),
    ({"allocation": "uniform"}, r"allocation='uniform' is unknown\. Use one of 'local', 'row', 'score'"),
    ({"allocation_temperature": 0}, r"allocation_temperature=0"),
    ({"initial_sparsity": 0.7, "sparsity": 0.5}, r"initial_sparsity=0\.7"),
    ({"sparsity_schedule": "exponential"}, r"sparsity_schedule='exponential'"),
    ({"schedule_start": 1.0}, r"schedule_start=1\.0"),
    ({"schedule_end": 1.1}, r"schedule_end=1\.1"),
    ({"schedule_start": 0.5, "schedule_end": 0.4}, r"schedule_end=0\.4 must come after schedule_start=0\.5"),
    ({"total_steps": 0}, r"total_steps=0"),
    ({"total_steps": 1.5}, r"total_steps=1\.5"),
    ({"penalty": -1}, r"penalty=-1"),
    ({"penalty": float("nan")}, r"penalty=nan"),
    ({"score_init": float("nan")}, r"score_init=nan"),
    ({"init_weights": "no"}, r"init_weights='no' must be True or False"),
    ({"check_base": 0}, r"check_base=0 must be True or False"),
    ({"total_steps": True}, r"total_steps=True"),
    ({"penalty_schedule": "square"}, r"penalty_schedule='square'"),
    ({"score_init": "ones"}, r"score_init='ones'"),
    ({"score_lr": -1.0}, r"score_lr=-1\.0"),
    ({"task_type": "CLASSIFY"}, r"CLASSIFY"),
    ({"layers_pattern": "layers"}, r"layers_pattern='layers'"),
    ({"layers_to_transform": [0], "target_modules": ".*query"}, r"layers_to_transform=\[0\]"),
    ({"mask_format": 5}, r"mask_format=5 .*pip install -U peft_prune"),
    ({"finalized": True}, r"finalized=True without `mask_info`"),
    ({"finalized": True, "mask_info": {"a": {"shape": [1, -2], "kept": 0, "crc32": "0"}}}, r"mask_info\['a'\]"),
    ({"finalized": True, "mask_info": {"a": {"shape": [2, 2], "kept": 5, "crc32": "0"}}}, r"mask_info\['a'\]"),
    (
        {"finalized": True, "mask_info": {"a": {"shape": [2, 2], "kept": 1, "bytes": 2**62, "crc32": "0"}}},
        r"mask_info\['a'\]",
    ),
    ({"finalized": True, "mask_info": {"a": None}}, r"mask_info\['a'\]"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_input_is_told(fields, message):
    with pytest.raises(ValueError, match=message):
        SMPConfig(**fields)


def test_defaults_are_the_papers():
    config = SMPConfig()
    assert (config.sparsity, config.density, config.allocation) == (0.5, 0.5, "local")
    assert (config.penalty, config.schedule_end, config.score_lr) == (400.0, 0.6, 2e-2)
    assert config.score_init == "magnitude"  # docs/smp.md says why it is not the paper's
    assert SMPConfig(sparsity=0.9).temperature == 1.0
    assert SMPConfig(density=0.5).temperature == SMPConfig(density=0.7).temperature == 3.0
    assert SMPConfig(allocation_temperature=4).temperature == 4


def test_density_is_another_way_to_say_sparsity():
    config = SMPConfig(density=0.1)
    assert config.sparsity == pytest.approx(0.9) and config.density == pytest.approx(0.1)
    config.sparsity = 0.7
    assert config.density == pytest.approx(0.3)
    assert SMPConfig(granularity="1:4").sparsity == 0.75
    assert dataclasses.replace(config, penalty=1.0).sparsity == pytest.approx(0.7)
    assert dataclasses.replace(config, sparsity=0.2).density == pytest.approx(0.8)
    assert SMPConfig(density=config.density).sparsity == pytest.approx(0.7)


@pytest.mark.parametrize(
    "config",
    [
        SMPConfig(task_type=TaskType.SEQ_CLS, density=0.1, target_modules=["query", "key"]),
        SMPConfig(sparsity_pattern={"query": 0.3}, allocation="score", layers_to_transform=[0, 1]),
        SMPConfig(granularity="2:4", exclude_modules=["pooler"], target_modules="all-linear"),
        SMPConfig(
            finalized=True,
            mask_info={"encoder.query": {"shape": [4, 4], "kept": 3, "crc32": "00ff00ff"}},
            sparsity=0.9,
        ),
    ],
)
def test_json_pickle_and_copy(config, tmp_path):
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "SMP" and "density" not in stored
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is SMPConfig
    assert loaded.to_dict() == SMPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_what_a_preset_fills_in():
    encoder = SMPConfig(task_type="SEQ_CLS")
    assert (encoder.score_init, encoder.allocation, encoder.sparsity_schedule) == ("magnitude", "local", "cubic")
    assert encoder.penalty == 400.0 and encoder.score_betas is None
    paper = SMPConfig(task_type="CAUSAL_LM", preset="paper")
    assert (paper.score_init, paper.penalty, paper.sparsity_schedule) == ("zeros", 400.0, "cubic")
    causal = SMPConfig(task_type="CAUSAL_LM")
    assert (causal.score_init, causal.allocation, causal.sparsity_schedule) == ("wanda", "row", "constant")
    assert causal.penalty == 0.0 and causal.score_betas == [0.9, 0.99]
    causal.score_betas.append(0)  # a list of its own
    assert SMPConfig(task_type="CAUSAL_LM").score_betas == [0.9, 0.99]
    assert SMPConfig(task_type="CAUSAL_LM", granularity="2:4").allocation == "local"
    given = SMPConfig(task_type="CAUSAL_LM", score_init="magnitude", penalty=3.0, allocation="score")
    assert (given.score_init, given.penalty, given.allocation) == ("magnitude", 3.0, "score")
    assert SMPConfig(**given.to_dict()).to_dict() == given.to_dict()
    with pytest.raises(ValueError, match="preset='llm'.*'auto', 'encoder', 'causal_lm', 'paper'"):
        SMPConfig(preset="llm")
