"""DSEE (Chen et al., ACL 2023, arXiv 2111.00160): a sparse update on a sparse model."""

from ...registration import register_method
from .config import DSEEConfig
from .model import DSEEModel
from .prune import prune_once


__all__ = ["DSEEConfig", "DSEEModel", "prune_once"]

register_method(name="dsee", config_cls=DSEEConfig, model_cls=DSEEModel)
