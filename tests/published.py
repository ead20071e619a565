"""Folders in the published PixCell layout, for tests."""

import h5py
import numpy as np

from stores import jpeg_of

INDEX = "patches/metadata/patch_names_all.hdf5"
# Slides interleave, one slide name stands in two cohorts, and cohorts may be missing.
NAMES = {
    "tcga_diagnostic": [
        "tcga_diagnostic/lihc/single_1024/TCGA-A/82_17.jpeg",
        "tcga_diagnostic/lihc/single_1024/TCGA-B/3_4.jpeg",
        "tcga_diagnostic/lihc/single_1024/TCGA-A/9_17.jpeg",
        "tcga_diagnostic/brca/single_1024/TCGA-B/3_4.jpeg",
    ],
    "gtex": ["gtex/single_1024/Leber 1/0_0.jpeg"],
}
JPEG = jpeg_of(1, size=1024)


def latents_of(seed: int) -> np.ndarray:
    """Any float16 there is, infinities and NaNs of every kind among them: bits must survive."""
    return np.random.default_rng(seed).integers(0, 1 << 16, (32, 128, 128), np.uint16).view(np.float16)


def embeddings_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(16, 1536)).astype(np.float16)


def write_published(root, names=NAMES, features="patches", latents_of=latents_of):
    for number, name in enumerate(name for group in names.values() for name in group):
        image, feature = root / "patches" / name, root / features / name.removesuffix(".jpeg")
        image.parent.mkdir(parents=True, exist_ok=True)
        feature.parent.mkdir(parents=True, exist_ok=True)
        # Each JPEG differs; what follows its end is not looked at by decoders, and must be kept, too.
        image.write_bytes(JPEG + bytes([number]))
        np.save(f"{feature}_sd3_vae.npy", latents_of(number))
        np.save(f"{feature}_uni.npy", embeddings_of(number))
    write_published_index(root, names)
    return root


def write_published_index(root, names):
    (root / INDEX).parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / INDEX, "w") as file:
        for source, group in names.items():
            file.create_dataset(f"{source}_1024", data=np.array([name.encode() for name in group]))
