"""Whatever a file stores, pixels come out as RGB8, by one rule that never looks at other pixels.

- More than eight bits: the eight most significant of the *stated* bits. The stated depth is
  ``SignificantBits`` of OME-XML, ``MaxSampleValue`` of TIFF, or else the full type (16). Nothing is
  stretched to the values found: two tiles of one slide, and two slides of one scanner, keep their relation.
- Fewer than eight bits: spread evenly over 0 to 255. One bit: black and white.
- Floating point: 0 to 1 is black to white (or the range that SMin/SMaxSampleValue state). A value outside
  is an error; NaN is "no data" and white.
- Grey: three equal channels. Palette: looked up. CMYK, YCbCr, CIELAB: converted.
- Alpha: laid on white glass. An unspecified fourth channel of a TIFF is not alpha and is left out.
- An ICC profile is applied (to sRGB, relative colorimetric) after resampling; pure white stays pure white.
  A profile that cannot be applied, and the absence of one, are reported in ``Slide.colour``.
"""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

__all__ = ["ColourProfile", "PixelFormat", "image_to_rgb8", "lay_on_white"]

_NO_PROFILE = "no ICC profile"


@dataclass(frozen=True)
class PixelFormat:
    """What the samples of a TIFF mean."""

    channels: int
    """Colour channels: 1 (grey or palette) or 3."""
    bits: int = 8
    """Stated bits per sample of integers."""
    inverted: bool = False
    """Grey where 0 is white."""
    alpha: Literal["none", "straight", "premultiplied"] = "none"
    palette: np.ndarray | None = None
    """(entries, 3) uint8."""
    float_range: tuple[float, float] = (0.0, 1.0)

    def to_rgb8(self, samples: np.ndarray) -> np.ndarray:
        """Convert (height, width, samples) of any number type to (height, width, 3) uint8.

        Raises:
            ValueError: If the numbers are outside of what the rule of this module understands.
        """
        if self.palette is not None:
            return self.palette[np.minimum(samples[..., 0], len(self.palette) - 1)]
        colour = self._to_8bit(samples[..., : self.channels])
        if self.inverted:
            colour = 255 - colour
        if self.channels == 1:
            colour = np.repeat(colour, 3, axis=2)
        if self.alpha != "none":
            alpha = self._to_8bit(samples[..., self.channels])
            return lay_on_white(colour, alpha, premultiplied=self.alpha == "premultiplied")
        return np.ascontiguousarray(colour)

    def _to_8bit(self, samples: np.ndarray) -> np.ndarray:
        if samples.dtype == np.uint8 and self.bits == 8:
            return samples
        if samples.dtype == np.bool_:
            return samples.astype(np.uint8) * np.uint8(255)
        if samples.dtype.kind == "f":
            low, high = self.float_range
            scaled = (np.nan_to_num(samples.astype(np.float64), nan=high) - low) / (high - low)
            if scaled.min() < -1e-3 or scaled.max() > 1 + 1e-3:
                raise ValueError(
                    f"floating-point pixels reach {samples.min():.4g} to {samples.max():.4g}, outside "
                    f"{low:g} to {high:g}; save the image with 8 bits"
                )
            return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
        if samples.dtype.kind != "u":
            raise ValueError(
                f"{samples.dtype} pixels have no stated black and white; save the image with 8 bits"
            )
        if self.bits < 8:
            most = (1 << self.bits) - 1
            return (np.minimum(samples, most).astype(np.uint16) * 255 // most).astype(np.uint8)
        top = np.array((1 << self.bits) - 1, samples.dtype)
        return (np.minimum(samples, top) >> np.array(self.bits - 8, samples.dtype)).astype(np.uint8)

    def describe(self, dtype: Any) -> str:
        """Say in words what is stored and what was done."""
        dtype = np.dtype(dtype)
        depth = "1-bit" if dtype == np.bool_ else f"{dtype}" if dtype.kind == "f" else f"{self.bits}-bit"
        kind = "palette" if self.palette is not None else "grey" if self.channels == 1 else "RGB"
        notes = [
            "0 is white" if self.inverted else "",
            f"{self.alpha} alpha laid on white" if self.alpha != "none" else "",
            f"{self.float_range[0]:g} to {self.float_range[1]:g} as black to white"
            if dtype.kind == "f"
            else "",
            f"the {self.bits} stated bits scaled to 8" if dtype.kind == "u" and self.bits != 8 else "",
        ]
        return ", ".join(part for part in (f"{depth} {kind}", *notes) if part)


class ColourProfile:
    """A slide's ICC profile, ready to be applied; safe to use from several threads."""

    def __init__(self, icc: bytes | None, mode: str = "RGB") -> None:
        """Build the transform to sRGB; what goes wrong is told by :attr:`report`, the pixels then stay."""
        self._transform: Any = None
        self._keep_white = False
        if not icc:
            self.report = _NO_PROFILE
            return
        name = "without a name"
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            name = repr(ImageCms.getProfileDescription(profile).strip() or "without a name")
            transform: Any = ImageCms.buildTransform(
                profile,
                ImageCms.createProfile("sRGB"),
                mode,
                "RGB",
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
        except (OSError, ImageCms.PyCMSError, ValueError) as error:
            self.report = f"ICC profile {name} cannot be applied ({error}); colours are as stored"
            return
        if mode == "RGB" and _is_identity(transform):
            self.report = f"ICC profile {name} is sRGB: nothing to change"
            return
        self._transform = transform
        self._keep_white = mode == "RGB"
        self.report = f"ICC profile {name} applied (to sRGB)"

    @property
    def is_applied(self) -> bool:
        """Tell whether :meth:`apply` changes pixels."""
        return self._transform is not None

    def apply(self, rgb: np.ndarray) -> np.ndarray:
        """Return (height, width, 3) uint8 in sRGB."""
        if self._transform is None:
            return rgb
        result = np.array(ImageCms.applyTransform(Image.fromarray(rgb), self._transform))
        if self._keep_white:  # glass beyond the slide must not turn yellow under a scanner's profile
            result[(rgb == 255).all(axis=2)] = 255
        return result

    def convert(self, image: Image.Image) -> Image.Image:
        """Return a picture of the profile's own mode (grey, CMYK) as sRGB."""
        converted = ImageCms.applyTransform(image, self._transform)
        assert converted is not None
        return converted


def _is_identity(transform: Any) -> bool:
    """Tell whether no colour moves by more than two of 255 levels: below what a JPEG does."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(cube), transform))
    return int(np.abs(moved.astype(int) - cube).max()) <= 2


def lay_on_white(rgb: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """Composite (height, width, 3) uint8 over white by (height, width) uint8 alpha."""
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgb)
    weight = alpha[..., None].astype(np.uint32)
    colour = rgb.astype(np.uint32) * (255 if premultiplied else weight)
    return np.minimum((colour + (255 - weight) * 255 + 127) // 255, 255).astype(np.uint8)


def image_to_rgb8(image: Image.Image) -> tuple[np.ndarray, str]:
    """Convert a PIL image of any mode, profile applied; returns (height, width, 3) uint8 and the report."""
    icc, stored = image.info.get("icc_profile"), _MODES.get(image.mode, f"{image.mode} pixels")
    if image.mode in ("CMYK", "L", "LAB") and icc and "transparency" not in image.info:
        profile = ColourProfile(icc, image.mode)
        if profile.is_applied:
            return np.asarray(profile.convert(image)), f"{stored}; {profile.report}"
        return np.asarray(_plain_rgb(image)), f"{stored}; {profile.report}"
    profile = ColourProfile(icc)
    return profile.apply(np.asarray(_plain_rgb(image))), f"{stored}; {profile.report}"


_MODES = {
    "1": "1-bit black and white",
    "L": "8-bit grey",
    "LA": "8-bit grey, straight alpha laid on white",
    "P": "palette",
    "PA": "palette, straight alpha laid on white",
    "RGB": "8-bit RGB",
    "RGBA": "8-bit RGB, straight alpha laid on white",
    "CMYK": "8-bit CMYK",
    "I;16": "16-bit grey, the 16 stated bits scaled to 8",
}


def _plain_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(
            PixelFormat(1, bits=16).to_rgb8(np.asarray(image).astype(np.uint16)[..., None])
        )
    if image.mode in ("I", "F"):  # PIL would cut everything above 255 to white
        return Image.fromarray(PixelFormat(1).to_rgb8(np.asarray(image)[..., None]))
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
        )
        converted = ImageCms.applyTransform(image, to_rgb)
        assert converted is not None
        return converted
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return Image.fromarray(lay_on_white(rgba[..., :3], rgba[..., 3]))
    return image.convert("RGB")
