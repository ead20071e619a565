"""What a recipe may say about the loop."""

import pytest

from pixcell.config import parse_recipe
from pixcell.errors import RecipeError
from pixcell.training.trainer_config import TrainerConfig

SMALL = {"steps": 10, "batch_size": 2}


def test_one_decay_may_be_given_in_short():
    short = parse_recipe(TrainerConfig, {**SMALL, "ema_decay": 0.99})
    assert short.ema_decays == (0.99,)
    assert parse_recipe(TrainerConfig, short.model_dump(mode="json")) == short


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema_decay=0.9", "ema_decays=[0.9]"], "two ways of saying one thing"),
        (["ema_decays=[0.9, 0.99, 0.9]"], "names one decay twice"),
        (["ema_decays=[]"], "at least 1 item"),
        (["ema_decays=[1.0]"], "less than 1"),
        (["ema_decay=1.5"], "less than 1"),
        (["keep_every=3", "checkpoint_every=2"], "keep_every 3 is no multiple of checkpoint_every 2"),
        (["keep_every=0"], "greater than 0"),
        (["ema_decais=[0.9]"], "Did you mean 'ema_decays'"),
    ],
)
def test_what_cannot_be_meant_is_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(TrainerConfig, SMALL, overrides)
