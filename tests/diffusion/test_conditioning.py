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
    with pytest.raises((ValueError, TypeError), match=r"one value for each row|dropped"):
        Conditioning(grid(), torch.zeros(2, dtype=torch.bool))


def control(batch_size=3, height=4, width=6, channels=2):
    size = batch_size * channels * height * width
    return torch.arange(float(size)).reshape(batch_size, channels, height, width)


def text(batch_size=3, tokens=5, dim=7):
    return torch.arange(float(batch_size * tokens * dim)).reshape(batch_size, tokens, dim)


class TestTextAndControl:
    """They travel with the embeddings, row by row."""

    @pytest.fixture
    def whole(self):
        return Conditioning(
            grid(),
            torch.tensor([False, True, False]),
            text(),
            control(),
            torch.tensor([1.0, 1.0, 0.0]),
            encoder={"name": "small"},
        )

    def test_rows_are_selected_and_repeated_together(self, whole):
        last = whole.select([2, 1])
        assert torch.equal(last.text_states, text()[[2, 1]])
        assert torch.equal(last.control_latents, control()[[2, 1]])
        assert last.control_scale.tolist() == [0.0, 1.0]
        assert last.dropped.tolist() == [False, True]
        assert last.encoder == {"name": "small"}
        twice = whole.repeat(2)
        assert torch.equal(twice.control_latents[3], control()[1])
        assert torch.equal(twice.text_states[5], text()[2])
        assert twice.control_scale.tolist() == [1, 1, 1, 1, 0, 0]

    def test_joining_what_was_taken_apart_gives_the_whole(self, whole):
        again = Conditioning.cat([whole.select([0]), whole.select([1, 2])])
        for name in ("embedding_grid", "dropped", "text_states", "control_latents", "control_scale"):
            assert torch.equal(getattr(again, name), getattr(whole, name))
        assert again.encoder == {"name": "small"}

    def test_dropped_rows_get_the_text_that_stands_for_no_condition(self, whole):
        nothing = -torch.ones(5, 7)
        states = whole.text(nothing, 3)
        assert torch.equal(states[1], nothing)
        assert torch.equal(states[::2], text()[::2])
        assert torch.equal(Conditioning().text(nothing, 2), nothing.expand(2, -1, -1))

    def test_text_of_another_length_or_width_is_refused(self, whole):
        with pytest.raises(ModelError, match="5 text states 7 wide were given; those of no condition are 6"):
            whole.text(torch.zeros(6, 7), 3)
        with pytest.raises(ModelError, match="2 samples were given with 3 conditions"):
            whole.text(torch.zeros(5, 7), 2)

    def test_a_row_has_a_control_unless_it_is_dropped_or_scaled_to_nothing(self, whole):
        assert whole.controlled.tolist() == [True, False, False]
        assert Conditioning(grid()).controlled is None
        assert Conditioning(control_latents=control()).controlled.all()
        assert not whole.dropped_everywhere().controlled.any()

    def test_control_alone_can_be_dropped(self):
        conditioning = Conditioning(grid(), control_latents=control())
        without = conditioning.drop_control(torch.tensor([True, False, True]))
        assert without.controlled.tolist() == [False, True, False]
        assert without.dropped is None
        assert torch.equal(without.tokens(NULL, 3), grid().flatten(1, 2))
        assert Conditioning(grid()).drop_control(torch.ones(3, dtype=torch.bool)).control_latents is None

    def test_joined_to_controlled_rows_others_have_no_control(self):
        joined = Conditioning.cat([Conditioning(grid(1)), Conditioning(grid(3), control_latents=control())])
        assert joined.controlled.tolist() == [False, True, True, True]
        assert torch.equal(joined.control_latents[1:], control())

    def test_control_needs_no_embeddings(self):
        conditioning = Conditioning(control_latents=control())
        assert conditioning.batch_size == 3
        assert torch.equal(conditioning.tokens(NULL, 3), NULL.expand(3, -1, -1))
        assert conditioning.dropped_everywhere().dropped.all()

    def test_a_window_gets_the_control_under_it(self):
        conditioning = Conditioning(grid(1, 2, 3), control_latents=control(1, 64, 96))
        window = conditioning.window(Box(x=32, y=0, width=64, height=32))
        assert torch.equal(window.control_latents, control(1, 64, 96)[:, :, :32, 32:])
        assert torch.equal(window.embedding_grid, grid(1, 2, 3)[:, :1, 1:])
        anywhere = Conditioning(text_states=text(1), control_latents=control(1, 64, 96))
        assert anywhere.window(Box(x=5, y=7, width=2, height=3)).control_latents.shape == (1, 2, 3, 2)
        assert torch.equal(anywhere.window(Box(x=5, y=7, width=2, height=3)).text_states, text(1))
        with pytest.raises(ValueError, match="outside control latents of 64 x 96"):
            anywhere.window(Box(x=95, y=0, width=2, height=2))

    def test_a_dtype_is_for_conditions_and_not_for_scales(self, whole):
        half = whole.to(dtype=torch.bfloat16)
        assert {half.embedding_grid.dtype, half.text_states.dtype, half.control_latents.dtype} == {
            torch.bfloat16
        }
        assert half.control_scale.dtype == torch.float32
        assert half.dropped.dtype == torch.bool

    def test_conditions_of_different_numbers_do_not_belong_together(self):
        with pytest.raises(ModelError, match="3 embeddings, 2 text states"):
            Conditioning(grid(), text_states=text(2))

    def test_an_encoder_told_in_other_words_is_the_same(self):
        made_by = {"name": "uni2-h", "sha256": "0", "preprocessing": {"mean": (0.5, 0.5)}, "licence": "x"}
        from_file = {"name": "uni2-h", "sha256": "0", "preprocessing": {"mean": [0.5, 0.5]}, "dim": 3}
        joined = Conditioning.cat([Conditioning(grid(1), encoder=one) for one in (made_by, from_file)])
        assert joined.batch_size == 2

    def test_embeddings_of_two_encoders_do_not_belong_together(self):
        parts = [Conditioning(grid(1), encoder={"name": name}) for name in ("uni2-h", "phikon")]
        with pytest.raises(ModelError, match="different encoders"):
            Conditioning.cat(parts)
        known_once = Conditioning.cat([parts[0], Conditioning(grid(1))])
        assert known_once.encoder == {"name": "uni2-h"}

    def test_numbers_that_are_none_are_refused_wherever_they_are(self, whole):
        bad = text()
        bad[2, 0, 0] = float("nan")
        with pytest.raises(ModelError, match=r"text states of sample\(s\) 2"):
            Conditioning(text_states=bad).check_finite()
        bad = control()
        bad[0, 0, 0, 0] = float("inf")
        with pytest.raises(ModelError, match=r"control latents of sample\(s\) 0"):
            Conditioning(grid(), control_latents=bad).check_finite()
        whole.check_finite()

    def test_scales_without_control_are_a_programming_error(self):
        with pytest.raises((ValueError, TypeError), match="there are none"):
            Conditioning(grid(), control_scale=torch.ones(3))
