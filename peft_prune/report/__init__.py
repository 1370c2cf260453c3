"""Tables and pictures of what a mask keeps. They look at the layers from outside."""

from .adapter_file import AdapterFile, read_adapter
from .card import write_model_card
from .gguf import save_gguf
from .methods import methods_table
from .onnx_file import export_onnx
from .plots import plot_density, plot_units
from .scores import plot_scores
from .summary import LayerDensity, layer_densities, summary_table
from .training import plot_training, training_curves
from .units import UnitCount, units_alive, units_table


__all__ = [
    "AdapterFile",
    "LayerDensity",
    "UnitCount",
    "export_onnx",
    "layer_densities",
    "methods_table",
    "plot_density",
    "plot_scores",
    "plot_training",
    "plot_units",
    "read_adapter",
    "save_gguf",
    "summary_table",
    "training_curves",
    "units_alive",
    "units_table",
    "write_model_card",
]
