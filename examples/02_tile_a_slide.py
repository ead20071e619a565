"""Cut a slide into tiles of tissue, and look into the store.

python examples/02_tile_a_slide.py [output folder]
"""

import sys
from pathlib import Path

from PIL import Image

from pixcell import TileStore, load_recipe, tile_slides
from pixcell.data.drawn import draw_slide
from pixcell.data.tiling import TilingRecipe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output")
draw_slide(out / "slides" / "drawn.tiff", 2048, 2048, seed=1, pen=["blue"])

recipe = load_recipe(TilingRecipe, "tiles-256", ["tiling.min_tissue=0.6"])
result = tile_slides(out / "slides", out / "store", recipe, workers=1)
print(f"look at {out / 'store' / 'qc'} to see which tiles were kept, and why the others were not")

store = TileStore.open(out / "store")
for slide_id in store.slide_ids():
    with store.images(slide_id) as shard:
        print(f"{slide_id}: {len(shard)} tiles of {store.tile_size} px at {store.mpp} mpp")
        Image.fromarray(shard.image(0)).save(out / "first-tile.png")

# The index is an Arrow table with one row per tile: filter it, join it, count with it.
print(store.index().select(["slide_id", "x", "y", "tissue"]).slice(0, 3).to_pylist())
