"""Where a checkpoint keeps what it recalls: recall attribution, state statistics on real text, and a plan for the layers that would
gain."""

from .findings import Diagnosis, LayerFinding, load_diagnosis
from .run import auto_layers, diagnose

__all__ = ["Diagnosis", "LayerFinding", "auto_layers", "diagnose", "load_diagnosis"]
