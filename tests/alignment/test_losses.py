"""The two modules: eq. 7 against a slow reference, weights, components, unequal channels, refusals."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reseg_loss import CrossAlignmentLoss, Features, ReconLoss, ReSegError
from reseg_loss import functional as RF
from reseg_loss.alignment.losses import term_names


def features(seed: int, dims: int = 2, channels: tuple[int, ...] = (2, 3, 4, 5), levels: int = 3) -> Features:
    g = torch.Generator().manual_seed(seed)
    sizes = [8 >> level for level in range(levels)]

    def side() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(2, c, *[n] * dims, generator=g, dtype=torch.float64) for c, n in zip(channels, sizes))

    bottleneck = torch.randn(2, channels[-1], *[max(8 >> levels, 1)] * dims, generator=g, dtype=torch.float64)
    return Features(side(), side(), bottleneck)


def as_numpy(f: Features):
    return [x.numpy() for x in f.encoder], [x.numpy() for x in f.decoder], f.bottleneck.numpy()


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 99), st.sampled_from([2, 3]), st.booleans(), st.booleans())
def test_cross_alignment_agrees_with_the_reference(seed, dims, masked, normalize):
    student, teacher = features(seed, dims), features(seed + 1000, dims)
    valid = (torch.rand(2, 1, *[16] * dims) > 0.3).double() if masked else None
    expected = reference.alignment(
        as_numpy(student), as_numpy(teacher), None if valid is None else valid.numpy(), normalize
    )
    loss = CrossAlignmentLoss(normalize="batch" if normalize else None)
    assert float(loss(student, teacher, valid)) == pytest.approx(expected, rel=1e-10)


def test_recon_loss_module_is_the_function():
    x, y = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.equal(ReconLoss()(x, y), RF.recon_loss(x, y))
    assert torch.equal(ReconLoss(0.1, 0.9)(x, y), RF.recon_loss(x, y, alpha=0.1, beta=0.9))


def test_components_are_unweighted_and_combine_to_the_loss():
    student, teacher = features(0), features(1)
    loss = CrossAlignmentLoss(2.0, 3.0, 0.5)
    terms = loss.terms(student, teacher)
    assert list(terms) == term_names(3)
    assert torch.equal(terms["encoder_to_decoder_2"], RF.alignment_term(student.decoder[1], teacher.encoder[1]))
    assert torch.equal(terms["decoder_to_encoder_3"], RF.alignment_term(student.encoder[2], teacher.decoder[2]))
    expected = (
        2 * sum(terms[f"encoder_to_decoder_{i}"] for i in (1, 2, 3))
        + 3 * sum(terms[f"decoder_to_encoder_{i}"] for i in (1, 2, 3))
        + 0.5 * terms["bottleneck"]
    ) / 3
    assert torch.allclose(loss(student, teacher), expected)
    assert torch.equal(loss(student, teacher), loss.combine(terms))


@pytest.mark.parametrize("off", ["encoder_to_decoder", "decoder_to_encoder", "bottleneck"])
def test_the_divisor_stays_when_a_term_is_off(off):
    student, teacher = features(0), features(1)
    terms = CrossAlignmentLoss().terms(student, teacher)
    left = {name: term for name, term in terms.items() if not name.startswith(off)}
    loss = CrossAlignmentLoss(**{off: 0.0})
    assert torch.allclose(loss(student, teacher), sum(left.values()) / 3)
    assert loss.terms(student, teacher) == left


def test_no_gradient_reaches_the_teacher_through_a_detached_feature_and_all_reaches_the_student():
    student, teacher = features(0), features(1)
    leaves = [x.requires_grad_() for x in (*student.encoder, *student.decoder, student.bottleneck)]
    CrossAlignmentLoss(normalize="batch")(student, teacher).backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in leaves)


def test_unequal_channels_go_through_the_fixed_map_and_equal_ones_do_not():
    student, teacher = features(0), features(1, channels=(2, 6, 3, 5))
    loss = CrossAlignmentLoss(seed=3)
    terms = loss.terms(student, teacher)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert torch.equal(terms["encoder_to_decoder_1"], RF.alignment_term(student.decoder[0], teacher.encoder[0]))
    mapped = torch.einsum("dc,bchw->bdhw", RF.semi_orthogonal(6, 3, 3), student.decoder[1])
    assert torch.allclose(terms["encoder_to_decoder_2"], RF.alignment_term(mapped, teacher.encoder[1]))
    assert torch.equal(loss(student, teacher), CrossAlignmentLoss(seed=3)(student, teacher))
    assert not torch.equal(loss(student, teacher), CrossAlignmentLoss(seed=4)(student, teacher))


def test_a_fixed_map_that_was_made_in_inference_mode_serves_in_training():
    loss, (x, t) = CrossAlignmentLoss(), (torch.randn(2, c, 4, 4) for c in (3, 5))
    pair = Features((x,), (x,), x), Features((t,), (t,), t)
    with torch.inference_mode():
        value = loss(*pair)
    x.requires_grad_()
    again = loss(*pair)
    again.backward()
    assert torch.equal(value, again)
    assert x.grad is not None


@pytest.mark.parametrize("mean", [0.0, 50.0])
@pytest.mark.parametrize("normalize", [None, "batch"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(4, 8, 13, 10), (4, 24, 13, 10), (4, 8, 4, 5, 6), (4, 24, 4, 5, 6)])
def test_maps_of_bf16_features_are_within_twice_the_naive_error(shape, last, normalize, mean):
    """Naive is a convolution under autocast and the plain formula in fp32 after it; exact is fp64 on the bf16 features.

    Of the value, and of the gradient to the feature.
    """
    into, out, axes = shape[1], 12, (0, *range(2, len(shape)))
    conv = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv3d
    results: dict[str, list[list[torch.Tensor]]] = {"exact": [], "naive": [], "ours": []}

    def plain(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if normalize:
            s, t = ((x - x.mean(axes, True)) / (x.var(axes, False, True) + 1e-5).sqrt() for x in (s, t))
        return (s - t).square().mean()

    for seed in range(4):
        loss = CrossAlignmentLoss(1.0, 0.0, 0.0, divisor=1.0, normalize=normalize, seed=seed)
        matrix = RF.semi_orthogonal(out, into, seed).float()
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=g, dtype=torch.float64) + mean
        view = (*matrix.shape, *[1] * (len(shape) - 2))
        t = conv(x, matrix.double().view(view)) / 2
        t = t + torch.randn(t.shape, generator=g, dtype=torch.float64)
        x, t = (v.bfloat16() for v in (x, t))
        if last:
            x, t = (v.movedim(1, -1).contiguous().movedim(-1, 1) for v in (x, t))

        for name, found in results.items():
            leaf = (x.double() if name == "exact" else x.clone()).requires_grad_()
            if name == "exact":
                value = plain(conv(leaf, matrix.double().view(view)), t.double())
            elif name == "naive":
                with torch.autocast("cpu", torch.bfloat16):
                    mapped = conv(leaf, matrix.view(view))
                value = plain(mapped.float(), t.float())
            else:
                value = loss(Features((leaf,), (leaf,), leaf), Features((t,), (t,), t))
            found.append([v.detach().double() for v in (value, *torch.autograd.grad(value, leaf))])
    for exact, naive, ours in zip(*(map(torch.stack, zip(*found)) for found in results.values())):
        assert (ours - exact).norm() <= 2 * (naive - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder_to_decoder": -1.0}, "encoder_to_decoder=-1.0"),
        ({"decoder_to_encoder": [1.0, 0.5]}, r"decoder_to_encoder=\[1.0, 0.5\]"),
        ({"bottleneck": float("nan")}, "bottleneck=nan"),
        ({"encoder_to_decoder": 0, "decoder_to_encoder": 0, "bottleneck": 0}, "weight=0"),
        ({"bottleneck": [1.0]}, r"bottleneck=\[1.0\]"),
        *(({"divisor": bad}, "divisor=") for bad in (0.0, None, "3", [3], 1j, float("nan"), float("inf"))),
        *(({"seed": bad}, "seed=") for bad in ("0", None, 1.5, [0], True, -(2**70))),
        ({"normalize": "layer"}, "None or 'batch'"),
    ],
)
def test_bad_choices_are_refused(kwargs, message):
    with pytest.raises(ReSegError, match=message):
        CrossAlignmentLoss(**kwargs)


def test_features_that_do_not_fit_are_refused():
    student, teacher = features(0), features(1)
    with pytest.raises(ReSegError, match="every level needs all four"):
        CrossAlignmentLoss()(student, teacher._replace(encoder=teacher.encoder[:2]))
    smaller = teacher._replace(bottleneck=teacher.bottleneck[:1])
    with pytest.raises(ReSegError, match="bottleneck: the student's feature has shape"):
        CrossAlignmentLoss()(student, smaller)
    with pytest.raises(ReSegError, match="alpha=-1"):
        ReconLoss(alpha=-1)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "bad", [None, torch.ones(2, 3, 4, 4), {"encoder": []}, features(0)._replace(encoder=torch.ones(3))]
)
def test_sides_that_are_no_features_are_refused(side, bad):
    with pytest.raises(ReSegError, match=rf"^{side} is .* must be Features\("):
        CrossAlignmentLoss()(**{"student": features(0), "teacher": features(1), side: bad})


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x.long(), lambda x: x.to(torch.complex64), lambda x: x.to("meta"), lambda x: x.numpy(), lambda _: None],
)
def test_a_feature_of_another_kind_is_refused_by_the_name_of_its_term(side, change):
    sides = {"student": features(0), "teacher": features(1)}
    sides[side] = sides[side]._replace(bottleneck=change(sides[side].bottleneck))
    with pytest.raises(ReSegError, match=r"^bottleneck: the (student|teacher)'s feature is "):
        CrossAlignmentLoss()(**sides)


@pytest.mark.parametrize(
    "name",
    ["", "encoder", "encoder_to_decoder", "encoder_to_decoder_0", "encoder_to_decoder_01", "decoder_to_encoder_x",
     "bottleneck_1", "divisor", "seed_1", None, 3],
)  # fmt: skip
def test_names_that_no_term_has_are_refused(name):
    with pytest.raises(ReSegError, match="there is no term"):
        CrossAlignmentLoss().term_weight(name)


@pytest.mark.parametrize(
    "terms",
    [None, [1.0], "bottleneck", torch.ones(()), {"nothing": torch.ones(())}, {"bottleneck": 1.0}, {"bottleneck": None},
     {"bottleneck": torch.ones(2)}],
)  # fmt: skip
def test_what_is_no_mapping_of_scalar_terms_is_not_combined(terms):
    with pytest.raises(ReSegError, match="term"):
        CrossAlignmentLoss().combine(terms)
