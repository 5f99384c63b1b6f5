"""Surgery on checkpoints: plans, operators, and the streaming run that carries them out."""

from .apply import Expansion, expand_checkpoint, try_layers, work_out
from .operators import OPERATORS
from .plan import Plan, resolve_plan
from .summary import ExpansionSummary

__all__ = ["OPERATORS", "Expansion", "ExpansionSummary", "Plan", "expand_checkpoint", "resolve_plan", "try_layers", "work_out"]
