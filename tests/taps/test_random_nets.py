"""Taps of random nets against how the nets were built; `random_nets.build` knows nothing of how taps are found."""

from __future__ import annotations

import pytest
import torch
from random_nets import Case, build, to_map
from test_find_taps import hooked
from torch import Tensor

from reseg_loss import TapError
from reseg_loss.taps import Tap, TapPlan, find_taps
from reseg_loss.taps.layouts import to_channels_first

SEEDS = 2000


def features(case: Case, taps: list[Tap]) -> dict[str, Tensor]:
    """What each tap sees in one forward."""
    with torch.no_grad(), hooked(case.model, taps) as caught:
        case.model(case.image)
    return {name: copy for name, (_, copy) in caught.items()}


def check(case: Case, plan: TapPlan) -> None:
    """Each found tap holds the values of the tap that the building tells, brought to channels first by other code."""
    found = [*[level.encoder for level in plan.levels], *[level.decoder for level in plan.levels], plan.bottleneck]
    wanted = [*case.encoder, *case.decoder, case.bottleneck]
    assert [level.spatial for level in plan.levels] == [case.sizes[name] for name in case.encoder], plan.draw()
    seen, truth = features(case, found), features(case, [Tap.parse(name) for name in wanted])
    for tap, name in zip(found, wanted):
        got = to_channels_first(seen[str(tap)], tap.layout, case.image.shape[2:], tap.stride)
        expected = to_map(truth[name], case.layouts[name], case.sizes[name])
        assert torch.equal(got, expected), f"{tap} ({tap.layout}) is not {name}\n{plan.draw()}"


def check_seed(seed: int) -> None:
    case = build(seed)
    if case.refused:
        with pytest.raises(TapError, match="Name the taps by hand"):
            find_taps(case.model, case.image)
    else:
        check(case, find_taps(case.model, case.image))


@pytest.mark.parametrize("seed", range(60))
def test_a_random_net(seed: int) -> None:
    check_seed(seed)


@pytest.mark.slow
def test_random_nets() -> None:
    failures = {}
    for seed in range(SEEDS):
        try:
            check_seed(seed)
        except (AssertionError, TapError, pytest.fail.Exception) as error:
            failures[seed] = str(error)
    assert not failures


def test_a_quarter_of_the_nets_collide_few_are_refused_and_none_is_large() -> None:
    cases = [build(seed) for seed in range(0, SEEDS, 20)]
    assert sum(case.collides for case in cases) >= len(cases) // 4
    assert 0 < sum(case.refused for case in cases) < len(cases) // 4
    sizes: list[int] = []
    for case in cases:
        for module in case.model.modules():
            module.register_forward_hook(lambda module, args, output: sizes.append(getattr(output, "nbytes", 0)))
        with torch.no_grad():
            case.model(case.image)
    assert max(sizes) <= 64 * 2**20


@pytest.mark.slow
def test_at_least_500_nets_collide() -> None:
    assert sum(build(seed).collides for seed in range(SEEDS)) >= 500
