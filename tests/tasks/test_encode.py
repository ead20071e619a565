"""Encoding fills columns tile by tile, finishes what was begun, and never mixes two makers."""

import csv
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch

from pixcell.data.images import write_image_shard
from pixcell.data.store import TileStore
from pixcell.data.tiling import Tile
from pixcell.errors import ModelError, RecipeError, SomeFailed, StoreError, StoreMismatch
from pixcell.models.autoencoder import TissueAutoencoder
from pixcell.models.codec import LatentCodec
from pixcell.models.encoders import load_encoder
from pixcell.tasks import encode as encode_module
from pixcell.tasks.encode import encode_store

SIZE = 256
SLIDES = {"a": 5, "naïve slide 2": 3, "z": 1}


def jpeg(seed, size=SIZE):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    return imagecodecs.jpeg_encode(coarse.repeat(16, 0).repeat(16, 1), level=90)


def make_store(path: Path, slides=SLIDES, size=SIZE) -> Path:
    store = TileStore.create(path, {"tile_size": size, "mpp": 0.5})
    for slide_id, num_tiles in slides.items():
        tiles = (
            (Tile(slide_id, size * i, 0, size, 0.5, 1.0, 0.0, 1.0), jpeg(sum(map(ord, slide_id)) + i, size))
            for i in range(num_tiles)
        )
        store.write_images(slide_id, tiles, {"fingerprint": slide_id})
    return path


def make_codec(path: Path, seed=0, **config) -> Path:
    torch.manual_seed(seed)
    TissueAutoencoder(
        **({"latent_channels": 4, "channels": (8, 16), "num_blocks": 1} | config)
    ).save_pretrained(path)
    return path


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


@pytest.fixture
def codec(tmp_path):
    return make_codec(tmp_path / "nano")


def bytes_of(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.suffix != ".parquet"
    }


# ── what stands in a column ──────────────────────────────────────────────────────────────────────────


