"""Open a slide, ask what it is, and read the same place at two resolutions.

    python examples/01_read_a_slide.py [slide] [output folder]

Without a slide, one is drawn.
"""

import sys
from pathlib import Path

from PIL import Image

from pixcell import Box, Slide
from pixcell.data.drawn import draw_slide

out = Path(sys.argv[2] if len(sys.argv) > 2 else "example-output")
out.mkdir(parents=True, exist_ok=True)
path = Path(sys.argv[1]) if len(sys.argv) > 1 else out / "drawn.tiff"
if not path.is_file():
    draw_slide(path, 2048, 2048, seed=1)

with Slide.open(path) as slide:
    print(f"{path.name}: {slide.width} x {slide.height} px at {slide.mpp} microns per pixel")
    print(f"  read by {slide.backend}, {len(slide.levels)} levels, colour: {slide.colour}")

    # A box is in level-0 pixels; mpp says how fine the picture of it shall be.
    centre = Box(slide.width // 2 - 256, slide.height // 2 - 256, 512, 512)
    for mpp in (slide.mpp, 2 * slide.mpp):
        picture = slide.read(centre, mpp=mpp)
        print(f"  512 x 512 level-0 pixels at {mpp:g} mpp: {picture.shape[1]} x {picture.shape[0]}")
        Image.fromarray(picture).save(out / f"centre-{mpp:g}mpp.png")
