"""The method of stage 1 against plain references: masks, token order, decoder roles, loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretraining.data import Case
from pretraining.fratmae import (
    CrossAttention,
    DecoderBlock,
    FratMAE,
    FratMAEMethod,
    partner,
    patchify,
    random_masking,
    reconstruction_loss,
    token_indices,
    unpatchify,
)
from pretraining.method import masked_errors, voxel_mask
from pretraining.recipe import hold_out, learning_rate, parameter_groups

PATCH, TOKEN = (8, 24, 32), (4, 8, 8)  # a grid of 2 x 3 x 4 tokens
ENCODER = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"dim": 18, "depth": 2, "num_heads": 3, "block": "cross_self"}


def model() -> FratMAE:
    torch.manual_seed(0)
    return FratMAE(PATCH, TOKEN, ENCODER, DECODER).eval()


def method(block: str = "cross_self") -> FratMAEMethod:
    torch.manual_seed(0)
    net = FratMAE(PATCH, TOKEN, ENCODER, {**DECODER, "block": block})
    return FratMAEMethod(net, 0.5, is_cross_modal=block != "self")


def tokens(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the 24 tokens of each sample to keep, half to mask."""
    return token_indices(random_masking(batch, 24, 0.5, torch.Generator().manual_seed(seed)), 12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(2, 60), st.floats(0.1, 0.9), st.integers(0, 2**31))
def test_masking_is_exact_and_complete(batch, tokens, ratio, seed):
    mask = random_masking(batch, tokens, ratio, torch.Generator().manual_seed(seed))
    assert mask.shape == (batch, tokens) and mask.sum(1).tolist() == [round(ratio * tokens)] * batch
    keep, masked = token_indices(mask, round(ratio * tokens))
    assert torch.equal(torch.zeros_like(mask).scatter(1, masked, True), mask)
    assert all(row.tolist() == sorted(row.tolist()) for row in (*keep, *masked))
    for row in torch.cat([keep, masked], dim=1):
        assert sorted(row.tolist()) == list(range(tokens))


def test_masks_differ_between_samples_and_are_uniform():
    mask = random_masking(4000, 10, 0.5, torch.Generator().manual_seed(1))
    np.testing.assert_allclose(mask.float().mean(0), 0.5, atol=0.04)


def test_patchify_matches_a_reference_loop():
    volume = torch.arange(2 * 8 * 24 * 32).reshape(2, 1, 8, 24, 32).float()
    tokens = patchify(volume, TOKEN)
    n = 0
    for h in range(2):
        for w in range(3):
            for d in range(4):
                block = volume[:, 0, 4 * h : 4 * h + 4, 8 * w : 8 * w + 8, 8 * d : 8 * d + 8]
                torch.testing.assert_close(tokens[:, n], block.reshape(2, -1))
                n += 1
    torch.testing.assert_close(unpatchify(tokens, (2, 3, 4), TOKEN), volume)


def test_loss_is_on_exactly_the_masked_voxels():
    torch.manual_seed(0)
    volume, prediction = torch.randn(2, 1, *PATCH), torch.randn(2, 24, 4 * 8 * 8)
    _, masked = tokens(2, 3)
    picture = unpatchify(prediction, (2, 3, 4), TOKEN)
    total, count = 0.0, 0
    for b in range(2):
        for n in masked[b].tolist():
            h, w, d = n // 12, n // 4 % 3, n % 4
            block = (b, 0, slice(4 * h, 4 * h + 4), slice(8 * w, 8 * w + 8), slice(8 * d, 8 * d + 8))
            total += float((picture[block] - volume[block]).square().sum())
            count += 256
    loss = reconstruction_loss(prediction, volume, masked, TOKEN)
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("modality", ["CT", "PET"])
def test_hidden_voxels_do_not_leak_but_the_partner_is_seen_whole(modality):
    """The prediction of S ignores the voxels of S that are masked, and looks at every voxel of the other modality."""
    net, image = model(), torch.randn(1, 2, *PATCH)
    channel = {"CT": 0, "PET": 1}[modality]
    keep, masked = tokens(1, 5)
    reference = net(image, {modality: keep})[0][modality]
    hidden = patchify(image[:, channel : channel + 1], TOKEN).clone()
    hidden[0, masked[0]] += 10
    changed = image.clone()
    changed[:, channel : channel + 1] = unpatchify(hidden, (2, 3, 4), TOKEN)
    torch.testing.assert_close(net(changed, {modality: keep})[0][modality], reference)
    for token in range(24):  # each token of the partner matters
        seen = patchify(image[:, 1 - channel : 2 - channel], TOKEN).clone()
        seen[0, token] += 10
        changed = image.clone()
        changed[:, 1 - channel : 2 - channel] = unpatchify(seen, (2, 3, 4), TOKEN)
        assert (net(changed, {modality: keep})[0][modality] - reference).abs().max() > 1e-5


