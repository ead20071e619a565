"""Small real tile stores for tests, and work on them that a test can run in another process."""

import io
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile

TILING = {"tile_size": 128, "mpp": 0.5, "stride": None}
LATENTS_MADE_BY = {
    "kind": "latents",
    "codec": {"name": "tiny", "sha256": "c" * 64},
    "field_size": 32,
    "source": "images",
}
EMBEDDINGS_MADE_BY = {
    "kind": "embeddings",
    "encoder": {"name": "tiny", "sha256": "e" * 64},
    "field_size": 32,
    "source": "images",
}


def jpeg_of(seed: int, size: int = 128) -> bytes:
    """A picture whose 32-pixel squares are of different grey, so that a field shows where it was cut."""
    squares = np.random.default_rng(seed).integers(40, 220, (size // 32, size // 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares.repeat(32, 0).repeat(32, 1)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def tiles_of(slide_id: str, count: int, size: int = 128, **attributes: str) -> Iterator[tuple[Tile, bytes]]:
    seed = sum(slide_id.encode())
    for i in range(count):
        tile = Tile(slide_id, 1000 + 256 * i, 512, size, 0.5, 0.75, 0.0, 1.25, attributes=dict(attributes))
        yield tile, jpeg_of(seed + i, size)


def records_of(slide_id: str, count: int, shape: tuple[int, ...]) -> np.ndarray:
    random = np.random.default_rng(sum(slide_id.encode()))
    return random.normal(size=(count, *shape)).astype(np.float16)


def fill(
    store: TileStore,
    slide_id: str,
    count: int,
    embeddings_made_by: dict = EMBEDDINGS_MADE_BY,
    **attributes: str,
) -> None:
    """Give a slide images, latents (4 channels of 4 x 4 per 32-pixel field) and embeddings."""
    store.write_images(slide_id, tiles_of(slide_id, count, **attributes), {"fingerprint": slide_id})
    columns = {
        "latents-tiny": ((4, 4, 8, 4, 4), LATENTS_MADE_BY),
        "embeddings-tiny": ((4, 4, 6), embeddings_made_by),
    }
    for column, (shape, made_by) in columns.items():
        records = records_of(slide_id, count, shape)
        store.write_column(
            column,
            slide_id,
            iter([records[:1], records[1:]]),
            shape=shape,
            dtype=np.float16,
            made_by=made_by,
            num_tiles=count,
        )


def small_store(path: Path) -> TileStore:
    store = TileStore.create(path, TILING)
    fill(store, "A 1", 5, organ="breast", split="train")
    fill(store, "Präparat Ω 組織", 3, organ="colon", split="test")
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """Every finished file with its bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".tmp-" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_until_killed(path: str) -> None:
    """Write a slide whose tiles never end, and say when a few are on disk."""
    store = TileStore.open(Path(path))

    def endless() -> Iterator[tuple[Tile, bytes]]:
        number = 0
        while True:
            yield from tiles_of("killed", 50)
            number += 1
            if number == 8:
                print("writing", flush=True)

    store.write_images("killed", endless(), {"fingerprint": "killed"})


def kill_while_packing(store: str, work: str) -> None:
    """Kill a process that packs, before and after each thing it does to the disk, and let another go on.

    Prints the number of moments. Each child is a fork of this process, which has touched nothing yet.
    """
    import pixcell.tasks.pack  # noqa: F401 - once, not in every child

    reference = Path(work) / "whole"
    moments = _in_a_fork(store, reference, 0)
    assert moments == 0
    whole = contents(reference)
    moment = 0
    while True:
        moment += 1
        folder = Path(work) / f"killed-{moment}"
        if _in_a_fork(store, folder, moment) == 0:
            break
        assert _in_a_fork(store, folder, 0) == 0, f"after a kill at moment {moment} it does not go on"
        assert contents(folder) == whole, f"after a kill at moment {moment} the bytes differ"
        assert not (folder / "packing").exists()
    print(moment - 1)


def _in_a_fork(store: str, folder: Path, moment: int) -> int:
    """Pack in a child, which dies at the given moment; return 0 if it came to its end, else the signal."""
    child = os.fork()
    if child == 0:
        from pixcell.tasks.pack import pack_store

        _die_at(moment)
        pack_store(Path(store), folder, shard_size=50_000, workers=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _die_at(moment: int) -> None:
    passed = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal passed
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            passed += 1
            if passed == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync = counted(lambda descriptor: None)  # a killed process loses nothing that it had written
    shutil.rmtree = counted(shutil.rmtree)
    for name in ("replace", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))


def fill_many(path: str, *slide_ids: str) -> None:
    store = TileStore.create(Path(path), TILING)
    for slide_id in slide_ids:
        fill(store, slide_id, 20, organ="breast")
        store.index()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
