"""The nearest row is found whatever the number format of the decoder."""

import pytest
import torch

from pixcell.models.codebook import nearest_rows
from pixcell.models.codec import LatentCodec
from tiny_pathldm import tiny_first_stage


def test_rows_are_the_nearest_in_squared_distance():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(50, 3, generator=generator)
    latents = torch.randn(2, 3, 40, 30, generator=generator)  # more positions than one round takes
    rows, indices = nearest_rows(latents, codebook)
    distances = (latents.movedim(1, -1)[..., None, :] - codebook).square().sum(-1)
    assert torch.equal(indices, distances.argmin(-1))
    assert torch.equal(rows, codebook[indices].movedim(-1, 1))


def test_a_row_is_its_own_nearest():
    """Rows a millionth apart, where float32 distances through a product would all be alike."""
    codebook = 1 + torch.arange(200)[:, None] * 1e-6 + torch.zeros(200, 3)
    latents = codebook.T.reshape(1, 3, 10, 20)
    _, indices = nearest_rows(latents, codebook)
    assert torch.equal(codebook[indices.flatten()], codebook)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_looks_up_the_same_rows(dtype):
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    for codec in (LatentCodec(tiny_first_stage(), "vq"), LatentCodec(tiny_first_stage(), "vq", dtype=dtype)):
        codec.vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        codec.decode(latents)
    assert seen[1].dtype == dtype
    assert torch.equal(seen[1], seen[0].to(dtype))
