"""Stain a picture of H&E, with tiny random models: how the parts fit together.

    python examples/04_stain.py [output folder] [H&E picture, 128 x 128 px]

Random models know nothing of tissue, so what comes out means nothing. Published models for HER2, ER, PR and
Ki67 take the same calls; see docs/guides/virtual-staining.md.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixcell import Box, PixCellTransformer2DModel, Slide
from pixcell.data.drawn import draw_slide
from pixcell.diffusion.sampling import make_scheduler
from pixcell.diffusion.staining import VirtualStainingPipeline
from pixcell.models.adapters import add_lora
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.encoders import load_encoder
from pixcell.models.translator import EmbeddingTranslator
from pixcell.provenance import save_synthetic_png

out = Path(sys.argv[1] if len(sys.argv) > 1 else "example-output")
if len(sys.argv) > 2:
    he = Image.open(sys.argv[2]).convert("RGB")
else:
    draw_slide(out / "drawn.tiff", 2048, 2048, seed=1)
    with Slide.open(out / "drawn.tiff") as slide:
        he = Image.fromarray(slide.read(Box(1024, 1024, 128, 128), mpp=slide.mpp))

# Pictures of 128 px with 2 x 2 fields; the encoder needs no weights.
torch.manual_seed(0)
encoder = load_encoder("stain-texture")
denoiser = PixCellTransformer2DModel(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=8,
    num_layers=2,
    cross_attention_dim=32,
    sample_size=16,
    caption_channels=encoder.dim,
    caption_num_tokens=4,
)
add_lora(denoiser)  # trained on pictures of the stain, it would turn the denoiser to it
translator = EmbeddingTranslator(encoder.dim, 64, 64, 64, encoder.dim, num_res_blocks=2)
codec = TissueAutoencoder(latent_channels=4, channels=(8, 16), num_blocks=1)

facts = {"stain": "HER2", "field_size": 64, "mpp": 0.5}
pipeline = VirtualStainingPipeline(
    denoiser, codec, make_scheduler(), translator, facts=facts, encoder=encoder
)
pipeline.save_pretrained(out / "her2")
pipeline = VirtualStainingPipeline.from_pretrained(out / "her2", encoder=encoder)

stained = pipeline(he, num_inference_steps=5, generator=torch.Generator().manual_seed(0)).images[0]
he.save(out / "he.png")
save_synthetic_png(
    out / "her2.png", np.asarray(stained), {"example": "random models", "stain": "HER2", "seed": 0}
)
print(f"from {out / 'he.png'} to {out / 'her2.png'}: random models, the picture means nothing")
