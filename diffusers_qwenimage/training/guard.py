"""Steps that must not be taken: a NaN or infinite loss or gradient, or a gradient far larger than usual."""

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 50  # gradient norms that are remembered
MIN_HISTORY = 10  # norms needed before a spike can be told


class Diverged(ValueError):
    """Too many steps in a row had to be skipped."""


class Guard:
    """Judges every step, and stops the run after `max_bad` bad ones in a row."""

    def __init__(self, *, spike_factor: float, max_bad: int) -> None:
        self.spike_factor = spike_factor
        self.max_bad = max_bad
        self.bad_in_a_row = 0
        self.skipped = 0
        self.norms: list[float] = []

    def judge(self, loss: float, norm: float) -> str:
        """Why the step must be skipped, or ""."""
        reason = self._reason(loss, norm)
        if reason:
            self.bad_in_a_row += 1
            self.skipped += 1
        else:
            self.bad_in_a_row = 0
            self.norms = [*self.norms, norm][-WINDOW:]
        return reason

    def stop_if_diverged(self, step: int, reason: str, names: Sequence[str]) -> None:
        """End the run if enough steps in a row were bad.

        Raises:
            Diverged: with the reason and the samples of the last bad step.
        """
        if self.bad_in_a_row >= self.max_bad:
            raise Diverged(
                f"Stopped at step {step}: {self.bad_in_a_row} steps in a row were skipped, the last one for "
                f"{reason} with {', '.join(names)}. Nothing of them was saved. Lower learning_rate, look at "
                "these samples, or go on from the last checkpoint with --resume_from latest."
            )

    def state(self) -> dict[str, object]:
        """What to save."""
        return {"bad_in_a_row": self.bad_in_a_row, "skipped": self.skipped, "norms": self.norms}

    def load(self, state: dict[str, object]) -> None:
        """Take over a saved state."""
        for name in ("bad_in_a_row", "skipped", "norms"):
            setattr(self, name, state[name])

    def _reason(self, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return f"the loss {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm {norm}"
        usual = median(self.norms) if len(self.norms) >= MIN_HISTORY else 0.0
        if self.spike_factor and usual and norm > self.spike_factor * usual:
            return f"a gradient norm of {norm:.3g}; usual is {usual:.3g}"
        return ""
