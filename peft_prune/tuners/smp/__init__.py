"""SMP: Static Model Pruning (Jiang et al., Findings of ACL 2023, arXiv 2210.06210)."""

from ...registration import register_method
from .config import SMPConfig
from .model import SMPModel


__all__ = ["SMPConfig", "SMPModel"]

register_method(name="smp", config_cls=SMPConfig, model_cls=SMPModel)
