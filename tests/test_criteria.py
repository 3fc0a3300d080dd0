"""One battery for every importance criterion."""

from __future__ import annotations

import pytest
import torch

from edgeprune.core.errors import DataError, UnknownMember, UsageError
from edgeprune.core.family import configure, list_members, load_member
from edgeprune.criteria import GroupView

torch.set_num_threads(1)
MEMBERS = list_members("criteria")


def views(units: int = 6, seed: int = 0, scale: torch.Tensor | None = None, gradient: bool = True) -> list[GroupView]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(units, 1) if scale is None else scale.reshape(-1, 1)
    made = []
    for name, role, size in (("a.weight", "out", 12), ("bn.weight", "out", 1), ("b.weight", "in", 20)):
        weight = scale * torch.randn(units, size, generator=generator)
        grad = torch.randn(units, size, generator=generator) if gradient else None
        made.append(GroupView(parameter=name, axis=0, role=role, extents=(), weight=weight, gradient=grad))
    return made


@pytest.mark.parametrize("name", MEMBERS)
class TestEveryCriterion:
    def test_gives_one_finite_score_per_unit_and_changes_nothing(self, name: str) -> None:
        given = views()
        before = [(view.weight.clone(), view.grad.clone()) for view in given]
        scores = load_member("criteria", name).score(given)
        assert scores.shape == (6,) and bool(torch.isfinite(scores).all()) and bool((scores >= 0).all())
        for view, (weight, grad) in zip(given, before, strict=True):
            assert torch.equal(view.weight, weight) and torch.equal(view.grad, grad)

    def test_says_what_it_needs(self, name: str) -> None:
        member = load_member("criteria", name)
        assert member.NEEDS.issubset({"grad"})
        if "grad" in member.NEEDS:
            with pytest.raises(DataError, match="labels"):
                member.score(views(gradient=False))
        else:
            member.score(views(gradient=False))

    def test_a_unit_of_zeros_matters_least(self, name: str) -> None:
        scale = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
        assert int(load_member("criteria", name).score(views(scale=scale)).argmin()) == 2

    def test_follows_the_order_of_the_units(self, name: str) -> None:
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        score = load_member("criteria", name).score
        shuffled = [
            GroupView(parameter=v.parameter, axis=v.axis, role=v.role, extents=v.extents,
                      weight=v.weight[order], gradient=v.grad[order])
            for v in views()
        ]  # fmt: skip
        assert torch.allclose(score(shuffled), score(views())[order])

    def test_rejects_options_it_does_not_have(self, name: str) -> None:
        with pytest.raises(UsageError, match="not an option"):
            configure(load_member("criteria", name).score, "no_such_option=1")


def test_an_unknown_criterion_lists_the_known() -> None:
    with pytest.raises(UnknownMember, match="magnitude, taylor"):
        load_member("criteria", "nonsense")


def test_magnitude_is_the_norm() -> None:
    view = GroupView(parameter="w", axis=0, role="out", extents=(), weight=torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    score = load_member("criteria", "magnitude").score
    assert score([view], p=1.0, normalise=False).tolist() == [7.0, 1.0]
    assert score([view], p=2.0, normalise=False).tolist() == [5.0, 1.0]
    assert torch.allclose(score([view], p=2.0), torch.tensor([5 / 3, 1 / 3]))
    assert configure(score, "p=1,normalise=false")([view]).tolist() == [7.0, 1.0]
    with pytest.raises(UsageError, match="not a norm"):
        score([view], p=0.0)


def test_taylor_is_exact_where_the_loss_is_linear() -> None:
    weight = torch.randn(4, 3, requires_grad=True)
    factor = torch.randn(4, 3)
    (weight * factor).sum().backward()
    view = GroupView(parameter="w", axis=0, role="out", extents=(), weight=weight.detach(), gradient=weight.grad)
    change = (weight.detach() * factor).sum(dim=1)
    score = load_member("criteria", "taylor").score
    assert torch.allclose(score([view]), change.square())
    assert torch.allclose(score([view], absolute=True), change.abs())