@pytest.mark.parametrize("modality", ["CT", "PET"])
def test_gradients_reach_both_encoders_and_the_decoder_of_the_masked_modality_only(modality):
    net = model().train()
    keep, masked = tokens(2, 5)
    image = torch.randn(2, 2, *PATCH)
    reconstruction_loss(net(image, {modality: keep})[0][modality], image[:, :1], masked, TOKEN).backward()
    idle = {name.split(".")[0] + "." + name.split(".")[1] for name, p in net.named_parameters() if p.grad is None}
    assert idle == {f"decoders.{partner(modality)}"}


def test_cross_attention_matches_a_reference():
    torch.manual_seed(0)
    attention = CrossAttention(12, 3)
    query, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    q, kv = attention.to_query(query), attention.to_key_value(context)
    out = torch.zeros(2, 5, 12)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        k, v = kv[..., part], kv[..., 12:][..., part]
        weights = torch.softmax(q[..., part] @ k.transpose(1, 2) / 4**0.5, dim=-1)
        out[..., part] = weights @ v
    torch.testing.assert_close(attention(query, context), attention.project(out))


@pytest.mark.parametrize("kind", ["cross_self", "cross", "self"])
def test_decoder_block_asks_with_the_masked_modality_and_looks_at_its_partner(kind):
    """Against a plain reference; as many tokens of each as in training, so that only the values tell the roles."""
    torch.manual_seed(0)
    block = DecoderBlock(12, 3, kind)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    expected = x
    if kind != "cross":
        expected = expected + block.self_attention(block.self_norm(expected))
    if kind != "self":
        cross = block.cross_attention
        q, (k, v) = cross.to_query(block.query_norm(expected)), cross.to_key_value(context).split(12, dim=-1)
        q, k, v = (part.unflatten(2, (3, 4)) for part in (q, k, v))
        weights = torch.einsum("bnhc,bmhc->bhnm", q, k).div(2).softmax(-1)
        expected = expected + cross.project(torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2))
    expected = expected + block.mlp(block.mlp_norm(expected))
    torch.testing.assert_close(block(x, context), expected)


def test_visible_tokens_keep_their_place_in_the_decoder():
    """Without blocks, each kept token comes out at its own index, and the gaps hold the mask token."""
    decoder = model().decoders["PET"]
    decoder.blocks, decoder.norm, decoder.to_voxels = torch.nn.ModuleList(), torch.nn.Identity(), torch.nn.Identity()
    visible, keep = torch.randn(1, 4, 24), torch.tensor([[2, 7, 20]])
    out = decoder(visible, keep, torch.randn(1, 25, 24)) - decoder.positions[1:]
    expected = decoder.mask_token.expand(1, 24, -1).clone()
    expected[0, keep[0]] = decoder.embed_visible(visible)[0, 1:]
    torch.testing.assert_close(out, expected)


def test_both_modalities_are_drawn_and_a_key_repeats():
    ours = method()
    draws = [ours.draw(2, (0, 0, step)) for step in range(60)]
    hidden = torch.stack([draw.flatten(2).sum(2) for draw in draws])  # (steps, B, modality)
    assert draws[0].shape == (2, 2, 2, 3, 4) and torch.equal(hidden[:, 0], hidden[:, 1])
    assert set(map(tuple, hidden[:, 0].tolist())) == {(12, 0), (0, 12)} and 15 < (hidden[:, 0, 1] > 0).sum() < 45
    assert torch.equal(ours.draw(2, (0, 0, 7)), draws[7]) and not torch.equal(draws[7][0], draws[7][1])


