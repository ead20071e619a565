"""Boxes, windows, resolutions: the arithmetic of where things are. No pixels here.

A position is in pixels of level 0 unless the name says otherwise. A size is ``(height, width)``
when it is an array's, and named fields (``box.width``) everywhere else.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "level_for", "scale_between", "window_starts"]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned rectangle in whole pixels: ``x`` to the right, ``y`` down, ends excluded."""

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"a box needs a positive size, not {self.width} x {self.height}")

    @property
    def right(self) -> int:
        """First column outside."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row outside."""
        return self.y + self.height

    @property
    def area(self) -> int:
        """Number of pixels."""
        return self.width * self.height

    def intersection(self, other: "Box") -> "Box | None":
        """Return the common part, or None where there is none.

        Examples:
            >>> Box(0, 0, 4, 4).intersection(Box(2, 3, 9, 9))
            Box(x=2, y=3, width=2, height=1)
        """
        x, y = max(self.x, other.x), max(self.y, other.y)
        width, height = min(self.right, other.right) - x, min(self.bottom, other.bottom) - y
        return Box(x, y, width, height) if width > 0 and height > 0 else None

    def contains(self, other: "Box") -> bool:
        """Tell whether ``other`` lies inside, borders included."""
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.right <= self.right
            and other.bottom <= self.bottom
        )

    def split(self, size: int) -> Iterator["Box"]:
        """Yield squares of ``size`` in row-major order. The box must be a whole number of them.

        Examples:
            >>> [(b.x, b.y) for b in Box(0, 0, 4, 4).split(2)]
            [(0, 0), (2, 0), (0, 2), (2, 2)]
        """
        if self.width % size or self.height % size:
            raise ValueError(f"{self.width} x {self.height} is not a whole number of {size}-pixel squares")
        for y in range(self.y, self.bottom, size):
            for x in range(self.x, self.right, size):
                yield Box(x, y, size, size)


def window_starts(extent: int, size: int, stride: int) -> list[int]:
    """Return where windows begin so that together they cover ``extent`` exactly.

    The last window is pulled back to end at the border; none reaches outside.

    Args:
        extent: Length to cover, in pixels (of any one level or latent grid).
        size: Window length in the same pixels.
        stride: Step between windows. Smaller than ``size`` means overlap.

    Raises:
        ValueError: If a window does not fit, or the stride would leave gaps.

    Examples:
        >>> window_starts(11, size=4, stride=3)
        [0, 3, 6, 7]
        >>> window_starts(4, size=4, stride=4)
        [0]
    """
    if size > extent:
        raise ValueError(f"a window of {size} does not fit into {extent}")
    if not 0 < stride <= size:
        raise ValueError(f"stride {stride} must be between 1 and the window size {size}")
    starts = list(range(0, extent - size + 1, stride))
    if starts[-1] + size < extent:
        starts.append(extent - size)
    return starts


def scale_between(source_mpp: float, target_mpp: float, tolerance: float = 0.01) -> float:
    """Return how many source pixels make one target pixel; exactly 1 within ``tolerance``.

    Scanners state 0.4990 or 0.5021 where the objective is 20x; resampling for that blurs and gains nothing,
    so resolutions that differ by at most one percent count as equal.

    Examples:
        >>> scale_between(0.25, 0.5)
        2.0
        >>> scale_between(0.499, 0.5)
        1.0
    """
    scale = target_mpp / source_mpp
    return 1.0 if math.isclose(scale, 1.0, rel_tol=tolerance) else scale


def level_for(scale: float, downsamples: Sequence[float], tolerance: float = 0.01) -> int:
    """Return the coarsest pyramid level that still has every pixel asked for.

    Args:
        scale: Level-0 pixels per wanted pixel (2 asks for half the resolution).
        downsamples: Level-0 pixels per pixel of each level, ascending, the first 1.
        tolerance: A level may be coarser than asked for by this share (rounded sizes of real pyramids).

    Examples:
        >>> level_for(4.0, [1.0, 4.0003, 16.0])
        1
        >>> level_for(3.9, [1.0, 4.0, 16.0])
        0
        >>> level_for(0.5, [1.0, 4.0])
        0
    """
    fitting = [level for level, factor in enumerate(downsamples) if factor <= scale * (1 + tolerance)]
    return max(fitting, key=lambda level: downsamples[level], default=0)
