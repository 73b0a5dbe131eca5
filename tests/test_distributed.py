"""Several processes, one account: the same batch, the same sum, one noise, whatever the number of processes."""

import math
import re
from functools import cache

import pytest
import torch
from scipy import stats
from worlds import scenarios
from worlds.cluster import cluster

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def groups(forks, tmp_path_factory):
    """Two processes, and four."""
    two, four = (cluster(forks, size, tmp_path_factory.mktemp(str(size))) for size in (2, 4))
    with two as two, four as four:
        yield {2: two, 4: four}


@cache
def alone(**options):
    """What one process finds."""
    return scenarios.train(**options)


def assert_close(weights, others, tolerance):
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "dtype", "sigma", "tolerance"),
    [(2, torch.float64, 1e-12, 1e-9), (4, torch.float64, 1.0, 1e-9), (2, torch.float32, 1e-9, 2e-4)],
)
def test_ten_steps_give_the_weights_and_the_epsilon_of_one_process(groups, size, dtype, sigma, tolerance):
    # at a gate of 0.8 a record meets a kink of GroupSort2, whose two sides have other gradients
    options = {"dtype": dtype, "noise_multiplier": sigma, "gate": 0.7, "steps": 10}
    weights, seen, epsilon, _ = alone(**options)
    answers = groups[size].run(scenarios.train, **options)
    for other, _, spent, _ in answers:
        assert_close(weights, other, tolerance)
        assert spent == epsilon
    assert all(torch.equal(answers[0][0][name], other[name]) for other, *_ in answers for name in other)
    assert [sum(parts) for parts in zip(*(part for _, part, *_ in answers), strict=True)] == seen  # every record once
    assert max(max(parts) - min(parts) for parts in zip(*(part for _, part, *_ in answers), strict=True)) <= 1


@pytest.mark.parametrize(
    "options", [{"ddp": True}, {"sampling": "fixed_size"}, {"secure": True}, {"mapped": True}, {"bands": 3}]
)
def test_however_it_is_fed_and_wrapped(groups, options):
    fed = {k: v for k, v in options.items() if k != "ddp"}
    weights, _, epsilon, _ = alone(steps=6, **fed)
    for other, _, spent, _ in groups[2].run(scenarios.train, steps=6, **options):
        assert_close(weights, other, 1e-9)
        assert spent == epsilon


@pytest.mark.parametrize(
    ("parts", "mapped", "skip_empty"), [([100, 30, 170, 0], False, True), ([1, 0, 0, 299], True, False)]
)
def test_unequal_parts(groups, parts, mapped, skip_empty):
    weights, seen, epsilon, _ = alone(steps=6)
    answers = groups[4].run(scenarios.train, steps=6, parts=parts, mapped=mapped, skip_empty=skip_empty)
    for other, _, spent, _ in answers:
        assert_close(weights, other, 1e-9)
        assert spent == epsilon
    assert [sum(parts) for parts in zip(*(part for _, part, *_ in answers), strict=True)] == seen


@pytest.mark.parametrize(("ddp", "skip_empty"), [(True, True), (False, False)])
def test_empty_batches_on_some_and_on_all(groups, ddp, skip_empty):
    options = {"expected_batch_size": 1, "steps": 12}
    weights, seen, _, _ = alone(**options)
    assert {0, 1} < set(seen)  # steps in which all of four processes have none, and steps in which three have none
    for other, *_ in groups[4].run(scenarios.train, ddp=ddp, skip_empty=skip_empty, **options):
        assert_close(weights, other, 1e-9)


def test_the_quantile_gate_counts_all_processes(groups):
    weights, _, epsilon, bound = scenarios.train_with_quantile()
    for other, _, spent, theirs in groups[4].run(scenarios.train_with_quantile):
        assert_close(weights, other, 1e-9)
        assert spent == epsilon
        assert theirs == pytest.approx(bound, rel=1e-12)


def test_models_that_start_differently_start_alike(groups):
    answers = groups[2].run(scenarios.train, differ=True, steps=3)
    assert all(torch.equal(answers[0][0][name], answers[1][0][name]) for name in answers[0][0])


@pytest.mark.statistical
@pytest.mark.parametrize("size", [2, 4])
def test_the_noise_is_added_once(groups, size):
    """300,000 draws: the variance ratio is within ± 1.3 % but with probability 1e-6, so ± 5 % of the std is refused."""
    answers = groups[size].run(scenarios.released_noise, sigma=1.7)
    noises = [noise for noise, _, _ in answers]
    assert all(torch.equal(noises[0], noise) for noise in noises)
    count = noises[0].numel()
    low, high = (stats.chi2.ppf(p, count) / count for p in (5e-7, 1 - 5e-7))

    def accepted(noise, std):
        return low < float((noise / std).square().mean()) < high

    std = answers[0][1]
    assert accepted(noises[0], std)
    assert not any(accepted(noises[0], std * factor) for factor in (0.95, 1.05, math.sqrt(size), 1 / math.sqrt(size)))
    assert abs(float(noises[0].mean())) < 5 * std / math.sqrt(count)


