"""How large a pixel is, and which part of a file's metadata says so.

Microns per pixel (mpp) is the only measure of the package. In the order in which they are believed:

1. what the user gives (``source_mpp``);
2. what the scanner or the microscope's software states as a pixel size: OpenSlide's ``mpp-x``/``mpp-y``,
   OME-XML ``PhysicalSizeX``/``Y``, DICOM ``PixelSpacing``, ImageJ's calibration;
3. the print density of a TIFF, PNG or JPEG, if it means pixels between 0.02 and 10 microns. The 72, 96 or 300
   dots per inch that photo programs write mean pixels of 85 to 353 microns: no microscope's, so not believed;
4. the objective alone: ``mpp = 10 / power`` (20x is 0.5, 40x is 0.25), which is right to about a tenth.

Pixels that are not square: where the sides differ by at most one percent they count as square, with the
geometric mean as mpp. Beyond that the finer side is the mpp, and ``Slide`` stretches the coarser axis to it.
"""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = [
    "Resolution",
    "from_density",
    "from_description",
    "from_objective",
    "from_ome",
    "from_openslide",
    "microns_of",
]

_SQUARE_TOLERANCE = 0.01
_FINEST_DENSITY_UM, _COARSEST_DENSITY_UM = 0.02, 10.0
_MICRONS = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0,
    "nm": 1e-3, "pm": 1e-6, "Å": 1e-4, "in": 25_400.0, "inch": 25_400.0, "pt": 25_400.0 / 72,
}  # fmt: skip


@dataclass(frozen=True)
class Resolution:
    """The size of a level-0 pixel in microns, and the place in the file that stated it."""

    mpp: float
    """Microns per square pixel: the geometric mean, or the finer side if the sides really differ."""
    mpp_x: float
    mpp_y: float
    source: str

    @classmethod
    def of(cls, mpp_x: float, mpp_y: float, source: str) -> Self | None:
        """Return the resolution, or None if the numbers are no lengths (zero, negative, not finite)."""
        if not all(math.isfinite(side) and side > 0 for side in (mpp_x, mpp_y)):
            return None
        square = math.isclose(mpp_x, mpp_y, rel_tol=_SQUARE_TOLERANCE)
        mpp = mpp_x if mpp_x == mpp_y else math.sqrt(mpp_x * mpp_y) if square else min(mpp_x, mpp_y)
        return cls(mpp, mpp_x, mpp_y, source)

    @property
    def stretch(self) -> tuple[float, float]:
        """Square pixels per stored pixel along x and y; (1, 1) where stored pixels count as square.

        Examples:
            >>> Resolution.of(0.5, 0.25, "test").stretch
            (2.0, 1.0)
            >>> Resolution.of(0.2501, 0.2500, "test").stretch
            (1.0, 1.0)
        """
        if math.isclose(self.mpp_x, self.mpp_y, rel_tol=_SQUARE_TOLERANCE):
            return 1.0, 1.0
        return self.mpp_x / self.mpp, self.mpp_y / self.mpp


def from_objective(power: str | float | None, place: str) -> Resolution | None:
    """Guess from the objective alone: 10 microns over the power, for cameras with pixels of 10 microns.

    Examples:
        >>> from_objective("40", "AppMag").mpp
        0.25
    """
    value = _number(power)
    if value is None or value <= 0:
        return None
    return Resolution.of(10 / value, 10 / value, f"objective {value:g}x in {place} (10 / power)")


def from_density(um_x: float, um_y: float, source: str) -> tuple[Resolution | None, str | None]:
    """Believe a print density only where it may be a microscope's.

    Returns:
        The resolution or None, and a remark where a stated density was not believed.
    """
    if all(_FINEST_DENSITY_UM <= side <= _COARSEST_DENSITY_UM for side in (um_x, um_y)):
        return Resolution.of(um_x, um_y, source), None
    if not all(math.isfinite(side) and side > 0 for side in (um_x, um_y)):
        return None, f"{source} is not a length and was ignored"
    return None, (
        f"{source} means pixels of {um_x:.4g} x {um_y:.4g} um, outside {_FINEST_DENSITY_UM} to "
        f"{_COARSEST_DENSITY_UM:g} um: a print setting, not a microscope's; ignored"
    )


def from_openslide(properties: Mapping[str, str]) -> tuple[Resolution | None, str | None]:
    """Read the resolution out of OpenSlide's properties; also returns a remark on what was ignored."""
    x = _number(properties.get("openslide.mpp-x"))
    y = _number(properties.get("openslide.mpp-y"))
    remark = None
    if x or y:
        source = "openslide.mpp-x/y" if x and y else "openslide.mpp-x" if x else "openslide.mpp-y"
        x, y = x or y or 0.0, y or x or 0.0
        if properties.get("openslide.vendor") == "generic-tiff":  # these come from the print density
            found, remark = from_density(x, y, "TIFF XResolution/YResolution")
        else:
            found = Resolution.of(x, y, source)
        if found:
            return found, None
    return from_objective(properties.get("openslide.objective-power"), "openslide.objective-power"), remark


def from_ome(xml: str, width: int, height: int) -> Resolution | None:
    """Read ``PhysicalSizeX``/``Y`` of the OME image of that size; the nominal objective if it has none."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    for image in root.findall(".//{*}Image"):
        pixels = image.find("{*}Pixels")
        if pixels is None or (pixels.get("SizeX"), pixels.get("SizeY")) != (str(width), str(height)):
            continue
        x, y = (_ome_length(pixels, axis) for axis in "XY")
        if x or y:
            found = Resolution.of(x or y or 0.0, y or x or 0.0, "OME-XML PhysicalSizeX/Y")
            if found:
                return found
        reference = image.find("{*}ObjectiveSettings")
        for objective in root.findall(".//{*}Objective"):
            if reference is None or objective.get("ID") == reference.get("ID"):
                return from_objective(objective.get("NominalMagnification"), "OME-XML NominalMagnification")
    return None


def from_description(text: str) -> Resolution | None:
    """Read ``MPP = 0.499`` or ``AppMag = 20`` out of an image description, as Aperio writes them."""
    stated = re.search(r"\bMPP\s*=\s*([0-9.]+)", text)
    value = _number(stated.group(1)) if stated else None
    if value:
        return Resolution.of(value, value, "MPP in the TIFF description")
    objective = re.search(r"\bAppMag\s*=\s*([0-9.]+)", text)
    return from_objective(objective.group(1), "the TIFF description") if objective else None


def _ome_length(pixels: Any, axis: str) -> float | None:
    value = _number(pixels.get(f"PhysicalSize{axis}"))
    microns = _MICRONS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))  # "pixel" is not a length
    return value * microns if value and microns else None


def microns_of(unit: object) -> float | None:
    """Return how many microns a unit is, or None for what is no length.

    Examples:
        >>> microns_of("mm")
        1000.0
    """
    text = str(unit).strip()
    if "\\u" in text:  # ImageJ escapes the micro sign
        text = text.encode("ascii", "backslashreplace").decode("unicode_escape")
    return _MICRONS.get(text)


def _number(value: object) -> float | None:
    """OpenSlide's numbers are strings, and some scanners write a decimal comma."""
    try:
        number = float(str(value).replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
