"""What a reader has to know about a run before believing its curves, in sentences."""

from collections.abc import Sequence

import numpy as np

from pixcell.console import duration_text
from pixcell.tasks.run_history import RunHistory

__all__ = ["findings", "state_of"]

_SLOW, _OFTEN = 0.5, 0.1
_WORSE = 3


def state_of(history: RunHistory) -> str:
    """Say in a sentence or two how far a run is and how it stands."""
    total = f" of {history.num_steps:,}" if history.num_steps else ""
    text = f"Step {history.step:,}{total}"
    last = history.starts[-1] if history.starts else None
    if history.is_complete:
        text += ", complete."
    elif last is None or last.end is None:
        when = history.last_word
        word = f"its last figures are of {when:%Y-%m-%d %H:%M} UTC." if when else "nothing was logged yet."
        text += f": in progress, or killed; {word}"
    else:
        text += f": stopped ({last.end}). The same command goes on."
    if history.lines:
        _, speeds = history.series("samples_per_s")
        seconds = history.lines[-1].get("seconds")
        if seconds is not None and speeds:
            text += f" {duration_text(seconds)} of training at {np.median(speeds):.3g} images a second."
    for name, (steps, values) in history.held_out.items():
        if len(values) > 1:
            change = (values[-1] - values[-2]) / abs(values[-2]) if values[-2] else 0.0
            text += (
                f" Held out, {name} is {values[-1]:.4g}, {change:+.1%} against the checkpoint before "
                f"(step {steps[-2]:,})."
            )
    return text


def findings(history: RunHistory) -> list[str]:
    """Return what is odd about a run; nothing where nothing is."""
    found = list(history.problems)
    found += _kills(history)
    found += _worsening(history)
    found += _slow(history)
    lost = [int(line["step"]) for line in history.lines if line.get("loss") is None]
    if lost:
        found.append(f"The loss was no finite number in {len(lost)} log line(s), first at step {lost[0]:,}.")
    if history.dropped:
        tiles = {(each.get("slide_id"), each.get("tile")) for each in history.dropped}
        found.append(
            f"{len(history.dropped):,} times a sample could not be read and was dropped from its batch "
            f"({len(tiles):,} different tiles; listed below and in dropped.jsonl)."
        )
    overflows = sum(line.get("overflows", 0) for line in history.lines)
    if overflows > 0.01 * max(history.step, 1):
        found.append(
            f"{overflows:g} of {history.step:,} steps overflowed in fp16 and moved no weight. A few are "
            "usual while the loss scale is found, so many are not: bf16 has no such limit."
        )
    return found


def _kills(history: RunHistory) -> list[str]:
    found = []
    for start, following in zip(history.starts, history.starts[1:], strict=False):
        if start.end is None and following.from_step is not None:
            found.append(
                f"The start of {start.facts.get('started')} was killed; the run went on from step "
                f"{following.from_step:,}, and took the steps after it again."
            )
    return found


def _worsening(history: RunHistory) -> list[str]:
    found = []
    for name, (steps, values) in history.held_out.items():
        best = int(np.argmax(values) if name.startswith("psnr") else np.argmin(values))
        if len(values) - 1 - best >= _WORSE:
            found.append(
                f"Held out, {name} was best at step {steps[best]:,} ({values[best]:.4g}) and has been "
                f"worse at the {len(values) - 1 - best} checkpoints since ({values[-1]:.4g} at the last): it "
                "may be learning its samples by heart. More data, or fewer steps."
            )
    return found


def _slow(history: RunHistory) -> list[str]:
    steps, speeds = history.series("samples_per_s")
    if len(speeds) < 10:
        return []
    median = float(np.median(speeds[1:]))
    slow = [step for step, speed in zip(steps[1:], speeds[1:], strict=True) if speed < _SLOW * median]
    if len(slow) <= _OFTEN * len(speeds):
        return []
    return [
        f"In {len(slow)} of {len(speeds)} log lines it was slower than half of its median speed "
        f"({median:.3g} images a second): {_spans(slow)}. Something else used the machine, or data came late."
    ]


def _spans(steps: Sequence[int]) -> str:
    return f"steps {steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"
