"""Owners and views: what one owner, with all records, or one record, with all views, can move."""

from functools import partial
from itertools import pairwise

import kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

import lipdp
from lipdp import losses
from lipdp import nn as lnn
from lipdp.accounting.events import Ledger
from lipdp.batches.owners import EveryNth, Owners, OwnUnits, bounded_contributions
from lipdp.errors import EngineError, ParameterError, ResumeError
from lipdp.privacy.gate import QuantileGate

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


def network(*, gate=None):
    """Label 1 on e₀ has the longest cotangent there is, √2, and Δ is reached."""
    inner = [lnn.GradientGate(gate)] if gate else []
    model = torch.nn.Sequential(
        lnn.InputBound(1.0), lnn.SpectralLinear(4, 2, bias=False), *inner, lnn.SpectralLinear(2, 2, bias=False)
    ).double()
    with torch.no_grad():
        model[1].weight.zero_()[1, 0] = -1.0
        model[-1].weight.copy_(torch.eye(2))
    return model


class Louder(losses.TauCrossEntropy):
    """Has `scale` times the constant that it states."""

    def __init__(self, scale):
        super().__init__(50.0)
        self.scale = scale

    def forward(self, logits, target):
        return self.scale * super().forward(logits, target)


def released(x, y, *, size, sigma=1e-9, gate=None, engine_gate=None, scale=1.0, microbatch=3, **options):
    """The sum that one step with q = 1 releases, and Δ, by name."""
    engine, model, optimizer, loader, criterion = private(
        network(gate=gate), TensorDataset(x, y), lr=1e-30, seed=1, expected_batch_size=size, dataset_size=size, steps=1,
        noise_multiplier=sigma, gate=engine_gate, criterion=Louder(scale), **options,
    )  # fmt: skip
    deltas = dict(engine.sensitivity())
    for xb, yb, *weight in loader:
        optimizer.zero_grad()
        for xs, ys, *ws in engine.microbatches(xb, yb, microbatch, *weight):
            criterion(model(xs), ys, *ws).backward()
        optimizer.step()
    return {name: p.grad * size for name, p in model.named_parameters()}, deltas


def longest(count):
    x = torch.zeros(count, 4, dtype=torch.float64)
    x[:, 0] = 1.0
    return x, torch.ones(count, dtype=torch.int64)


private = partial(
    kit.private, net=network, data=lambda: TensorDataset(*longest(20)), criterion=losses.TauCrossEntropy(50.0), lr=0.1,
    seed=None, expected_batch_size=4, steps=3,
)  # fmt: skip


def moved(first, second):
    return {name: float(torch.linalg.vector_norm(first[name] - second[name])) for name in first}


