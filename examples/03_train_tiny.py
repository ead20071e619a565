"""Train a tiny autoencoder and a tiny diffusion model, for a few steps only: how the parts fit together.

    python examples/03_train_tiny.py [output folder]

Take the steps out of the overrides to train the real `nano` recipes.
"""

import sys
from pathlib import Path

from pixcell import encode_store, load_recipe, tile_slides, train
from pixcell.data.drawn import draw_slide
from pixcell.data.tiling import TilingRecipe
from pixcell.training.recipe import TrainRecipe

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output")
draw_slide(out / "slides" / "drawn.tiff", 2048, 2048, seed=1)
tile_slides(out / "slides", out / "store", load_recipe(TilingRecipe, "tiles-256"), workers=1)

quick = [
    "trainer.steps=4",
    "trainer.checkpoint_every=4",
    "trainer.batch_size=4",
    f"data.store={out / 'store'}",
]
small_codec = ["model.channels=[16,16]", "model.num_blocks=1"]
codec = train(load_recipe(TrainRecipe, "nano-codec", [*quick, *small_codec]), out / "nano-codec")
print(f"autoencoder: {codec.checkpoint}")

# nano sees fields of 128 px, so latents and embeddings are made of such fields.
encode_store(out / "store", codec=str(codec.run), encoder="stain-texture", field_size=128)

small_model = ["model.num_layers=2", "model.num_attention_heads=2", "model.attention_head_dim=16"]
run = train(
    load_recipe(TrainRecipe, "nano", [*quick, f"objective.codec={codec.run}", *small_model]), out / "nano"
)
print(f"diffusion model: {run.checkpoint}, loss {run.loss}")
print(f"what it makes of held-out tissue: {run.preview}")
