"""What the tests of training share with those of its verb."""

from training_fixtures import (
    codec_folder,
    codec_recipe,
    recipe,
    single_tile_store,
    small_disk,
    store,
)

__all__ = [
    "codec_folder",
    "codec_recipe",
    "recipe",
    "single_tile_store",
    "small_disk",
    "store",
]