@pytest.mark.parametrize("records", [1, 50, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("gate", [None, 0.1])
def test_an_owner_moves_the_sum_by_delta_however_many_records(records, scale, gate):
    """`scale`: whatever multiplies the loss; `gate`: one inside the model, that lets every row have its bound."""
    x, y = longest(3 + records)
    owners = torch.tensor([0, 1, 1] + [2] * records)
    with_owner, deltas = released(x, y, size=3, group=owners, gate=gate, scale=scale)
    without, _ = released(x[:3], y[:3], size=3, group=owners[:3], gate=gate, scale=scale)
    for name, move in moved(with_owner, without).items():
        assert move <= deltas[name] * (1 + 1e-6), name
        assert gate or move > 0.95 * deltas[name], name


def test_without_dropping_the_inner_gates_from_the_bound_it_would_break():
    """The owner of the last test under a gate of 0.1: the bound with the gate is broken, so the attack can fail."""
    x, y = longest(53)
    owners = torch.tensor([0, 1, 1] + [2] * 50)
    with_owner, _ = released(x, y, size=3, group=owners, gate=0.1)
    without, _ = released(x[:3], y[:3], size=3, group=owners[:3], gate=0.1)
    gated = lipdp.sensitivity(network(gate=0.1), losses.TauCrossEntropy(50.0), input_shape=(4,))
    assert moved(with_owner, without)["1.weight"] > 5 * gated["1.weight"]


@pytest.mark.parametrize("gate", [0.3, QuantileGate(0.3, count_std=1.0)])
def test_a_gate_at_the_logits_holds_for_owners(gate):
    x, y = longest(23)
    owners = torch.tensor([0, 1, 1] + [2] * 20)
    with_owner, deltas = released(x, y, size=3, group=owners, engine_gate=gate, scale=30.0)
    without, _ = released(x[:3], y[:3], size=3, group=owners[:3], engine_gate=gate, scale=30.0)
    for name, move in moved(with_owner, without).items():
        assert 0.95 * deltas[name] < move <= deltas[name] * (1 + 1e-6)
        assert deltas[name] == pytest.approx(0.3, rel=1e-3)


def test_an_owner_contributes_the_mean_of_its_records_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64) / 4
    y = torch.randint(2, (9,), generator=generator)
    owners = torch.tensor([5, 3, 5, 5, 3, 8, 8, 8, 8])
    total, _ = released(x, y, size=3, group=owners)
    for name, expected in total.items():
        by_hand = 0.0
        for owner in (3, 5, 8):
            model = network()
            (losses.TauCrossEntropy(50.0)(model(x[owners == owner]), y[owners == owner]).mean()).backward()
            by_hand = by_hand + dict(model.named_parameters())[name].grad
        torch.testing.assert_close(expected, by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("views", [pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("gate", [None, 0.1])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_a_record_with_views_moves_the_sum_by_delta(views, gate, scale):
    x, y = longest(3)
    x = x[:, None].repeat(1, views, 1)
    with_record, deltas = released(x, y, size=3, views=views, gate=gate, scale=scale)
    without, _ = released(x[:2], y[:2], size=3, views=views, gate=gate, scale=scale)
    for name, move in moved(with_record, without).items():
        assert 0.95 * deltas[name] < move <= deltas[name] * (1 + 1e-6), name


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("owners", [None, [0, 1, 1, 2, 2, 2]])
def test_the_quantile_gate_counts_a_unit_once(views, owners):
    """Its count of b − 1/2 must move by 1/2 when a unit joins, however many views or records that has."""
    bounds = []
    for count in (1, views):
        x, y = longest(6)
        x = x if count == 1 else x[:, None].repeat(1, count, 1)
        units = 6 if owners is None else 3
        engine, model, optimizer, loader, criterion = private(
            dataset=TensorDataset(x, y),
            expected_batch_size=units,
            noise_multiplier=1e-6,
            gate=QuantileGate(0.3, count_std=1e-4),
            group=owners,
            views=count,
        )
        x, y, *weight = next(iter(loader))
        criterion(model(x), y, *weight).backward()
        optimizer.step()
        bounds.append(float(engine.state_dict()["gate"]["bound"]))
    assert bounds[0] == pytest.approx(0.3 * np.exp(0.2 * 0.5), rel=1e-3)  # none passes: the share is 0, its target 1/2
    assert bounds[1] == pytest.approx(bounds[0], rel=1e-3)


def test_views_are_averaged():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64) / 4
    y = torch.tensor([0, 1, 1, 0])
    total, _ = released(x, y, size=4, views=3)
    model = network()
    (losses.TauCrossEntropy(50.0)(model(x.flatten(0, 1)), y.repeat_interleave(3)).sum() / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(total[name], parameter.grad, rtol=1e-6, atol=1e-6)


def test_owners_with_views_move_the_sum_by_delta():
    x, y = longest(13)
    x = x[:, None].repeat(1, 3, 1)
    owners = torch.tensor([0, 1, 1] + [2] * 10)
    with_owner, deltas = released(x, y, size=3, group=owners, views=3, scale=20.0)
    without, _ = released(x[:3], y[:3], size=3, group=owners[:3], views=3, scale=20.0)
    for name, move in moved(with_owner, without).items():
        assert 0.95 * deltas[name] < move <= deltas[name] * (1 + 1e-6)


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(-5, 5), min_size=1, max_size=60))
def test_weights_of_an_owner_add_up_to_one_and_never_beyond(ids):
    owners = Owners(ids)
    everyone = np.arange(len(owners))
    indices, weights = owners.records(everyone)
    assert sorted(indices.tolist()) == list(range(len(ids)))
    for owner in everyone:
        of_one, shares = owners.records(np.array([owner]))
        assert len({ids[i] for i in of_one}) == 1
        assert 1 - 1e-6 < float(shares.astype(np.float64).sum()) <= 1.0
    assert len(weights) == len(ids)


@settings(max_examples=60, deadline=None)
@given(
    owned=st.lists(st.lists(st.integers(0, 8), max_size=4), max_size=40),
    most=st.integers(1, 4),
    names=st.permutations(range(9)),
)
def test_nobody_contributes_more_than_the_bound_and_nobody_is_left_out_without_need(owned, most, names):
    joined = bounded_contributions(owned, contributions=most)
    used = np.zeros(9, dtype=int)
    for record in joined:
        for owner in set(owned[record]):
            used[owner] += 1
    assert used.max() <= most
    assert sorted(set(joined.tolist())) == joined.tolist()
    for record in set(range(len(owned))) - set(joined.tolist()):
        assert any(used[owner] == most for owner in owned[record])
    renamed = [[f"owner {names[owner]}" for owner in each] for each in owned]
    assert bounded_contributions(renamed, contributions=most).tolist() == joined.tolist()


def test_what_a_bound_on_contributions_does_not_promise():
    """Chains: without the first owner's links every second one of the others changes places."""
    chain = [[i, i + 1] for i in range(20)]
    whole = bounded_contributions(chain).tolist()
    without = (bounded_contributions(chain[1:]) + 1).tolist()
    assert set(whole) & set(without) == set()
    for bad in (0, 1.5, True):
        with pytest.raises(ParameterError, match="contributions="):
            bounded_contributions(chain, contributions=bad)
    with pytest.raises(ParameterError, match="a text where the owners"):
        bounded_contributions(["ann", "bob"])


@pytest.mark.parametrize(
    "owners",
    [torch.tensor([[1, 2], [2, 3]]), [[torch.tensor(1)], [torch.tensor(1)]], [[float("nan")], [float("nan")]], [b"a"]],
)
def test_owners_that_equal_no_other_are_refused(owners):
    """Each would be somebody else, so all records would join: 2 of one owner, where 1 was promised."""
    with pytest.raises(ParameterError, match="owners"):
        bounded_contributions(owners)


def test_owners_that_can_be_read_once_are_read_once():
    assert bounded_contributions(map(int, each.split()) for each in ("1 2", "2 3", "2 4 5")).tolist() == [0]


def test_an_owner_of_one_contribution_moves_the_sum_as_a_record_does():
    """20 records, each of two owners out of 8: with all that one owns left out of those that join, by Δ at most."""
    generator = np.random.default_rng(0)
    owned = [generator.choice(8, 2, replace=False).tolist() for _ in range(20)]
    joined = bounded_contributions(owned)
    (x, y), excess = longest(20), {}
    for used in (joined, np.arange(20)):
        with_owner, deltas = released(x[used], y[used], size=20)
        moves = []
        for owner in range(8):
            left = [i for i in used if owner not in owned[i]]
            moves.append(moved(with_owner, released(x[left], y[left], size=20)[0]))
        excess[len(used)] = max(move / deltas[name] for found in moves for name, move in found.items())
    assert 0.95 < excess[len(joined)] <= 1 + 1e-6
    assert excess[20] > 4


@settings(max_examples=25, deadline=None)
@given(
    drawn=st.sets(st.integers(0, 40), max_size=20),
    size=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 41), max_size=3),
)
def test_parts_are_a_partition(drawn, size, cuts):
    indices = np.array(sorted(drawn), dtype=np.int64)
    nth = [EveryNth(rank, size).take(indices) for rank in range(size)]
    assert sorted(np.concatenate(nth).tolist()) == indices.tolist()
    edges = [0, *sorted(cuts), 41]
    parts = [OwnUnits(a, b).take(indices) + a for a, b in pairwise(edges)]
    assert np.concatenate(parts).tolist() == indices.tolist()


