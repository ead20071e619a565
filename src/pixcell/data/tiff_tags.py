"""What the tags of a TIFF say: how samples become a picture, how large a pixel is, who wrote it."""

from typing import Any

import numpy as np
import tifffile

from pixcell.data.colour import PixelFormat
from pixcell.data.resolution import Resolution, from_density, from_description, from_ome, microns_of

__all__ = ["APERIO_JPEG2000", "NotThisReader", "pixel_format", "properties_of", "resolution_of"]

_READABLE = {
    tifffile.COMPRESSION.NONE, tifffile.COMPRESSION.LZW, tifffile.COMPRESSION.JPEG,
    tifffile.COMPRESSION.ADOBE_DEFLATE, tifffile.COMPRESSION.DEFLATE, tifffile.COMPRESSION.PACKBITS,
    tifffile.COMPRESSION.ZSTD, tifffile.COMPRESSION.WEBP, tifffile.COMPRESSION.JPEG2000,
    tifffile.COMPRESSION.CCITTRLE, tifffile.COMPRESSION.CCITT_T4, tifffile.COMPRESSION.CCITT_T6,
    tifffile.COMPRESSION.JPEGXL, tifffile.COMPRESSION.JPEGXL_DNG,
}  # fmt: skip
APERIO_JPEG2000 = {tifffile.COMPRESSION.APERIO_JP2000_YCBC, tifffile.COMPRESSION.APERIO_JP2000_RGB}


class NotThisReader(Exception):
    """A reader declines a file; the next one may try."""


def pixel_format(tiff: tifffile.TiffFile, series: Any, page: Any) -> tuple[PixelFormat, str]:
    """Find out what the samples mean; refuse what is no bright-field picture."""
    if page.compression not in _READABLE | APERIO_JPEG2000:
        raise NotThisReader(f"TIFF compression {getattr(page.compression, 'name', page.compression)}")
    photometric, samples = page.photometric, page.samplesperpixel
    separate = dict(zip(series.axes, series.shape, strict=True)).get("C", 1) if samples == 1 else 1
    bits = _stated_bits(tiff, page)
    kinds = tifffile.PHOTOMETRIC
    if photometric == kinds.PALETTE:
        palette = np.asarray(page.colormap)
        shift = 8 if palette.dtype.itemsize > 1 and palette.max(initial=0) > 255 else 0
        return PixelFormat(1, bits=bits, palette=(palette >> shift).astype(np.uint8).T.copy()), ""
    if separate == 3:
        return PixelFormat(3, bits=bits, float_range=_float_range(page)), (
            "3 channels stored apart, taken as red, green and blue"
        )
    if separate != 1 or (photometric in (kinds.MINISBLACK, kinds.MINISWHITE) and samples > 2):
        count = max(separate, samples)
        if count != 3:
            raise ValueError(
                f"it has {count} channels, as fluorescence images do; only bright-field pictures "
                "(grey or RGB) can be used"
            )
        photometric = kinds.RGB
    if photometric == kinds.YCBCR and page.compression not in (7, 34712):
        raise NotThisReader("YCbCr that is not JPEG")
    channels = {kinds.MINISWHITE: 1, kinds.MINISBLACK: 1, kinds.RGB: 3, kinds.YCBCR: 3}.get(photometric)
    if channels is None:
        raise NotThisReader(f"TIFF photometric interpretation {getattr(photometric, 'name', photometric)}")
    if samples < channels:
        raise ValueError(f"its TIFF structure is damaged ({samples} samples for {channels} channels)")
    extra = page.extrasamples[0] if samples > channels and page.extrasamples else None
    alpha = {tifffile.EXTRASAMPLE.UNASSALPHA: "straight", tifffile.EXTRASAMPLE.ASSOCALPHA: "premultiplied"}
    return PixelFormat(
        channels,
        bits=bits,
        inverted=photometric == kinds.MINISWHITE,
        alpha=alpha.get(extra, "none"),  # type: ignore[arg-type]
        float_range=_float_range(page),
    ), ""


