"""P-pruning (Wang et al., LREC-COLING 2024): heads and neurons removed by what they do on a task's inputs."""

from ...registration import register_method
from .calibrate import calibrate
from .config import PPruningConfig
from .model import PPruningModel


__all__ = ["PPruningConfig", "PPruningModel", "calibrate"]

register_method(name="ppruning", config_cls=PPruningConfig, model_cls=PPruningModel)