def test_a_record_is_what_the_models_say_of_that_tile(store, codec):
    result = encode_store(store, codec=str(codec), encoder="stain-texture", field_size=128, batch_size=2)
    assert [(c.column, c.num_encoded, c.num_tiles) for c in result.columns] == [
        ("latents-nano", 3, 9),
        ("embeddings-stain-texture", 3, 9),
    ]
    opened, loaded, described = (
        TileStore.open(store),
        LatentCodec.from_pretrained(codec),
        load_encoder("stain-texture"),
    )
    latents, embeddings = opened.column("latents-nano"), opened.column("embeddings-stain-texture")
    assert latents.shape == (2, 2, 8, 16, 16)
    assert embeddings.shape == (2, 2, 128)
    for slide_id in SLIDES:
        tile = SLIDES[slide_id] - 1
        with opened.images(slide_id) as shard:
            image = torch.from_numpy(shard.image(tile)).permute(2, 0, 1)[None]
        posterior = torch.cat(loaded.encode(image), dim=1)[0].half().numpy()
        record = latents.read(slide_id, tile)
        for row in range(2):
            for column in range(2):
                cut = posterior[:, 16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
                # One unit of half precision: batches of other sizes may take other kernels.
                np.testing.assert_allclose(record[row, column], cut, rtol=2e-3, atol=1e-4)
        expected = described.grid(image, 128)[0].half().numpy()
        np.testing.assert_array_equal(embeddings.read(slide_id, tile), expected)


def test_a_column_remembers_what_made_it(store, codec):
    encode_store(store, codec=str(codec), encoder="stain-texture", field_size=128)
    opened = TileStore.open(store)
    made_by = opened.column("latents-nano").made_by
    assert made_by["kind"] == "latents"
    assert made_by["codec"] == LatentCodec.from_pretrained(codec).made_by()
    assert (made_by["field_size"], made_by["source"], made_by["precision"]) == (128, "images", "fp32")
    assert (
        opened.column("embeddings-stain-texture").made_by["encoder"]
        == load_encoder("stain-texture").made_by()
    )
    assert opened.verify() == []


def test_columns_take_the_names_given(store, codec):
    encode_store(store, codec=str(codec), latents_column="latents-x", field_size=256)
    assert TileStore.open(store).columns() == ["images", "latents-x"]


def test_batches_and_threads_do_not_change_the_bytes_of_embeddings(tmp_path):
    stores = [make_store(tmp_path / name) for name in ("one", "many")]
    encode_store(stores[0], encoder="stain-texture", batch_size=1, workers=1)
    encode_store(stores[1], encoder="stain-texture", batch_size=64, workers=4)
    assert bytes_of(stores[0]) == bytes_of(stores[1])


# ── stop and restart ─────────────────────────────────────────────────────────────────────────────────


def test_finished_slides_are_not_encoded_again(store, codec, monkeypatch):
    encode_store(store, codec=str(codec))
    before = bytes_of(store)
    monkeypatch.setattr(encode_module, "_decoded", lambda *_: pytest.fail("a finished slide was read again"))
    again = encode_store(store, codec=str(codec))
    assert (again.columns[0].num_encoded, again.columns[0].num_skipped) == (0, 3)
    assert bytes_of(store) == before


def test_killed_and_run_again_equals_undisturbed(tmp_path):
    """SIGKILL in the middle: only the slide in flight is lost, and the end is the same, byte for byte."""
    slides = {f"slide {n}": 12 for n in range(4)}
    killed, undisturbed = (
        make_store(tmp_path / "killed", slides),
        make_store(tmp_path / "undisturbed", slides),
    )
    codec = make_codec(tmp_path / "nano", channels=(32, 32), num_blocks=2)
    code = (
        "import sys, torch\ntorch.set_num_threads(1)\nfrom pathlib import Path\n"
        "from pixcell.tasks.encode import encode_store\n"
        f"encode_store(Path(sys.argv[1]), codec={str(codec)!r}, batch_size=1, workers=2)\n"
    )
    said = tmp_path / "stderr.txt"
    with said.open("w") as stderr:
        process = subprocess.Popen([sys.executable, "-c", code, str(killed)], stderr=stderr)
    column = killed / "latents-nano"
    deadline = time.monotonic() + 120
    while not list(column.glob("*.npy")):
        assert process.poll() is None, f"it ended before it could be killed: {said.read_text()}"
        assert time.monotonic() < deadline, "no slide was finished within two minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in column.glob("*.npy")}
    assert 1 <= len(done) < len(slides)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was killed: sums are split by thread
    for store in (killed, undisturbed):
        encode_store(store, codec=str(codec), batch_size=1, workers=2)
    torch.set_num_threads(num_threads)
    assert {name: (column / name).stat().st_mtime_ns for name in done} == done, "finished work was done again"
    final = {name: data for name, data in bytes_of(killed).items() if ".tmp-" not in name}
    assert final == bytes_of(undisturbed)


def test_later_tiles_are_decoded_while_one_is_encoded(store, monkeypatch):
    later = threading.Event()
    names = set()
    pixels, half = encode_module._pixels, encode_module._as_float16

    def decode(shard, tile, size):
        names.add(threading.current_thread().name.split("_")[0])
        if tile == 2:
            later.set()
        return pixels(shard, tile, size)

    def encode(target, slide_id, records):
        names.add(threading.current_thread().name)
        if slide_id == "a":
            assert later.wait(10), "tile 2 was not decoded before tile 0 was encoded"
        return half(target, slide_id, records)

    monkeypatch.setattr(encode_module, "_pixels", decode)
    monkeypatch.setattr(encode_module, "_as_float16", encode)
    encode_store(store, encoder="stain-texture", batch_size=1, workers=2)
    assert names == {"decode", "encode"}


def test_encoding_goes_on_while_a_batch_is_written():
    produced = threading.Event()

    def pieces():
        yield 1
        yield 2
        produced.set()
        yield 3

    with encode_module._Ahead(pieces()) as ahead:
        assert next(ahead) == 1
        assert produced.wait(10), "nothing was made while the first piece was in use"
        assert list(ahead) == [2, 3]


def test_who_gives_up_in_the_middle_leaves_no_thread():
    threads = threading.active_count()
    with encode_module._Ahead(iter(range(1000))) as ahead:
        next(ahead)
    assert threading.active_count() == threads


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:2] + bytes(100),
        lambda data: data[: len(data) // 2],
        lambda data: jpeg(0, 128),
    ],
    ids=["garbage", "cut short", "another size"],
)
def test_one_bad_tile_fails_its_slide_and_no_other(tmp_path, spoil):
    store = make_store(tmp_path / "store", {"good": 2, "later": 2})
    tiles = [(Tile("bad", SIZE * i, 0, SIZE, 0.5, 1.0, 0.0, 1.0), jpeg(i)) for i in range(3)]
    tiles[1] = (tiles[1][0], spoil(tiles[1][1]))
    # Not through the store, which would refuse it: the damage came later.
    write_image_shard(store / "images" / "bad.h5", tiles, {"fingerprint": "bad"}, "bad")
    with pytest.raises(SomeFailed, match=r"1 of the slides failed \(bad .*tile 1 of") as caught:
        encode_store(store, encoder="stain-texture", batch_size=1)
    assert TileStore.open(store).slide_ids("embeddings-stain-texture") == ["good", "later"]
    assert caught.value.result.columns[0].num_encoded == 2
    rows = list(csv.DictReader(caught.value.table.open()))
    assert [(row["column"], row["slide"]) for row in rows] == [("embeddings-stain-texture", "bad")]
    assert "tile 1" in rows[0]["reason"]