@pytest.mark.parametrize("size", [2, 4])
def test_one_record_moves_the_sum_by_delta_and_no_more(groups, size):
    for move, delta in groups[size].run(scenarios.worst_move):
        assert 0.95 * delta < move <= delta * (1 + 1e-6)


@pytest.mark.parametrize(("first", "second", "bands"), [(4, 2, 1), (1, 4, 1), (2, 4, 3)])
def test_a_resume_with_another_number_of_processes(groups, first, second, bands):
    options = {"steps": 7, "bands": bands}
    weights, _, epsilon, _ = alone(**options)

    def run(size, *arguments, **options):
        return (
            [scenarios.half(*arguments, **options)]
            if size == 1
            else groups[size].run(scenarios.half, *arguments, **options)
        )

    saved = run(first, 4, **options)
    state = saved[0]
    assert all(other["engine"] == state["engine"] for other in saved)
    for ended in run(second, 3, state, **options):
        assert_close(weights, ended["model"], 1e-9)
        assert ended["epsilon"] == epsilon


REFUSALS = [
    (scenarios.refused_by_one, (1,), 1, "mat1 and mat2|shape|size"),
    (scenarios.criterion_forgotten_by, (1,), 1, "no gradient went through the criterion"),
    (scenarios.not_a_number_in, (0,), None, "NaN or infinity"),
    (scenarios.records_in_another_order, (), None, "hold different records at the same places"),
    (scenarios.restored_by, (1,), None, "not at the same point of the same run"),
    (scenarios.owners_differ, (), None, "number the owners differently"),
    (scenarios.whole_as_own, (), None, "hold the same records"),
    (scenarios.padded_parts, (), None, "1 records of process 1 are records of a process before it"),
    (scenarios.tensor_parallel, (), None, "sharded by something else than fully_shard"),
    (scenarios.spread_over_two_meshes, (), None, "over different meshes"),
    (scenarios.made_before_the_group, (), None, "Call make_private after init_process_group"),
    (scenarios.facts_differ, (), None, "noise_multiplier is"),
    (scenarios.lengths_differ, (), None, "300, 299 records"),
]


@pytest.mark.parametrize(("scenario", "arguments", "rank", "message"), REFUSALS)
def test_what_one_process_refuses_all_refuse(groups, scenario, arguments, rank, message):
    outcomes = groups[2].outcomes(scenario, *arguments)
    assert [state for state, _ in outcomes] == ["failed", "failed"]
    errors = [(name, text) for _, (name, text, _) in outcomes]
    if rank is not None:
        assert errors[1 - rank][0] == "PeerError"
        assert errors[1 - rank][1].startswith(f"process {rank} of 2 refused: ")
    assert all(re.search(message, text) for _, text in errors), errors
    if rank is not None:
        assert groups[2].run(scenarios.train, steps=2)  # and they can go on


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_parameters_give_the_weights_and_the_epsilon_of_one_process(groups, size):
    """Of four processes one holds none of the last layer's three rows."""
    weights, _, epsilon, _ = alone(noise_multiplier=1e-12, gate=0.8, steps=6)
    for other, spent, deltas in groups[size].run(scenarios.spread, noise_multiplier=1e-12, steps=6):
        assert_close(weights, other, 1e-9)
        assert spent == epsilon
        assert set(deltas) == set(weights)


@pytest.mark.statistical
@pytest.mark.parametrize("size", [2, 4])
def test_noise_on_shards_is_one_draw_of_the_joint_std(groups, size):
    """200,000 draws on five rows over the processes: the std as planned, and no two shards alike."""
    answers = groups[size].run(scenarios.spread_noise, sigma=1.7)
    noise, std = answers[0]
    assert all(torch.equal(noise, other) for other, _ in answers)
    count = noise.numel()
    low, high = (stats.chi2.ppf(p, count) / count for p in (5e-7, 1 - 5e-7))
    for factor, right in ((1.0, True), (0.95, False), (1.05, False), (math.sqrt(size), False)):
        assert (low < float((noise / (std * factor)).square().mean()) < high) == right
    correlations = torch.corrcoef(noise).fill_diagonal_(0.0).abs().max()
    assert float(correlations) < 6 / math.sqrt(noise.shape[1])


def test_shards_summed_in_half_precision_are_refused(groups):
    for state, (name, text, _) in groups[2].outcomes(scenarios.sum_in_half_precision):
        assert (state, name) == ("failed", "EngineError")
        assert "fully_shard sums gradients in torch.bfloat16" in text
