"""A condition is carried unopened, and a missing one is the model's own."""

import pytest
import torch

from pixcell.diffusion.conditioning import Conditioning
from pixcell.errors import ModelError
from pixcell.geometry import Box

NULL = torch.arange(8.0).reshape(4, 2) - 100


def grid(batch_size=3, rows=2, columns=2, dim=2):
    return torch.arange(float(batch_size * rows * columns * dim)).reshape(batch_size, rows, columns, dim)


def test_tokens_are_the_grid_row_by_row():
    tokens = Conditioning(grid()).tokens(NULL, 3)
    assert torch.equal(tokens[1, 1], grid()[1, 0, 1])
    assert torch.equal(tokens[1, 2], grid()[1, 1, 0])


def test_tokens_and_grids_are_the_same_thing():
    tokens = Conditioning(grid()).tokens(NULL, 3)
    assert torch.equal(Conditioning.from_tokens(tokens).embedding_grid, grid())
    with pytest.raises(ModelError, match="3 embeddings per sample do not make a square"):
        Conditioning.from_tokens(torch.zeros(1, 3, 2))


def test_without_a_grid_all_rows_are_unconditional():
    assert torch.equal(Conditioning().tokens(NULL, 5), NULL.expand(5, 4, 2))


def test_dropped_rows_are_unconditional_and_others_untouched():
    conditioning = Conditioning(grid()).drop(torch.tensor([False, True, False]))
    tokens = conditioning.tokens(NULL, 3)
    assert torch.equal(tokens[1], NULL)
    assert torch.equal(tokens[::2], grid().flatten(1, 2)[::2])


def test_drops_add_up():
    conditioning = Conditioning(grid()).drop(torch.tensor([True, False, False]))
    conditioning = conditioning.drop(torch.tensor([False, False, True]))
    assert conditioning.dropped.tolist() == [True, False, True]
    assert Conditioning(grid()).dropped_everywhere().dropped.all()
    assert Conditioning().drop(torch.tensor([True])).embedding_grid is None


def test_gradients_reach_a_learned_null_embedding_only_through_dropped_rows():
    null = NULL.clone().requires_grad_()
    tokens = Conditioning(grid()).drop(torch.tensor([False, True, False])).tokens(null, 3)
    tokens.sum().backward()
    assert torch.equal(null.grad, torch.ones_like(NULL))


def test_a_window_gets_the_embeddings_under_it():
    conditioning = Conditioning(grid(1, 3, 4)).drop(torch.tensor([True]))
    window = conditioning.window(Box(x=32, y=64, width=64, height=32))
    assert torch.equal(window.embedding_grid, grid(1, 3, 4)[:, 2:3, 1:3])
    assert window.dropped.tolist() == [True]
    assert Conditioning().window(Box(5, 5, 5, 5)).embedding_grid is None


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(16, 0, 32, 32), "does not fall on the embedding grid"),
        (Box(96, 0, 64, 32), "outside a grid of 3 x 4"),
    ],
)
def test_a_window_between_embeddings_is_refused(box, message):
    with pytest.raises(ValueError, match=message):
        Conditioning(grid(1, 3, 4)).window(box)


def test_selecting_and_joining_are_inverse():
    whole = Conditioning(grid()).drop(torch.tensor([False, True, False]))
    again = Conditioning.cat([whole.select([0]), whole.select(slice(1, 3))])
    assert torch.equal(again.embedding_grid, whole.embedding_grid)
    assert torch.equal(again.dropped, whole.dropped)
    mixed = Conditioning.cat([Conditioning(grid(1)), whole])
    assert mixed.dropped.tolist() == [False, False, True, False]
    assert Conditioning.cat([Conditioning(), Conditioning()]).embedding_grid is None
    with pytest.raises(ValueError, match="use drop"):
        Conditioning.cat([Conditioning(), whole])


def test_repeated_samples_stand_side_by_side():
    repeated = Conditioning(grid(2)).drop(torch.tensor([False, True])).repeat(2)
    assert torch.equal(repeated.embedding_grid[1], grid(2)[0])
    assert repeated.dropped.tolist() == [False, False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_refused_by_sample(bad):
    embeddings = grid()
    Conditioning(embeddings).check_finite()
    embeddings[1, 0, 0, 0] = bad
    with pytest.raises(ModelError, match=r"sample\(s\) 1 hold NaN or infinity"):
        Conditioning(embeddings).check_finite()


def test_a_grid_that_is_not_the_models_is_refused():
    with pytest.raises(ModelError, match=r"1 x 1 grid of embeddings 2 wide was given; the model takes 4"):
        Conditioning(grid(3, 1, 1)).tokens(NULL, 3)
    with pytest.raises(ModelError, match="5 wide"):
        Conditioning(grid(3, dim=5)).tokens(NULL, 3)
    with pytest.raises(ModelError, match="2 samples were given with 3 conditions"):
        Conditioning(grid()).tokens(NULL, 2)


def test_shapes_that_are_no_grid_are_a_programming_error():
    with pytest.raises((ValueError, TypeError), match=r"batch,? rows,? columns,? dim"):
        Conditioning(torch.zeros(2, 4, 12))
    with pytest.raises((ValueError, TypeError), match=r"one boolean each|dropped"):
        Conditioning(grid(), torch.zeros(2, dtype=torch.bool))