def test_the_table_of_failures_goes_when_nothing_fails(store, tmp_path):
    broken = store / "images" / "a.h5"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-100])
    with pytest.raises(SomeFailed):
        encode_store(store, encoder="stain-texture")
    table = store / "reports" / "encoding-failures.csv"
    assert table.is_file()
    broken.write_bytes(whole)
    encode_store(store, encoder="stain-texture")
    assert not table.exists()


def test_a_slide_that_was_tiled_again_is_not_taken_for_done(store):
    encode_store(store, encoder="stain-texture")
    (store / "images" / "a.h5").unlink()
    tiles = [(Tile("a", SIZE * i, 0, SIZE, 0.5, 1.0, 0.0, 1.0), jpeg(100 + i)) for i in range(5)]
    TileStore.open(store).write_images("a", tiles, {"fingerprint": "a, cut again"})
    with pytest.raises(SomeFailed, match=r"1 of the slides failed .*made from other images.*a.npy"):
        encode_store(store, encoder="stain-texture")


def test_a_byte_changed_inside_a_shard_is_noticed(store):
    """Most damaged JPEGs still decode, to something else."""
    shard = store / "images" / "a.h5"
    data = bytearray(shard.read_bytes())
    middle = data.find(b"\xff\xda") + 400  # pixels of the first JPEG
    data[middle] ^= 0x55
    shard.write_bytes(bytes(data))
    with pytest.raises(SomeFailed, match=r"a \(embeddings-stain-texture\).*damaged"):
        encode_store(store, encoder="stain-texture")


def test_another_codec_under_the_same_name_is_refused(store, tmp_path):
    encode_store(store, codec=str(make_codec(tmp_path / "one" / "nano")))
    before = bytes_of(store)
    with pytest.raises(StoreMismatch, match=r"codec.sha256 is"):
        encode_store(store, codec=str(make_codec(tmp_path / "two" / "nano", seed=1)))
    with pytest.raises(StoreMismatch, match="field_size is 256 in the store and 128 here"):
        encode_store(store, codec=str(tmp_path / "one" / "nano"), field_size=128)
    assert bytes_of(store) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ModelError, "name an autoencoder"),
        ({"encoder": "stain-texture", "field_size": 100}, StoreMismatch, "no whole number of 100 px fields"),
        ({"encoder": "stain-texture", "field_size": 0}, StoreMismatch, "no whole number of 0 px fields"),
        ({"encoder": "stain-texture", "device": "cuda:77"}, ModelError, "cuda:77"),
        ({"encoder": "stain-texture", "embeddings_column": "../x"}, StoreError, "cannot be the name"),
        ({"encoder": "stain-texture", "embeddings_column": "images"}, StoreError, "holds the tiles"),
        ({"encoder": "stain-texture", "precision": "int4"}, ModelError, "fp32, bf16, fp16"),
        ({"encoder": "stain-texture", "batch_size": 0}, RecipeError, "batch_size must be at least 1"),
        ({"encoder": "stain-texture", "workers": -2}, RecipeError, "workers must be at least 1"),
    ],
    ids=["nothing", "field size", "no field", "device", "name", "images", "precision", "batch", "workers"],
)
def test_a_wrong_option_is_one_clear_error(store, options, error, message):
    with pytest.raises(error, match=message):
        encode_store(store, **options)
    assert TileStore.open(store).columns() == ["images"]


