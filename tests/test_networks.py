"""The networks: token order, position embedding, axes and units of the segmentation network, no idle parameter."""

import math
import pydoc

import numpy as np
import pytest
import torch

from nnunet_fratmae.base.command import UserError
from nnunet_fratmae.networks.strides import decoder_strides
from nnunet_fratmae.networks.unetr import FratMAEUNETR
from nnunet_fratmae.networks.vit import ViTEncoder, sincos_positions, token_grid

PATCH, TOKEN = (8, 24, 32), (4, 8, 8)  # a grid of 2 x 3 x 4 tokens
SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2}


def small_network(**kwargs) -> FratMAEUNETR:
    torch.manual_seed(0)
    return FratMAEUNETR(2, 2, PATCH, TOKEN, **SMALL, features=4, **kwargs).eval()


def test_tokens_are_in_row_major_hwd_order():
    """A bright voxel block at token (1, 2, 3) must change exactly the token number (1 * 3 + 2) * 4 + 3."""
    encoder = ViTEncoder(PATCH, TOKEN, **SMALL)
    empty = torch.zeros(1, 1, *PATCH)
    lit = empty.clone()
    lit[0, 0, 4:8, 16:24, 24:32] = 1
    changed = (encoder.embed(lit) - encoder.embed(empty)).abs().sum(-1)[0, 1:] > 0
    assert changed.nonzero().flatten().tolist() == [(1 * 3 + 2) * 4 + 3]


def test_positions_match_a_reference_loop():
    grid, dim = (2, 3, 4), 20  # 20 = 3 axes x (3 sines + 3 cosines) + 2 left over
    expected = np.zeros((24, dim))
    for h in range(2):
        for w in range(3):
            for d in range(4):
                for axis, position in enumerate((h, w, d)):
                    for i in range(3):
                        angle = position * 2 * math.pi / (2.5 * 20 ** (i / 3))
                        expected[(h * 3 + w) * 4 + d, axis * 6 + i] = np.sin(angle)
                        expected[(h * 3 + w) * 4 + d, axis * 6 + 3 + i] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(grid, dim).numpy(), expected, atol=1e-6)


def test_dropped_tokens_are_not_seen():
    encoder = ViTEncoder(PATCH, TOKEN, **SMALL).eval()
    keep = torch.tensor([[0, 5, 23]])
    volume = torch.randn(1, 1, *PATCH)
    other = volume.clone()
    other[:, :, 0:4, 0:8, 8:16] += 3  # token 1, which is dropped
    torch.testing.assert_close(encoder(volume, keep), encoder(other, keep))
    assert encoder(volume, keep).shape == (1, 1 + 3, 24)


def test_weights_load_into_another_grid():
    encoder = ViTEncoder(PATCH, TOKEN, **SMALL)
    ViTEncoder((16, 8, 40), TOKEN, **SMALL).load_state_dict(encoder.state_dict(), strict=True)


def test_patch_must_be_whole_tokens():
    with pytest.raises(ValueError, match="no multiple of the token patch"):
        token_grid((8, 24, 30), TOKEN)


@pytest.mark.parametrize("token_patch", [(8, 16, 16), (4, 8, 8), (2, 4, 16), (1, 1, 1), (16, 16, 16)])
def test_decoder_steps_multiply_to_the_token_patch(token_patch):
    steps = decoder_strides(token_patch)
    assert tuple(np.prod(steps, axis=0)) == token_patch
    assert len(steps) == 4


@pytest.mark.parametrize(
    "token_patch, spacing, expected",
    [
        ((8, 16, 16), (2, 2, 3), [(1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((16, 16, 4), (1, 1, 5), [(2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1)]),
        ((4, 8, 16), (4, 4, 1), [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 2)]),
        ((16, 16, 16), (1, 1, 9), [(2, 2, 2)] * 4),
        ((1, 2, 8), (1, 1, 1), [(1, 1, 1), (1, 1, 2), (1, 1, 2), (1, 2, 2)]),
    ],
)
def test_long_voxels_are_pooled_last(token_patch, spacing, expected):
    """As nnU-Net: no step next to the voxels along an axis whose voxels are twice as long as others, if it can wait."""
    assert decoder_strides(token_patch, spacing) == expected


def test_strides_of_the_plans_make_the_decoder():
    image, strides = torch.randn(1, 2, *PATCH), [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert small_network(strides=strides)(image).shape == small_network()(image).shape
    kernels = [up.kernel_size for up in small_network(strides=strides).decoder["seg_layers"].ups]
    assert kernels == [tuple(step) for step in strides]
    with pytest.raises(ValueError, match=r"not 4 steps that make up the token patch \[4, 8, 8\]"):
        small_network(strides=strides[1:])


def test_decoder_refuses_other_token_patches():
    with pytest.raises(ValueError, match="1, 2, 4, 8 or 16"):
        decoder_strides((8, 12, 16))


def test_every_parameter_of_the_segmentation_network_learns():
    """DDP without find_unused_parameters needs a gradient for each (MONAI's UNETR carries 28 M that have none)."""
    network = small_network().train()
    logits = network(torch.randn(2, 2, *PATCH))
    assert logits.shape == (2, 2, *PATCH)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_plans_axes_do_not_change_the_function(axes):
    """The same patient stored along other axes gives the same logits along those axes."""
    canonical, permuted = small_network(), small_network(axes=axes)
    image = torch.randn(1, 2, *PATCH)
    stored = image.permute(0, 1, *(axes.index(i) + 2 for i in range(3)))
    assert stored.shape != image.shape
    expected = canonical(image).permute(0, 1, *(axes.index(i) + 2 for i in range(3)))
    torch.testing.assert_close(permuted(stored), expected)


def test_plans_units_do_not_change_the_function():
    """HU and SUV normalised by other constants give the same logits when scale and shift undo it."""
    canonical, other = small_network(), small_network(scale=(2.0, 0.5), shift=(-1.0, 3.0))
    image = torch.randn(1, 2, *PATCH)
    stored = torch.stack([(image[:, 0] + 1.0) / 2.0, (image[:, 1] - 3.0) / 0.5], dim=1)
    torch.testing.assert_close(other(stored), canonical(image), atol=1e-4, rtol=1e-4)


def test_channels_may_be_the_other_way_round():
    canonical, swapped = small_network(), small_network(modalities=(1, 0))
    image = torch.randn(1, 2, *PATCH)
    torch.testing.assert_close(swapped(image.flip(1)), canonical(image))


def test_everything_that_is_not_pretrained_is_skipped_by_stock_pretrained_weights():
    network = small_network()
    others = [name for name in network.state_dict() if ".seg_layers." not in name]
    assert others and all(name.startswith(("encoders.CT.", "encoders.PET.")) for name in others)


def test_plans_can_name_the_network():
    assert pydoc.locate("nnunet_fratmae.networks.unetr.FratMAEUNETR") is FratMAEUNETR


@pytest.mark.parametrize(
    "inputs, modalities, given", [(2, (0, None), 1), (3, (0, 1), 2), (2, (0, 1), 3), (2, (0, 1), 1)]
)
def test_a_case_with_other_channels_than_in_training_is_refused(inputs, modalities, given):
    """One channel alone may be the other one: nnU-Net reads whatever files there are."""
    network = FratMAEUNETR(inputs, 2, PATCH, TOKEN, **SMALL, features=4, modalities=modalities)
    network(torch.zeros(1, inputs, *PATCH))
    with pytest.raises(UserError, match=f"images with {given} channels, the model was trained with {inputs}"):
        network(torch.zeros(1, given, *PATCH))
