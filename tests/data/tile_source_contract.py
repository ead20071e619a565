"""What every tile source must do, so that datasets can read from it.

A test module of a new storage subclasses :class:`TileSourceContract` and gives a fixture ``source``: two
slides or more, with ``images``, the latents column ``latents-tiny`` and the embeddings column
``embeddings-tiny``.
"""

import pickle

import numpy as np
import pytest
import torch

from pixcell.data.datasets import FieldDataset, TileColumn, TileImages, TileSource
from pixcell.errors import MissingColumn, PixCellError
from pixcell.geometry import Box

COLUMNS = ("latents-tiny", "embeddings-tiny")


class TileSourceContract:
    def test_it_is_a_tile_source(self, source):
        assert isinstance(source, TileSource)
        assert source.tile_size > 0
        assert source.mpp > 0

    def test_the_index_names_every_tile_once(self, source):
        rows = source.index().select(["slide_id", "tile", "x", "y"]).to_pylist()
        tiles = [(row["slide_id"], row["tile"]) for row in rows]
        assert len(set(tiles)) == len(tiles) > 0
        assert len({slide_id for slide_id, _ in tiles}) >= 2

    def test_columns_are_listed_and_others_refused(self, source):
        assert {"images", *COLUMNS} <= set(source.columns())
        with pytest.raises(MissingColumn):
            source.column("not-there")

    @pytest.mark.parametrize("name", COLUMNS)
    def test_fields_are_cuts_of_the_record_of_the_tile(self, source, name):
        column = source.column(name)
        assert isinstance(column, TileColumn)
        rows, columns, *inner = column.shape
        for row in source.index().to_pylist():
            whole = np.empty(column.shape, column.dtype)
            column.read_into(whole, row["slide_id"], row["tile"], Box(0, 0, columns, rows))
            field = np.empty((1, 1, *inner), column.dtype)
            column.read_into(field, row["slide_id"], row["tile"], Box(columns - 1, 0, 1, 1))
            np.testing.assert_array_equal(field[0, 0], whole[0, columns - 1])

    @pytest.mark.parametrize("name", COLUMNS)
    def test_every_tile_has_a_record_and_columns_say_what_made_them(self, source, name):
        column = source.column(name)
        rows = source.index()["slide_id"].to_pylist()
        assert {slide_id: rows.count(slide_id) for slide_id in set(rows)} == dict(column.num_tiles)
        assert column.made_by["kind"] == name.split("-")[0]

    def test_pixels_are_rgb_squares_of_the_tile_size(self, source):
        for row in source.index().to_pylist():
            images = source.images(row["slide_id"])
            assert isinstance(images, TileImages)
            image = images.image(row["tile"])
            assert image.shape == (source.tile_size, source.tile_size, 3)
            assert image.dtype == np.uint8

    def test_unknown_slides_are_errors_of_the_package(self, source):
        with pytest.raises(PixCellError):
            source.images("not there")

    def test_it_travels_to_workers(self, source):
        again = pickle.loads(pickle.dumps(source))
        assert again.index().to_pylist() == source.index().to_pylist()

    def test_a_dataset_reads_from_it(self, source):
        dataset = FieldDataset(
            source, size=source.tile_size // 2, latents=COLUMNS[0], embeddings=COLUMNS[1], images=True
        )
        assert len(dataset) == 4 * len(source.index())
        item = dataset[len(dataset) - 1]
        assert set(item) == {"posterior_mean", "posterior_std", "embedding_grid", "image", "key"}
        assert all(torch.isfinite(item[name]).all() for name in item if name != "key")
