"""Tells when a run diverges."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from .schema import SpikeGuard

MIN_HISTORY = 5
"""Losses that a median needs before it is trusted."""


class LossGuard:
    """Compares each step's loss with the running median of the calm ones before it."""

    def __init__(self, options: SpikeGuard) -> None:
        self.options = options
        self.history: deque[float] = deque(maxlen=options.window)
        self.spikes = 0

    @property
    def calm(self) -> bool:
        """Whether the last loss was no spike: only then is a checkpoint worth keeping."""
        return self.spikes == 0

    def check(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong, in words, when the run has to stop before this step's update."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the loss is {loss:g} and the gradient norm {grad_norm:g}"
        if len(self.history) >= min(MIN_HISTORY, self.options.window):
            usual = median(self.history)
            if loss > self.options.factor * usual:
                self.spikes += 1
                if self.spikes >= self.options.patience:
                    limit = f"{self.options.factor:g} times its median {usual:.4g}"
                    return f"the loss is {loss:.4g}, and has been above {limit} for {self.spikes} steps"
                return None
        self.spikes = 0
        self.history.append(loss)
        return None

    def state(self) -> dict[str, Any]:
        """Plain data for `load_state`."""
        return {"history": list(self.history), "spikes": self.spikes}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.history = deque(state["history"], maxlen=self.options.window)
        self.spikes = state["spikes"]