def _stated_bits(tiff: tifffile.TiffFile, page: Any) -> int:
    """The depth that the file states, which may be less than the type has room for."""
    stored = int(page.bitspersample)
    if page.dtype is None:
        raise NotThisReader(f"{stored}-bit samples")
    if page.dtype.kind != "u" or stored <= 8:
        return stored
    if tiff.is_ome and tiff.ome_metadata and 'SignificantBits="' in tiff.ome_metadata:
        significant = tiff.ome_metadata.split('SignificantBits="')[1].split('"')[0]
        if significant.isdigit() and 1 <= int(significant) <= stored:
            return int(significant)
    largest = page.tags.valueof(281)  # MaxSampleValue
    if largest is not None:
        top = int(np.max(largest))
        if top > 0:
            return min(stored, max(1, top.bit_length()))
    return stored


def _float_range(page: Any) -> tuple[float, float]:
    if page.dtype is None or page.dtype.kind != "f":
        return 0.0, 1.0
    low, high = page.tags.valueof(340), page.tags.valueof(341)  # SMinSampleValue, SMaxSampleValue
    low = 0.0 if low is None else float(np.min(low))
    high = 1.0 if high is None else float(np.max(high))
    return (low, high) if high > low else (0.0, 1.0)


def resolution_of(tiff: tifffile.TiffFile, page: Any) -> tuple[Resolution | None, str | None]:
    """Return the size of a pixel of level 0, and a remark if a print density was not believed."""
    if tiff.is_ome and tiff.ome_metadata:
        found = from_ome(tiff.ome_metadata, page.imagewidth, page.imagelength)
        if found:
            return found, None
    found = _from_imagej(tiff, page)
    if found:
        return found, None
    found, remark = _from_density_tags(page)
    return found or from_description(page.description or ""), remark


def _from_density_tags(page: Any) -> tuple[Resolution | None, str | None]:
    per_unit = {tifffile.RESUNIT.INCH: 25_400.0, tifffile.RESUNIT.CENTIMETER: 10_000.0}
    unit = per_unit.get(page.tags.valueof(296, 2))
    x, y = (_ratio(page.tags.valueof(tag)) for tag in (282, 283))
    if unit is None or not (x or y):
        return None, None
    x, y = x or y, y or x
    assert x
    assert y
    return from_density(unit / x, unit / y, "TIFF XResolution/YResolution")


def _from_imagej(tiff: tifffile.TiffFile, page: Any) -> Resolution | None:
    """ImageJ keeps pixels per unit in the resolution tags, and names the unit in its description."""
    if not tiff.is_imagej:
        return None
    microns = microns_of((tiff.imagej_metadata or {}).get("unit", ""))
    x, y = (_ratio(page.tags.valueof(tag)) for tag in (282, 283))
    if not microns or not x or not y:
        return None
    return Resolution.of(microns / x, microns / y, "ImageJ calibration")


def _ratio(value: Any) -> float | None:
    if not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
        return None
    return float(value[0]) / float(value[1])


def properties_of(tiff: tifffile.TiffFile, page: Any) -> dict[str, str]:
    """Return what a person may want to know of how the file is stored."""
    properties = {
        "tiff.compression": str(getattr(page.compression, "name", page.compression)),
        "tiff.photometric": str(getattr(page.photometric, "name", page.photometric)),
        "tiff.segment": f"{page.tilewidth} x {page.tilelength} tiles" if page.is_tiled else "strips",
    }
    if tiff.is_ome:
        properties["tiff.kind"] = "OME-TIFF"
    for name in ("Make", "Model", "Software", "DateTime", "ImageDescription"):
        tag = page.tags.get(name)
        if tag is not None and str(tag.value).strip():
            properties[f"tiff.{name}"] = str(tag.value).strip()
    turned = page.tags.valueof(274, 1)
    if turned not in (None, 1):
        properties["tiff.Orientation"] = f"{int(turned)} (not applied: pixels are as stored)"
    return properties
