"""Memory of encoding against the size of a slide: peak resident size at 1x and 8x the tiles.

    python benchmarks/encoding_memory.py [--tiles 12] [--tile-size 512]

Each size runs in a process of its own, which encodes one slide of random tiles with the small autoencoder
and with ``stain-texture``. The peak is that of the process (``ru_maxrss``); "by encoding" is what it grew by
after the libraries were loaded.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiles", type=int, default=12)
    parser.add_argument("--tile-size", type=int, default=512)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    peaks = []
    for factor in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), options.tiles * factor, options.tile_size)
            command = [sys.executable, __file__, "--measure", folder]
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(line)
        peaks.append(found["peak_mib"])
        print(
            f"{options.tiles * factor:5d} tiles of {options.tile_size} px: peak {found['peak_mib']:.0f} MiB, "
            f"of which {found['encoding_mib']:.0f} MiB by encoding, {found['tiles_per_s']:.1f} tiles/s"
        )
    print(f"peak at 8x / peak at 1x: {peaks[1] / peaks[0]:.3f}")


def make(folder: Path, num_tiles: int, size: int) -> None:
    import imagecodecs
    import numpy as np

    from pixcell.data.store import TileStore
    from pixcell.data.tiling import Tile
    from pixcell.models.autoencoder import TissueAutoencoder

    TissueAutoencoder(latent_channels=4).save_pretrained(folder / "codec")
    store = TileStore.create(folder / "store", {"tile_size": size, "mpp": 0.5})
    random = np.random.default_rng(0)
    tiles = (
        (
            Tile("slide", size * i, 0, size, 0.5, 1.0, 0.0, 1.0),
            imagecodecs.jpeg_encode(random.integers(0, 256, (size, size, 3), dtype=np.uint8), level=90),
        )
        for i in range(num_tiles)
    )
    store.write_images("slide", tiles, {"fingerprint": "random"})


def measure(folder: Path) -> None:
    from pixcell.tasks.encode import encode_store

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.monotonic()
    result = encode_store(
        folder / "store", codec=str(folder / "codec"), encoder="stain-texture", field_size=256, batch_size=4
    )
    duration = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tiles = result.columns[0].num_tiles
    print(json.dumps({"peak_mib": peak, "encoding_mib": peak - before, "tiles_per_s": tiles / duration}))


if __name__ == "__main__":
    main()
