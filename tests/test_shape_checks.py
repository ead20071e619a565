"""Shapes and types in signatures are checked while the tests run."""

import pytest
import torch
from jaxtyping import TypeCheckError

from pixcell.diffusion.guidance import guide
from pixcell.models.codec import to_uint8


def test_shapes_that_contradict_each_other_are_refused():
    with pytest.raises(TypeCheckError, match="unconditional"):
        guide(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 9), 2.0)


def test_a_tensor_of_another_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="images"):
        to_uint8(torch.zeros(3, 8, 8, dtype=torch.int64))


def test_an_int_passes_for_a_float():
    assert guide(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 2).max() == 2