def test_the_account_is_of_owners():
    """20 records of 5 owners: q = 4/5, N = 5."""
    engine, model, optimizer, loader, criterion = private(group=np.arange(20) // 4)
    assert (engine.plan.dataset_size, engine.plan.sampling_rate, engine.plan.unit) == (5, 0.8, "owner")
    sizes = set()
    for x, y, weight in loader:
        optimizer.zero_grad()
        criterion(model(x), y, weight).backward()
        optimizer.step()
        sizes.add(len(x))
        assert loader.drawn.rows == len(x) == 4 * loader.drawn.units
    expected = lipdp.epsilon(noise_multiplier=1.0, sampling_rate=0.8, steps=3, delta=1e-5, accountant="rdp")
    assert engine.get_epsilon(1e-5) == expected


OWNERS = {"records": None, "pairs": torch.arange(8) // 2, "alternating": torch.arange(8) % 4}


@pytest.mark.parametrize("first", OWNERS)
@pytest.mark.parametrize("second", OWNERS)
def test_one_account_is_of_one_unit(first, second):
    """Also of one grouping: what protects each pair protects none of the owners of every fourth record."""

    def start(engine, unit):
        data = TensorDataset(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
        given = {} if OWNERS[unit] is None else {"group": OWNERS[unit]}
        _, optimizer, loader, _ = engine.make_private(
            module=(module := torch.nn.Sequential(lnn.InputBound(1.0), lnn.SpectralLinear(4, 3))),
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1), criterion=losses.TauCrossEntropy(8.0), dataset=data,
            expected_batch_size=2, steps=1, noise_multiplier=1.0, **given,
        )  # fmt: skip
        for batch in loader:
            optimizer.zero_grad()
            engine.backward(*batch)
            optimizer.step()
        return engine.state_dict()

    engine = lipdp.PrivacyEngine(seed=0)
    saved = start(engine, first)
    engine.detach()
    resumed = lipdp.PrivacyEngine(seed=0)
    start(resumed, second)
    assert Ledger.from_state(saved["ledger"]).unit == engine.ledger.unit
    if first == second:
        start(engine, second)
        resumed.load_state_dict(saved)
        assert engine.steps_taken == 2
        return
    with pytest.raises(ParameterError, match="one ε needs one unit"):
        start(engine, second)
    assert not engine.attached
    with pytest.raises(ResumeError, match=r"group= must be as it was|plan"):
        resumed.load_state_dict(saved)


def test_weights_forgotten_or_invented():
    _, model, _, loader, criterion = private(group=np.arange(20) // 4)
    x, y, weight = next(b for b in loader if len(b[0]))
    with pytest.raises(EngineError, match="needs one weight a row, got none"):
        criterion(model(x), y)
    for others in (torch.ones(len(weight)), weight.flip(0), weight[torch.arange(len(weight))]):
        with pytest.raises(EngineError, match="not those that the loader yielded"):
            criterion(model(x), y, others)
    criterion(model(x[2:]), y[2:], weight[2:])
    expected = criterion(model(x), y, weight)
    assert criterion(model(x), y, weight * 10).equal(expected)  # the engine has its own
    with pytest.raises(EngineError, match="weights of shape"):
        criterion(model(x), y, weight[1:])
    _, model, _, loader, criterion = private(expected_batch_size=20)
    x, y = next(iter(loader))
    with pytest.raises(EngineError, match="leave the weight out"):
        criterion(model(x), y, torch.ones(len(x)))


class Views(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.zeros(2, 4, dtype=torch.float64), 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": [0, 1]}, "2 owners were given for 20 records"),
        ({"group": [0.5] * 20}, "whole number"),
        ({"group": np.arange(20), "own_records": True}, "records in two processes"),
        ({"group": np.zeros(20, dtype=int)}, "in 1 … N = 1 is needed"),
        ({"views": 0}, "1 or more"),
        ({"views": True}, "1 or more"),
        (
            {"views": 3, "dataset": Views(), "input_shape": (4,), "expected_batch_size": 20},
            r"records of shape \(3",
        ),
    ],
)
def test_groups_and_multiplicities_that_do_not_fit(options, message):
    with pytest.raises(ParameterError, match=message):
        next(iter(private(**options)[3]))


def test_views_of_a_map_style_dataset():
    _, model, _, loader, criterion = private(views=2, dataset=Views(), expected_batch_size=20)
    x, y = next(iter(loader))
    assert x.shape == (40, 4)
    assert y.shape == (40,)
    assert criterion(model(x), y).isfinite()
