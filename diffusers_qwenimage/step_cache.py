"""Fewer forwards per picture: velocities forecast from those of earlier steps, with a measured error.

Along the path from noise to picture the velocity changes slowly. Where a polynomial in sigma through the last
computed velocities is a good enough forecast, the transformer is not run, as TaylorSeer (arXiv 2503.06923)
does with features inside of the model; here the model's output is forecast, so a step costs nothing. What is
good enough is measured: each computed velocity shows how far the forecast would have been off. An
extrapolation of order p over a distance d in sigma errs as d^(p + 1), which gives the error to expect at the
next step; while it is below a threshold the step is forecast.

Each branch of the guidance (with the prompt, and with the negative one) decides for itself.

Shapes: B pictures, L image tokens, C channels of a token.
"""

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ForecastCache:
    """When steps are forecast.

    Attributes:
        threshold: relative error of the velocity that a forecast may be expected to have.
        order: of the polynomial: 0 repeats the last velocity, 1 is a line, 2 a parabola.
        max_skips: steps forecast in a row, at most.
        first_steps: steps that are always computed at the start, where the picture is laid out.
        every: compute every n-th step instead, whatever the error (for measurements).
    """

    threshold: float = 0.05
    order: int = 1
    max_skips: int = 3
    first_steps: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError(f"threshold is a relative error, 0 or more, got {self.threshold}.")
        if self.order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {self.order}.")
        if self.max_skips < 1 or self.first_steps < 0:
            raise ValueError(
                f"max_skips must be at least 1 and first_steps at least 0, got {self.max_skips} and "
                f"{self.first_steps}."
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}.")


@dataclass(kw_only=True)
class Forecast:
    """What one branch of one run knows: its last velocities and how well they foretold the newest.

    Attributes:
        config: when steps are forecast.
        computed: how many steps were computed.
        skipped: how many were forecast.
    """

    config: ForecastCache
    computed: int = 0
    skipped: int = 0
    _known: deque[tuple[float, Tensor]] = field(default_factory=deque)
    _in_a_row: int = 0
    _rate: float | None = None  # error / distance^(order + 1)

    def forget(self) -> None:
        """Start anew: what was computed says nothing about the steps to come."""
        self._known.clear()
        self._in_a_row, self._rate = 0, None

    def must_compute(self, index: int, num_steps: int, sigma: float) -> bool:
        """Whether the transformer has to run at step `index`."""
        config = self.config
        is_first = index < max(config.first_steps, config.order + 1)
        if is_first or index == num_steps - 1 or len(self._known) <= config.order:
            return True
        if config.every is not None:
            return index % config.every == 0
        if self._rate is None or self._in_a_row >= config.max_skips:
            return True
        return self._rate * self._distance(sigma) ** (config.order + 1) > config.threshold

    def record(self, sigma: float, velocity: Tensor) -> None:
        """Take in a computed velocity [B, L, C]."""
        if self.config.every is None and len(self._known) > self.config.order:
            # The worst picture of a batch decides.
            difference = (velocity - self._extrapolate(sigma)).flatten(1).float().norm(dim=1)
            error = difference / velocity.flatten(1).float().norm(dim=1).clamp_min(1e-12)
            self._rate = float(error.max()) / self._distance(sigma) ** (self.config.order + 1)
        self._known.append((sigma, velocity))
        while len(self._known) > self.config.order + 1:
            self._known.popleft()
        self._in_a_row = 0
        self.computed += 1

    def forecast(self, sigma: float) -> Tensor:
        """The velocity [B, L, C] to expect at `sigma`."""
        self._in_a_row += 1
        self.skipped += 1
        return self._extrapolate(sigma)

    def _distance(self, sigma: float) -> float:
        return max(abs(self._known[-1][0] - sigma), 1e-6)

    def _extrapolate(self, sigma: float) -> Tensor:
        """Lagrange's polynomial through the known velocities."""
        total: Tensor | None = None
        for at, velocity in self._known:
            weight = 1.0
            for other, _ in self._known:
                if other != at:
                    weight *= (sigma - other) / (at - other)
            total = weight * velocity if total is None else total + weight * velocity
        assert total is not None
        return total
