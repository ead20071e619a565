"""The readers behind ``Slide``, and which of them gets a file.

    a folder of DICOM instances        wsidicom
    what OpenSlide names a vendor      OpenSlide; but Aperio and generic pyramids go to the TIFF reader, where
                                       its pixels are the same and come sooner
    any other TIFF                     the TIFF reader (OME-TIFF, plain page pyramids, single images)
    any other image                    PIL, decoded whole

A reader gives levels in stored pixels and regions that lie inside a level. Units, resampling, borders and
colour profiles are the business of ``Slide``.
"""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import openslide
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from pixcell.data.colour import image_to_rgb8, lay_on_white
from pixcell.data.dicom import DicomBackend, dicom_series, is_dicom
from pixcell.data.resolution import Resolution, from_density, from_openslide
from pixcell.data.tiff import NotThisReader, TiffBackend
from pixcell.errors import UnreadableSlide
from pixcell.geometry import Box

__all__ = ["Backend", "open_backend"]

_MOST_PIXELS_IN_MEMORY = 1 << 30
_SAME_PIXELS_AS_OPENSLIDE = {"aperio", "generic-tiff"}


@runtime_checkable
class Backend(Protocol):
    """What ``Slide`` needs from a reader."""

    name: str
    levels: tuple[tuple[int, int], ...]
    """(width, height) of each level as stored, finest first."""
    resolution: Resolution | None
    bounds: Box | None
    pixels: str
    """What is stored and by which rule it becomes RGB8."""
    icc: bytes | None
    """Profile that is still to be applied."""
    properties: dict[str, str]

    def region(self, level: int, box: Box) -> np.ndarray:
        """Return (height, width, 3) uint8 of a box inside a level; any exception means it is unreadable."""

    def close(self) -> None:
        """Release the file."""


def open_backend(path: Path) -> Backend:
    """Find the reader for a file or a DICOM folder.

    Raises:
        UnreadableSlide: If no reader takes it, with what each of them said.
        MissingExtra: If it is DICOM and wsidicom is not installed.
    """
    if path.is_dir():
        series = dicom_series(path)
        if not series:
            raise UnreadableSlide(path, "it is a folder without DICOM instances; name a slide inside it")
        return DicomBackend(path, series)
    try:
        if path.stat().st_size == 0:
            raise UnreadableSlide(path, "the file is empty (0 bytes); copy or download it again")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UnreadableSlide(path, f"there is no such file ({path})") from error
    except OSError as error:
        raise UnreadableSlide(path, f"the file cannot be opened ({error.strerror})") from error
    if is_dicom(path):
        return DicomBackend(path, dicom_series(path))
    vendor = openslide.OpenSlide.detect_format(str(path))
    try:
        if vendor and vendor not in _SAME_PIXELS_AS_OPENSLIDE:
            return OpenSlideBackend(path)
        return _tiff_or_other(path, vendor)
    except openslide.OpenSlideError as error:
        raise UnreadableSlide(path, f"OpenSlide ({vendor}): {error}") from error
    except ValueError as error:
        raise UnreadableSlide(path, str(error)) from error


def _tiff_or_other(path: Path, vendor: str | None) -> Backend:
    try:
        tiff = TiffBackend(path)
    except NotThisReader as reason:
        if vendor:
            return OpenSlideBackend(path)
        return ImageBackend(path, tried=str(reason))
    if not vendor:
        if tiff.jpeg2000:
            tiff.close()
            raise ValueError("Aperio's JPEG 2000 outside of an Aperio file is not readable")
        return tiff
    try:
        slide = OpenSlideBackend(path)
    except openslide.OpenSlideError:
        tiff.close()
        raise
    if vendor == "aperio" and (tiff.jpeg2000 or tiff.has_gaps or tiff.levels != slide.levels):
        tiff.close()
        return slide
    # The scanner's own statements are read by OpenSlide; only the pixels come the short way.
    tiff.properties = {**slide.properties, **tiff.properties}
    if slide.resolution and not (tiff.resolution and vendor == "generic-tiff"):
        tiff.resolution = slide.resolution
    slide.close()
    return tiff


