"""What ends a run before its last step: losses that say going on is a waste, a signal, or the clock.

- a loss or gradient that is no finite number, at once (:class:`FiniteRule`);
- a loss far above what it was, for many steps on end (:class:`SpikeRule`);
- SIGTERM, SIGUSR1, Ctrl-C or ``trainer.max_hours`` (:class:`StopRequests`): the step is finished, a
  checkpoint is written, and the run can go on.

The first two are errors. They name the batch, worst samples first, and leave the last checkpoint as it is.
"""

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

from pydantic import Field

from pixcell.config import Config
from pixcell.errors import RunError

__all__ = ["FiniteRule", "SpikeConfig", "SpikeRule", "StopRequests", "worst_first"]

Batch = Callable[[], Sequence[tuple[str, float]]]
"""Keys and losses of the samples of a step, from all processes; every process calls it, if one does."""

_OVERFLOWS = 100
"""Steps in a row that fp16 may leave out; the loss scale halves at each, from 65,536."""


class SpikeConfig(Config):
    """When a loss counts as run away: ``factor`` times its median, ``patience`` steps on end.

    One bad batch is over with the next; a run that diverged does not come back. The defaults are wide enough
    that a run which still learns does not meet them.
    """

    factor: float = Field(10.0, gt=1)
    """How far above the median of the window."""
    window: int = Field(500, gt=1)
    """Steps before the spike whose median it is. The rule begins when it is half full, anew at each start."""
    patience: int = Field(50, gt=0)
    """Steps in a row that the loss may stay there."""


def worst_first(samples: Sequence[tuple[str, float]], most: int = 8) -> str:
    """List samples by loss, those without a finite one first.

    Examples:
        >>> worst_first([("a", 0.5), ("b", float("nan")), ("c", 2.0)], most=2)
        'b (loss nan), c (loss 2) and 1 more'
    """
    worst = sorted(samples, key=lambda sample: -sample[1] if math.isfinite(sample[1]) else -math.inf)
    named = ", ".join(f"{key} (loss {loss:.4g})" for key, loss in worst[:most])
    return named + (f" and {len(worst) - most} more" if len(worst) > most else "")


class FiniteRule:
    """Refuses a loss or a gradient that is NaN or infinite.

    Args:
        run: The run's name, for the message.
        has_loss_scale: fp16: single gradients overflow as a matter of course, the step is left out and the
            loss scale halved. Then only many in a row are an error.
    """

    def __init__(self, run: str, has_loss_scale: bool) -> None:
        self._run, self._has_loss_scale, self._overflows = run, has_loss_scale, 0

    def check_loss(self, loss: float, step: int, batch: Batch, way_out: str) -> None:
        """Look at the mean loss of a step; ``step`` 1 is the first.

        Raises:
            RunError: If it is not finite.
        """
        if not math.isfinite(loss):
            self._refuse("loss", loss, step, batch, way_out)

    def check_gradient(self, norm: float, step: int, batch: Batch, way_out: str) -> None:
        """Look at the norm of the gradient of a step.

        Raises:
            RunError: If it is not finite; under fp16, if it was not for many steps on end.
        """
        self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
        if self._overflows > (_OVERFLOWS if self._has_loss_scale else 0):
            self._refuse("gradient", norm, step, batch, way_out, self._overflows - 1)

    def _refuse(
        self, what: str, value: float, step: int, batch: Batch, way_out: str, before: int = 0
    ) -> None:
        since = f" (as at each of the {before} steps before)" if before else ""
        raise RunError(
            f"the {what} became {value} at step {step} of {self._run}{since}, on the batch "
            f"{worst_first(batch())}. {way_out}"
            "A smaller optimizer.lr, a longer warm-up, optimizer.clip_norm or another precision may help; "
            "where it comes back on the same tiles, look at these (`pixcell inspect STORE --verify`)."
        )


class SpikeRule:
    """Refuses a loss that has run away, and remembers the batch on which it did.

    Args:
        config: When that is. None: never.
        run: The run's name, for the message.
    """

    def __init__(self, config: SpikeConfig | None, run: str) -> None:
        self._config, self._run = config, run
        self._calm: deque[float] = deque(maxlen=config.window if config else 1)
        self._high = 0
        self._first = ""

    def check(self, loss: float, step: int, batch: Batch) -> None:
        """Look at the mean loss of a step; ``step`` 1 is the first.

        Raises:
            RunError: If it was too high for too many steps.
        """
        config = self._config
        if config is None:
            return
        usual = statistics.median(self._calm) if 2 * len(self._calm) >= config.window else math.inf
        if loss <= config.factor * usual or usual <= 0:  # a multiple of nothing, or less, means nothing
            # What is high does not count as usual: else a spike would hide itself in time.
            self._calm.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high == 1:
            self._first = worst_first(batch())
        if self._high >= config.patience:
            raise RunError(
                f"the loss of {self._run} ran away: from step {step - self._high + 1} to step {step} it "
                f"stayed above {config.factor:g} times its median of {usual:.4g}, and is {loss:.4g} now. It "
                f"began on the batch {self._first}. Checkpoints of earlier steps are good; delete later ones "
                "to go on from there. A smaller optimizer.lr or optimizer.clip_norm may help (in a new run); "
                "if such a loss is wanted, set trainer.spike to null."
            )


class StopRequests:
    """Turns signals and the clock into a wish to stop after the step.

    A second Ctrl-C acts as usual. Other signals may come twice (from a launcher and from the system) and mean
    the same as once.

    Args:
        max_hours: Time limit. None: there is none.
        started: When its clock began, in seconds of ``time.monotonic()``.
    """

    def __init__(self, max_hours: float | None, started: float) -> None:
        self._limit_s = math.inf if max_hours is None else 3600 * max_hours
        self._started = started
        self._longest_step = self._longest_save = 0.0
        self._signal: int | None = None
        self._signalled_at = 0.0
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """What asks this process to stop. None: nothing."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._limit_s == math.inf or self._elapsed() + self._reserve() < self._limit_s:
            return None
        return "trainer.max_hours"

    def took(self, step_s: float, save_s: float = 0.0) -> None:
        """Note how long a step took, and a checkpoint: so much time the last ones need."""
        self._longest_step = max(self._longest_step, step_s)
        self._longest_save = max(self._longest_save, save_s)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _reserve(self) -> float:
        """Another step and a checkpoint with its preview, twice over for a slow disk; before the first
        checkpoint nobody knows, so a twentieth of the limit."""
        save = self._longest_save or self._limit_s / 40
        return 2 * (self._longest_step + save)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if (number := getattr(signal, name, None)) is not None:  # Windows has no SIGUSR1
                    self._before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        # A terminal and a launcher may both pass on one Ctrl-C.
        if number == signal.SIGINT and self._signal == number and now - self._signalled_at > 1:
            raise KeyboardInterrupt
        self._signal, self._signalled_at = number, now

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