def test_what_can_be_refused_is_refused_before_any_work(store, codec):
    """A missing encoder is found before the first latent is computed."""
    with pytest.raises(ModelError, match="there is no encoder"):
        encode_store(store, codec=str(codec), encoder="no-such-encoder")
    encode_store(store, encoder="stain-texture")
    with pytest.raises(StoreMismatch, match="field_size"):
        encode_store(store, codec=str(codec), encoder="stain-texture", field_size=128)
    assert TileStore.open(store).columns() == ["images", "embeddings-stain-texture"]


def test_latents_and_embeddings_under_one_name_are_refused(store, codec):
    """The second would find its slides done already, and be left out without a word."""
    with pytest.raises(RecipeError, match="cannot share the column 'both'"):
        encode_store(
            store,
            codec=str(codec),
            encoder="stain-texture",
            latents_column="both",
            embeddings_column="both",
        )
    assert TileStore.open(store).columns() == ["images"]


def test_values_that_half_precision_cannot_hold_are_refused(store, tmp_path):
    model = TissueAutoencoder(4, (8, 16), 1)
    with torch.no_grad():
        model.encoder[-1].bias.fill_(1e6)
    model.save_pretrained(tmp_path / "wild")
    with pytest.raises(ModelError, match="float16 cannot hold"):
        encode_store(store, codec=str(tmp_path / "wild"))
    assert TileStore.open(store).columns() == ["images"]


def test_a_full_disk_stops_the_run_and_a_rerun_completes_it(store, codec, monkeypatch):
    from pixcell.data import store as store_module
    from pixcell.errors import OutputError

    real, calls = store_module.write_column_shard, []

    def full_at_the_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            next(iter(arguments[1]))
            raise OutputError("the disk is full")
        return real(*arguments, **options)

    monkeypatch.setattr(store_module, "write_column_shard", full_at_the_second)
    threads = threading.active_count()
    with pytest.raises(OutputError):
        encode_store(store, codec=str(codec), batch_size=1)
    assert threading.active_count() == threads
    assert len(calls) == 2
    assert encode_store(store, codec=str(codec)).columns[0].num_skipped == 1


def test_real_tiles(shared_data, tmp_path):
    """Colon at 0.5 mpp, enlarged to whole fields: two classes differ more than two tiles of one."""
    from PIL import Image

    folder = next(path for path in (shared_data / "crc_val_he_7k").rglob("*") if path.is_dir()).parent
    store = TileStore.create(tmp_path / "store", {"tile_size": SIZE, "mpp": 0.5})
    for kind in sorted(path for path in folder.iterdir() if path.is_dir())[:2]:
        pictures = sorted(kind.glob("*.jpg"))[:2]
        tiles = []
        for index, path in enumerate(pictures):
            picture = np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE)))
            tile = Tile(kind.name, SIZE * index, 0, SIZE, 0.5, 1.0, 0.0, 1.0)
            tiles.append((tile, imagecodecs.jpeg_encode(picture, level=90)))
        store.write_images(kind.name, tiles, {"fingerprint": kind.name})
    encode_store(tmp_path / "store", encoder="stain-texture")
    column = store.column("embeddings-stain-texture")
    one, other = (column.array(slide_id)[:, 0, 0].astype(float) for slide_id in column.slide_ids)
    assert np.linalg.norm(one[0] - one[1]) < np.linalg.norm(one[0] - other[0])


def test_a_slide_is_never_whole_in_memory(tmp_path):
    """At most a few batches are decoded ahead of the one that is encoded."""
    store = make_store(tmp_path / "store", {"long": 60})
    decoded, seen = [], []
    real = encode_module._pixels

    def pixels(shard, tile, size):
        decoded.append(tile)
        return real(shard, tile, size)

    def half(target, slide_id, records):
        seen.append(len(decoded))
        time.sleep(0.01)
        return records.half().numpy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "_pixels", pixels)
        patch.setattr(encode_module, "_as_float16", half)
        encode_store(store, encoder="stain-texture", batch_size=2, workers=4)
    ahead = [count - 2 * (index + 1) for index, count in enumerate(seen)]
    assert max(ahead) <= 2 * 3