def test_mae_masks_both_modalities_and_neither_sees_the_other():
    mae = method("self").eval()
    mask = mae.draw(1, (0,))
    assert mask.flatten(2).sum(2).tolist() == [[12, 12]] and not torch.equal(mask[:, 0], mask[:, 1])
    image = torch.randn(1, 2, *PATCH)
    reference = mae.predict(image, mask)
    other = image.clone()
    other[:, 1] += 10
    changed = mae.predict(other, mask)
    torch.testing.assert_close(changed[:, 0], reference[:, 0])
    assert (changed[:, 1] - reference[:, 1]).abs().max() > 1e-3
    assert not any("cross" in name or "partner" in name for name, _ in mae.named_parameters())


def test_what_is_predicted_of_the_masked_voxels_is_what_is_lost():
    """The loss of tokens is the error of volumes, which all methods are judged by."""
    ours, image = method().eval(), torch.randn(3, 2, *PATCH)
    for modality, mask in ours.fixed_masks(3).items():
        number = {"CT": 0, "PET": 1}[modality]
        assert mask[:, number].flatten(1).sum(1).tolist() == [12] * 3 and not mask[:, 1 - number].any()
        _, parts = ours(image, mask, [None] * 3)
        volumes, voxels = ours.predict(image, mask), voxel_mask(mask, TOKEN)
        assert voxels.shape == image.shape and torch.equal(volumes[:, 1 - number], image[:, 1 - number])
        errors = masked_errors(volumes[:, number], image[:, number], voxels[:, number])
        assert errors.mean().item() == pytest.approx(parts[modality].item(), rel=1e-5)
    assert all(torch.equal(ours.fixed_masks(3)[m], mask) for m, mask in method().fixed_masks(3).items())


@pytest.mark.parametrize("block, is_cross", [("cross_self", True), ("cross", True), ("self", False)])
def test_no_parameter_is_without_gradient_over_two_steps(block, is_cross):
    ours = method(block)
    image = torch.randn(2, 2, *PATCH)
    for mask in ours.fixed_masks(2).values() if is_cross else [ours.draw(2, (0,))]:
        loss, parts = ours(image, mask, [None] * 2)
        assert len(parts) == (1 if is_cross else 2)
        assert loss.item() == pytest.approx(sum(v.item() for v in parts.values()) / len(parts))
        loss.backward()
    assert not [name for name, p in ours.named_parameters() if p.grad is None]


def test_attention_weights_are_those_of_the_attention():
    torch.manual_seed(0)
    attention = CrossAttention(12, 3)
    query, context = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    weights = attention.weights(query, context)
    v = attention.to_key_value(context)[..., 12:].unflatten(2, (3, 4)).transpose(1, 2)
    torch.testing.assert_close(attention.project((weights @ v).transpose(1, 2).flatten(2)), attention(query, context))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[99] < 0.01
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_norms_biases_and_tokens_have_no_weight_decay():
    decayed, free = parameter_groups(model(), 0.05)
    assert all(p.ndim >= 2 for p in decayed["params"]) and free["weight_decay"] == 0
    tokens = {id(p) for name, p in model().named_parameters() if name.endswith("_token")}
    assert tokens.isdisjoint(id(p) for p in decayed["params"])


def test_held_out_cases_are_disjoint_and_stable():
    cases = [Case(Path(), f"D/{i}", (0, 1)) for i in range(20)]
    train, held_out = hold_out(cases, 0.1, seed=0)
    assert len(held_out) == 2 and sorted(c.name for c in train + held_out) == sorted(c.name for c in cases)
    assert hold_out(cases, 0.1, seed=0) == (train, held_out)
    assert hold_out(cases, 0.0, seed=0) == (cases, [])
    assert len(hold_out(cases[:2], 0.1, seed=0)[1]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_trained_on_and_held_out(seed):
    cases = [Case(Path(), f"D/{i}", (0, 1), patient=f"D/{i // 4}") for i in range(20)]
    train, held_out = hold_out(cases, 0.4, seed)
    assert len(held_out) == 8 and {c.patient for c in train}.isdisjoint(c.patient for c in held_out)
