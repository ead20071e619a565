"""A pack elsewhere is trained on as one here: each shard is fetched once, whole, and checked."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data.tile_source_contract import TileSourceContract
from file_server import FileServer
from pixcell.data import shard_cache
from pixcell.data.datasets import FieldDataset
from pixcell.data.shard_cache import CacheConfig
from pixcell.data.shards import ShardSource
from pixcell.errors import CorruptShard, OutputError, StoreError
from pixcell.tasks.pack import pack_store
from stores import small_store

pytest.importorskip("aiohttp", reason="reading over HTTP needs pixcell[shards]")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Three shards; they are only read."""
    folder = tmp_path_factory.mktemp("remote")
    pack_store(small_store(folder / "store").path, folder / "packed", shard_size=30_000, workers=1)
    return folder / "packed"


@pytest.fixture
def server(packed, monkeypatch):
    monkeypatch.setattr(shard_cache, "_PAUSE_S", 0.01)
    with FileServer(packed) as server:
        yield server


@pytest.fixture
def config(tmp_path) -> CacheConfig:
    return CacheConfig(folder=tmp_path / "cache", attempts=3)


@pytest.fixture
def source(server, config) -> ShardSource:
    return ShardSource.open(server.url, config)


def read_all(source: ShardSource) -> list[torch.Tensor]:
    dataset = FieldDataset(source, size=64, latents="latents-tiny", embeddings="embeddings-tiny")
    return [dataset[index]["posterior_mean"] for index in range(len(dataset))]


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.tar"))


class TestRemoteShardSource(TileSourceContract):
    """A pack elsewhere does what every tile source must do."""


def test_it_gives_what_the_folder_gives_and_fetches_each_shard_once(source, server, packed):
    for one, other in zip(read_all(source), read_all(ShardSource.open(packed)), strict=True):
        assert torch.equal(one, other)
    assert sorted(server.fetched()) == [f"shards/{n:06d}.tar" for n in range(3)]
    assert server.fetched(".parquet") == ["index.parquet"]
    read_all(ShardSource.open(server.url, source._config))
    assert len(server.fetched()) == 3, "what is in the cache is not fetched again"


def test_only_the_shard_that_is_needed_is_fetched(source, server):
    dataset = FieldDataset(source, size=64, latents="latents-tiny")
    for index in range(3 * 4, 6 * 4):
        dataset[index]
    assert server.fetched() == ["shards/000001.tar"]


def test_large_shards_come_in_pieces(source, server, packed, monkeypatch):
    monkeypatch.setattr(shard_cache, "_PIECE", 10_000)
    read_all(source)
    sizes = [path.stat().st_size for path in (packed / "shards").glob("*.tar")]
    assert len(server.fetched()) == sum(-(-size // 10_000) for size in sizes)


def test_a_server_without_ranges_is_understood(packed, config, monkeypatch):
    monkeypatch.setattr(shard_cache, "_PIECE", 10_000)
    with FileServer(packed, ranges=False) as server:
        source = ShardSource.open(server.url, config)
        assert len(read_all(source)) == 32
        assert len(server.fetched()) == 3


@pytest.mark.parametrize("fault", ["500", "cut", "flip"])
def test_a_fault_that_passes_is_not_noticed(source, server, packed, fault):
    server.faults.extend([fault])
    for one, other in zip(read_all(source), read_all(ShardSource.open(packed)), strict=True):
        assert torch.equal(one, other)
    assert len(server.fetched()) == 4


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ("500", StoreError, r"shards/000000\.tar could not be fetched: 3 attempts failed, .*500"),
        ("cut", StoreError, r"3 attempts failed, .*Look at the connection"),
        ("403", StoreError, r"may not be read .*credentials"),
        ("flip", CorruptShard, r"checksum was wrong twice"),
    ],
)
def test_a_fault_that_stays_is_an_error_and_leaves_nothing_in_the_cache(source, server, fault, error, match):
    source.index()
    server.faults.extend([fault] * 10)
    with pytest.raises(error, match=match):
        read_all(source)
    assert shards_in(source._config.place) == []
    assert not list(source._config.place.rglob("*.part"))
    server.faults.clear()
    again = ShardSource.open(server.url, source._config)
    assert len(read_all(again)) == 32, "the next start goes on"


def test_a_damaged_shard_is_fetched_twice_and_not_for_each_of_its_tiles(source, server):
    source.index()
    server.faults.extend(["flip"] * 100)
    for _ in range(3):
        with pytest.raises(CorruptShard, match="checksum was wrong twice"):
            FieldDataset(source, size=128, latents="latents-tiny")[0]
    assert server.fetched() == ["shards/000000.tar"] * 2


