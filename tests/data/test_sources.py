"""A recipe names a place; what kind of source it is follows from what is there."""

import pytest

from pixcell.data.published_tiles import PublishedSource
from pixcell.data.shards import ShardSource
from pixcell.data.sources import open_source
from pixcell.data.store import TileStore
from pixcell.errors import StoreError
from pixcell.tasks.pack import pack_store
from published import write_published
from stores import small_store


def test_each_kind_is_recognised_by_what_is_in_it(tmp_path):
    small_store(tmp_path / "store")
    pack_store(tmp_path / "store", tmp_path / "packed", workers=1)
    write_published(tmp_path / "published")
    assert isinstance(open_source(tmp_path / "store"), TileStore)
    assert isinstance(open_source(str(tmp_path / "packed")), ShardSource)
    assert isinstance(open_source(f"file://{tmp_path / 'packed'}"), ShardSource)
    assert isinstance(open_source(tmp_path / "published"), PublishedSource)


def test_anything_else_is_an_error_that_says_what_was_found(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere does not exist. Give a tile store"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is an empty folder"):
        open_source(tmp_path)
    (tmp_path / "chapter.txt").write_text("words")
    with pytest.raises(StoreError, match=r"holds no tiles \(there: chapter.txt\)"):
        open_source(tmp_path)
    with pytest.raises(StoreError, match="is a file, and holds no tiles"):
        open_source(tmp_path / "chapter.txt")
    write_published(tmp_path / "published")
    with pytest.raises(StoreError, match=r"give the folder above it, .*published\. "):
        open_source(tmp_path / "published" / "patches")
    (tmp_path / "half" / "packing").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"a pack that is not complete\. Run the same"):
        open_source(tmp_path / "half")
