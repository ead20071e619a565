"""Draw conditions from a prior, walk between two embeddings, mix three: with a tiny model of random weights.

    python examples/05_draw_conditions.py [output folder]

The pictures show nothing: the weights are random. Put the pipeline of a trained model in its place.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell import (
    EmbeddingPrior,
    PixCellPipeline,
    PixCellTransformer2DModel,
    encode_store,
    fit_prior,
    load_recipe,
    tile_slides,
)
from pixcell.data.drawn import draw_slide
from pixcell.data.tiling import TilingRecipe
from pixcell.diffusion.embeddings import mix, path
from pixcell.diffusion.prototypes import Prototypes
from pixcell.diffusion.sampling import generator_for, make_scheduler
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.provenance import save_synthetic_png

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output")
draw_slide(out / "slides" / "drawn.tiff", 2048, 2048, seed=1)
tile_slides(out / "slides", out / "store", load_recipe(TilingRecipe, "tiles-256"), workers=1)
encode_store(out / "store", encoder="stain-texture", field_size=128)

# Where do the embeddings of this tissue lie, and which fields are typical of it?
result = fit_prior(out / "store", out / "prior", size=128, components=2, prototypes=3)
print(f"{result.num_components} Gaussians along {result.rank} directions, fitted to {result.number} fields")
prior, prototypes = EmbeddingPrior.load(out / "prior"), Prototypes.load(out / "prior")
print(f"nearest to draw 0: {prototypes.nearest(prior.sample(seed=0, index=0))[0]}")

torch.manual_seed(0)
pipeline = PixCellPipeline(
    PixCellTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=128,
        caption_num_tokens=1,
    ),
    TissueAutoencoder(latent_channels=4, channels=(8, 16), num_blocks=1),
    make_scheduler(),
    {"encoder": dict(prior.facts["encoder"]), "field_size": 128, "mpp": 0.5},  # so that others are refused
)
pipeline.set_progress_bar_config(disable=True)

conditions = {
    "drawn": prior.conditioning(seed=0, indices=range(6)),
    "between": path(prototypes.grids[:2], 6),
    "mixed": torch.stack([mix(prototypes.grids, torch.tensor([1.0, 1.0, share])) for share in range(6)]),
}
sheet = Image.new("RGB", (6 * 128, 3 * 128))
for row, (name, condition) in enumerate(conditions.items()):
    # Drawn pictures each have a noise of their own; on a way one noise for all shows what the condition does.
    noise = [generator_for(0, index if name == "drawn" else 0) for index in range(6)]
    for column, picture in enumerate(pipeline(condition, num_inference_steps=4, generator=noise).images):
        sheet.paste(picture, (128 * column, 128 * row))
save_synthetic_png(
    out / "sheet.png", np.asarray(sheet), {"example": "random model", "rows": list(conditions)}
)
print(f"rows of {out / 'sheet.png'}: {', '.join(conditions)}")