class OpenSlideBackend:
    """Every format of OpenSlide."""

    name = "openslide"

    def __init__(self, path: Path) -> None:
        """Open; raises OpenSlideError."""
        self._path = path
        self._slide = openslide.OpenSlide(str(path))
        self._lock = threading.Lock()
        self.levels = tuple(self._slide.level_dimensions)
        self._downsamples = self._slide.level_downsamples
        self.properties = dict(self._slide.properties)
        self.resolution, remark = from_openslide(self.properties)
        if remark:
            self.properties["pixcell.resolution-remark"] = remark
        self.icc = self._find_profile()
        self.pixels = "8-bit RGB, empty scanner areas white"
        self.bounds = self._stated_bounds()

    def region(self, level: int, box: Box) -> np.ndarray:
        """Return the pixels; areas that the scanner left out (alpha 0) are white."""
        factor = self._downsamples[level]
        place = (round(box.x * factor), round(box.y * factor))
        size = (box.width, box.height)
        try:
            rgba = self._slide.read_region(place, level, size)
        except openslide.OpenSlideError:
            # One error makes a handle useless for ever, and another thread may have caused it. A fresh handle
            # tells whether it is this region that is broken; either way the next read finds a working one.
            rgba = self._read_with_fresh_handle(place, level, size)
        pixels = np.asarray(rgba)
        return lay_on_white(pixels[..., :3], pixels[..., 3])

    def _read_with_fresh_handle(
        self, place: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        fresh = openslide.OpenSlide(str(self._path))
        try:
            rgba = fresh.read_region(place, level, size)
        except openslide.OpenSlideError:
            fresh.close()
            fresh = openslide.OpenSlide(str(self._path))
            raise
        finally:
            with self._lock:  # the old handle may be in use by other threads: it is left to be collected
                self._slide = fresh
        return rgba

    def close(self) -> None:
        """Close the handle."""
        self._slide.close()

    def _find_profile(self) -> bytes | None:
        try:
            profile = self._slide.color_profile
        except ImageCms.PyCMSError:
            return b"damaged"  # and as such it will be reported
        return profile.tobytes() if profile is not None else None

    def _stated_bounds(self) -> Box | None:
        try:
            x, y, width, height = (
                int(float(self.properties[f"openslide.bounds-{key}"]))
                for key in ("x", "y", "width", "height")
            )
        except (KeyError, ValueError):
            return None
        return Box(x, y, width, height) if width > 0 and height > 0 else None


class ImageBackend:
    """A PNG, JPEG or other picture, decoded whole: one level."""

    name = "image"

    def __init__(self, path: Path, tried: str = "") -> None:
        """Decode; raises UnreadableSlide."""
        try:
            with _large_images_allowed():
                opened = Image.open(path)  # reads the header only
            with opened as image:
                if image.width * image.height > _MOST_PIXELS_IN_MEMORY:
                    raise UnreadableSlide(
                        path,
                        f"{image.width:,} x {image.height:,} pixels are too many to decode at once "
                        f"(at most {_MOST_PIXELS_IN_MEMORY:,}); convert it to a tiled pyramidal TIFF",
                    )
                self.resolution, remark = _image_resolution(image)
                turned = image.getexif().get(ExifTags.Base.Orientation, 1)
                image.load()
                upright = ImageOps.exif_transpose(image)
                self._rgb, self.pixels = image_to_rgb8(upright)
                kind = image.format or "image"
        except UnidentifiedImageError as error:
            raise UnreadableSlide(path, _nobody_reads(path, tried)) from error
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise UnreadableSlide(path, f"its pixels cannot be decoded ({error})") from error
        if turned not in (None, 0, 1):
            self.pixels += f"; turned upright (EXIF orientation {turned})"
            if self.resolution and turned in (5, 6, 7, 8):
                old = self.resolution
                self.resolution = Resolution.of(old.mpp_y, old.mpp_x, old.source)
        self.levels: tuple[tuple[int, int], ...] = ((self._rgb.shape[1], self._rgb.shape[0]),)
        self.bounds: Box | None = None
        self.icc: bytes | None = None
        self.properties = {"image.format": kind}
        if remark:
            self.properties["pixcell.resolution-remark"] = remark

    def region(self, level: int, box: Box) -> np.ndarray:
        """Return a copy of the pixels."""
        return self._rgb[box.y : box.bottom, box.x : box.right].copy()

    def close(self) -> None:
        """Forget the pixels."""
        self._rgb = np.zeros((0, 0, 3), np.uint8)


def _image_resolution(image: Image.Image) -> tuple[Resolution | None, str | None]:
    density = image.info.get("dpi")  # PNG pHYs, JFIF density and EXIF resolution, in dots per inch
    if not density or (image.info.get("jfif_unit", 1) == 0 and "exif" not in image.info):
        return None, None
    try:
        x, y = (25_400 / float(value) for value in density)
    except (TypeError, ValueError, ZeroDivisionError):
        return None, None
    source = {"PNG": "PNG pHYs", "JPEG": "JPEG density"}.get(image.format or "", f"{image.format} density")
    return from_density(x, y, source)


_pixel_limit_lock = threading.Lock()


@contextlib.contextmanager
def _large_images_allowed() -> Iterator[None]:
    """PIL takes pictures above 179 million pixels for attacks; in pathology they are pictures.

    Its limit is a global: it is lifted while a header is read, under a lock, and put back. Ours holds.
    """
    with _pixel_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _nobody_reads(path: Path, tried: str) -> str:
    with path.open("rb") as file:
        head = file.read(256)
    if head.isascii() and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "it is a text file"
    said = f"; as TIFF: {tried}" if head[:2] in (b"II", b"MM") else ""
    return f"neither OpenSlide nor the TIFF and image readers know its content{said}"
