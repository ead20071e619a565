"""DICOM whole-slide series, read by wsidicom (the extra ``dicom``)."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from pixcell.data.resolution import Resolution, from_objective
from pixcell.errors import MissingExtra, UnreadableSlide
from pixcell.geometry import Box

__all__ = ["DicomBackend", "dicom_series", "is_dicom"]


class DicomBackend:
    """A DICOM whole-slide series."""

    name = "dicom"

    def __init__(self, path: Path, files: list[Path]) -> None:
        """Open a series; raises UnreadableSlide or MissingExtra."""
        try:
            import pydicom
            import wsidicom
            from wsidicom import errors
        except ImportError as error:
            raise MissingExtra("wsidicom", "dicom", f"reading the DICOM slide {path.name}") from error
        self._failures = _exceptions_in(errors)
        try:
            self._slide: Any = wsidicom.WsiDicom.open(files)
            self._stored = list(self._slide.levels)
        except self._failures as error:
            raise UnreadableSlide(path, f"DICOM: {error or type(error).__name__}") from error
        self._lock = threading.Lock()
        self.levels = tuple((level.size.width, level.size.height) for level in self._stored)
        headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        base = max(headers, key=lambda header: int(header.get("TotalPixelMatrixColumns", 0)))
        self.properties = {
            f"dicom.{key}": str(base.get(key))
            for key in (
                "Manufacturer",
                "ManufacturerModelName",
                "SeriesInstanceUID",
                "PhotometricInterpretation",
            )
            if base.get(key)
        }
        self.bounds: Box | None = None
        optics = (base.get("OpticalPathSequence") or [pydicom.Dataset()])[0]
        self.icc = bytes(optics.get("ICCProfile") or b"") or None
        self.resolution = self._find_resolution(optics)
        self.pixels = (
            f"8-bit, DICOM {base.get('PhotometricInterpretation', 'RGB')}; areas without frames white"
        )

    def _find_resolution(self, optics: Any) -> Resolution | None:
        try:
            size = self._stored[0].mpp
        except self._failures:
            return from_objective(optics.get("ObjectiveLensPower"), "DICOM ObjectiveLensPower")
        return Resolution.of(float(size.width), float(size.height), "DICOM PixelSpacing")

    def region(self, level: int, box: Box) -> np.ndarray:
        """Return the pixels. One thread at a time: the library shares its file position."""
        with self._lock:
            picture = self._slide.read_region(
                (box.x, box.y), self._stored[level].level, (box.width, box.height)
            )
        return np.asarray(picture.convert("RGB"))

    def close(self) -> None:
        """Close the files."""
        self._slide.close()


def _exceptions_in(module: Any) -> tuple[type[Exception], ...]:
    """wsidicom's errors have no common base."""
    own = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Exception)]
    # What it and pydicom let through on damaged files.
    return (*own, OSError, ValueError, KeyError, AttributeError, NotImplementedError)


def is_dicom(path: Path) -> bool:
    """Tell whether a file begins like a DICOM instance."""
    if path.suffix.lower() not in (".dcm", ".dicom", ""):
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_series(path: Path) -> list[Path]:
    """Return the instances of the DICOM slide that a folder, or one of its instances, stands for.

    Raises:
        UnreadableSlide: If a folder holds several series: which one is meant must be said.
        MissingExtra: If there are DICOM instances and wsidicom (which brings pydicom) is not installed.
    """
    folder = path if path.is_dir() else path.parent
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_dicom(file)]
    if not files:
        return []
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra("wsidicom", "dicom", f"reading the DICOM slide {path.name}") from error

    def series_of(file: Path) -> str:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        except (pydicom.errors.InvalidDicomError, OSError, ValueError) as error:
            raise UnreadableSlide(path, f"DICOM: {file.name}: {error}") from error
        return str(header.get("SeriesInstanceUID", ""))

    by_series: dict[str, list[Path]] = {}
    for file in files:
        by_series.setdefault(series_of(file), []).append(file)
    if not path.is_dir():
        return next(group for group in by_series.values() if path in group)
    if len(by_series) > 1:
        raise UnreadableSlide(
            path,
            f"the folder holds {len(by_series)} DICOM series; give each its own folder, or name one instance",
        )
    return files
