"""What is run: our configurations in the form of the tables of PEFT's tests."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import pytest

from peft_prune import DSEEConfig, MovementPruningConfig, PPruningConfig, SMPConfig


DSEE = {"r": 4, "num_sparse": 4, "sparsity": 0.5}
# label: class, and what is given beside targets and task; small ranks, since PEFT's models are tiny
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "SMP": (SMPConfig, {"preset": "encoder"}),  # without inputs to start from
    "SMP head": (SMPConfig, {"granularity": "head", "preset": "encoder"}),
    "MOVEMENT hard": (MovementPruningConfig, {"variant": "hard"}),
    "MOVEMENT soft": (MovementPruningConfig, {"variant": "soft"}),
    "MOVEMENT l0": (MovementPruningConfig, {"variant": "l0"}),
    "MOVEMENT magnitude": (MovementPruningConfig, {"variant": "magnitude"}),
    "DSEE": (DSEEConfig, DSEE),
    # without calibration it has no masks, so it gets random ones
    "PPRUNING": (PPruningConfig, {"init_weights": False}),
}
# where a test makes the configuration itself, it takes the method's defaults
DEFAULTS = {SMPConfig: "SMP", MovementPruningConfig: "MOVEMENT hard", DSEEConfig: "DSEE", PPruningConfig: "PPRUNING"}
# methods for any module; the others have to know where heads are
ANYWHERE = [name for name in METHODS if name not in ("SMP head", "PPRUNING")]

# on the small models that PEFT's tests define: name, model, configuration
_CUSTOM: list[tuple[str, str, dict[str, Any]]] = [
    ("MLP 1", "MLP", {"target_modules": "lin0"}),
    ("MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Embedding + Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Embedding + Conv1D 2", "EmbConv1D", {"target_modules": ["lin0"], "modules_to_save": ["emb"]}),
]
# what single methods have beyond that
_MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("SMP", "MLP 2:4", {"target_modules": ["lin1"], "granularity": "2:4"}),
    ("SMP", "MLP row", {"target_modules": ["lin0", "lin1"], "granularity": "row"}),
    ("SMP", "MLP column", {"target_modules": ["lin0", "lin1"], "granularity": "column"}),
    ("SMP", "MLP score", {"target_modules": ["lin0", "lin1"], "allocation": "score"}),
    ("SMP", "MLP global", {"target_modules": ["lin0", "lin1"], "allocation": "global"}),
    ("MOVEMENT hard", "MLP int8", {"target_modules": ["lin0"], "value_dtype": "int8"}),
    ("DSEE", "MLP pruned", {"target_modules": ["lin0"], "prune_target_modules": ["lin0", "lin1"]}),
]


def custom_rows() -> list[Any]:
    """Rows `(test name, model, class, arguments)`."""
    rows = [(label, name, model, given) for label in ANYWHERE for name, model, given in _CUSTOM]
    rows += [(label, name, "MLP", given) for label, name, given in _MORE]
    result = []
    for label, name, model, given in rows:
        config_cls, own = METHODS[label]
        test_name = f"{label} {name}"
        result.append(pytest.param(test_name, model, config_cls, own | given, id=test_name))
    return result


def active_together_rows() -> list[Any]:
    """Rows `(test name, method, class, arguments of one adapter, of the other)`."""
    rows = []
    for label in ANYWHERE:
        config_cls, own = METHODS[label]
        for name, other in (("same", "lin0"), ("different", "lin1")):
            first = own | {"target_modules": ["lin0"], "init_weights": False}
            test_name = f"{label} {name}"
            second = first | {"target_modules": [other]}
            rows.append(pytest.param(test_name, label, config_cls, first, second, id=test_name))
    return rows


def model_rows(task_type: str) -> list[Any]:
    """Rows `(class, arguments)` for models of Transformers."""
    rows = []
    for label, (config_cls, own) in METHODS.items():
        rows.append(pytest.param(config_cls, {"task_type": task_type, **own}, id=label))
    return rows


def class_rows() -> list[Any]:
    """Rows `(class, mandatory arguments)`."""
    return [pytest.param(config_cls, {}, id=label) for config_cls, label in DEFAULTS.items()]


def tables() -> dict[str, dict[str, list[Any]]]:
    """By module and name, what takes the place of the tables of PEFT's tests."""
    return {
        "test_custom_models": {
            "TEST_CASES": custom_rows(),
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": active_together_rows(),
        },
        "test_config": {"ALL_CONFIG_CLASSES": class_rows(), "LAYER_INDEXING_CONFIG_CLASSES": class_rows()},
        "test_decoder_models": {"ALL_CONFIGS": model_rows("CAUSAL_LM")},
        "test_encoder_decoder_models": {"ALL_CONFIGS": model_rows("SEQ_2_SEQ_LM")},
        "test_feature_extraction_models": {"ALL_CONFIGS": model_rows("FEATURE_EXTRACTION")},
        "test_seq_classifier": {"ALL_CONFIGS": model_rows("SEQ_CLS")},
        "test_token_classification_qa": {
            "TOKEN_CLS_CONFIGS": model_rows("TOKEN_CLS"),
            "QA_CONFIGS": model_rows("QUESTION_ANS"),
        },
    }


def classes_for(module: str) -> list[Any]:
    """Rows for tests that take a class alone; where it is put on a module of their own, any module has to do."""
    known = DEFAULTS if module == "test_config" else {c: n for c, n in DEFAULTS.items() if n in ANYWHERE}
    return [pytest.param(config_cls, id=label) for config_cls, label in known.items()]


def like_lora(config: Any, label: str) -> Any:
    """Our configuration in the place of a LoRA's: the same targets, an adapter that does something."""
    config_cls, own = METHODS[label]
    return config_cls(
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
        init_weights=config.init_lora_weights is not False,
        **own,
    )


def label_of(values: dict[str, Any]) -> Optional[str]:
    """Method that a test's parameters are about, `None` if it is none of ours."""
    config_cls = values.get("config_cls", values.get("config_class"))
    given = next((values[key] for key in ("config_kwargs", "config_kwargs_1") if key in values), {})
    if config_cls is None and type(values.get("config0")) in DEFAULTS:
        config_cls = type(values["config0"])
        given = dataclasses.asdict(values["config0"])
    if config_cls not in DEFAULTS:
        return None
    if config_cls is SMPConfig and given.get("granularity") == "head":
        return "SMP head"
    if config_cls is MovementPruningConfig:
        return f"MOVEMENT {given.get('variant', 'hard')}"
    return DEFAULTS[config_cls]