def test_an_address_without_a_pack_says_so(server, config):
    with pytest.raises(StoreError, match=r"there is no .*/elsewhere/pack\.json"):
        ShardSource.open(f"{server.url}/elsewhere", config)
    with pytest.raises(StoreError, match="no address that fsspec can read"):
        ShardSource.open("gopher://host/pack", config)
    with pytest.raises(StoreError, match="3 attempts failed"):
        ShardSource.open("http://127.0.0.1:9/pack", config)


# ── a bounded cache that processes share ─────────────────────────────────────────────────────────


def test_the_cache_stays_below_its_size_and_what_was_removed_is_fetched_again(server, packed, tmp_path):
    sizes = [path.stat().st_size for path in (packed / "shards").glob("*.tar")]
    bound = max(sizes) + (packed / "index.parquet").stat().st_size + 5000
    config = CacheConfig(folder=tmp_path / "cache", size=bound)
    for _ in range(2):
        read_all(ShardSource.open(server.url, config))
        assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.*")) <= bound
        assert len(shards_in(tmp_path / "cache")) == 1
    assert len(server.fetched()) >= 5


def test_the_shard_that_was_needed_longest_ago_goes_first(server, packed, tmp_path):
    sizes = {n: (packed / f"shards/{n:06d}.tar").stat().st_size for n in range(3)}
    config = CacheConfig(folder=tmp_path / "cache", size=sizes[0] + sizes[1] + sizes[2] + 2000)
    source = ShardSource.open(server.url, config)
    assert source._cache
    paths = [source._cache.path_of(source.manifest.shards[n]) for n in (0, 1)]
    for path, age in zip(paths, (50, 100), strict=True):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    source._cache.path_of(source.manifest.index)  # does not fit beside all three
    source._cache.path_of(source.manifest.shards[2])
    assert shards_in(tmp_path / "cache") == ["000000.tar", "000002.tar"]


def test_a_cache_that_cannot_hold_a_shard_or_a_window_is_refused(server, packed, tmp_path):
    small = ShardSource.open(server.url, CacheConfig(folder=tmp_path / "cache", size=20_000))
    with pytest.raises(StoreError, match=r"cannot hold .*shards/000000\.tar.*data\.cache\.size"):
        read_all(small)
    source = ShardSource.open(server.url, CacheConfig(folder=tmp_path / "cache", size=60_000))
    source.prepare(1)
    with pytest.raises(StoreError, match="cannot hold 3 shards at once"):
        source.prepare(16)


def test_a_cache_that_cannot_be_written_is_an_error_with_the_way_out(server, tmp_path):
    (tmp_path / "file").write_text("")
    source = ShardSource.open(server.url, CacheConfig(folder=tmp_path / "file"))
    with pytest.raises(OutputError, match=r"a file stands where a folder is needed|not a folder"):
        source.index()


def test_loader_workers_fetch_each_shard_once(source, server):
    dataset = FieldDataset(source, size=64, latents="latents-tiny", embeddings="embeddings-tiny")
    assert len(list(DataLoader(dataset, batch_size=2, num_workers=2))) == 16
    assert sorted(server.fetched()) == [f"shards/{n:06d}.tar" for n in range(3)]


def test_many_threads_fetch_each_shard_once(source, server):
    sources = [pickle.loads(pickle.dumps(source)) for _ in range(3)]
    threads = [threading.Thread(target=read_all, args=(one,)) for one in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(server.fetched()) == [f"shards/{n:06d}.tar" for n in range(3)]


def test_a_lock_is_not_kept_by_a_process_that_was_forked_meanwhile(tmp_path):
    with shard_cache._locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            os.read(os.pipe()[0], 1)  # lives until it is killed, with all descriptors
    try:
        with shard_cache._locked(tmp_path / "lock", wait=False) as mine:
            assert mine
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_what_a_killed_process_left_half_fetched_is_removed_when_room_is_needed(source, server):
    assert source._cache
    source.index()
    part = source._cache.folder / "shards" / "000001.tar.part"
    part.parent.mkdir()
    code = (
        "import fcntl, os, signal, sys\n"
        "lock = os.open(sys.argv[1] + '.lock', os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "open(sys.argv[1] + '.part', 'wb').truncate(1000)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(part.with_suffix(""))], check=False)
    assert part.is_file()
    read_all(source)
    assert not list(source._config.place.rglob("*.part"))
