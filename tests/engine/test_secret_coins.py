"""The coins of dropout, random views and noise on inputs are fresh and unknown, whatever the script has seeded."""

# ruff: noqa: NPY002 - the generators of a script

import os
import random

import numpy as np
import pytest
import torch
from kit import private
from torch.utils.data import Dataset

from lipdp.batches.coins import coins
from lipdp.errors import EngineError
from lipdp.noise.ratchet import Ratchet

pytestmark = pytest.mark.usefixtures("one_thread", "unjudged")


def thrown():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]


def known():
    """All generators, as scripts seed them."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)


def thrown_in_a_loop(seed):
    known()
    found = []
    for _ in private(seed=seed, steps=3)[3]:
        found += thrown()
    return found


@pytest.mark.filterwarnings("ignore:.*has none left")
def test_a_seed_of_the_script_decides_no_coin_of_a_private_run():
    one, other = thrown_in_a_loop(None), thrown_in_a_loop(None)
    known()
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert not any(seen in one for seen in thrown())


def test_the_coins_of_a_seeded_run_are_the_script_s_own():
    assert thrown_in_a_loop(1) == thrown_in_a_loop(1)


def test_a_state_brings_its_coins():
    loader = private(seed=None, steps=4)[3]
    next(iter(loader))
    state = loader.state_dict()
    found = [thrown() for _ in loader]
    loader.load_state_dict(state)
    assert [thrown() for _ in loader] == found
    assert len({str(each) for each in found}) == 3


class Views(Dataset):
    """Every record with coins of all three kinds."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.tensor([torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64), index % 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_s_coins_are_fresh_in_every_batch_and_run(workers):
    """torch seeds the numpy of a worker by a generator, which was the same in every process and every pass."""
    seen = []
    for _ in range(2):
        known()
        options = {"dataset": Views(), "expected_batch_size": 64, "steps": 2, "seed": None, "num_workers": workers}
        loader = private(model=torch.nn.Sequential(*linear()), **options)[3]
        seen += [column for x, _ in loader for column in torch.as_tensor(x).T.tolist()]
    assert len({tuple(column) for column in seen}) == len(seen) == 12
    known()
    assert not {tuple(column) for column in seen} & {tuple(each) for each in thrown()}


def linear():
    from lipdp import nn

    return nn.InputBound(1.0), nn.SpectralLinear(3, 5, dtype=torch.float64)


def test_a_block_leaves_the_generators_where_they_were():
    known()
    before = thrown()
    known()
    with coins(1 << 255):
        inside = thrown()
    assert thrown() == before
    assert before != inside
    with coins(1 << 255):
        assert thrown() == inside


@pytest.mark.statistical
def test_torch_goes_on_from_the_words_of_the_secret():
    """The state that is written is torch's: uniform and normal numbers, and no two secrets alike."""
    with coins(7):
        uniform, normal = torch.rand(100_000), torch.randn(100_000)
    assert abs(float(uniform.mean()) - 0.5) < 5 * 0.2887 / 316
    assert abs(float(normal.std()) - 1) < 5 * 0.7071 / 316
    with coins(7 + (1 << 128)):  # of which torch.manual_seed would see nothing
        assert (torch.rand(100_000) != uniform).float().mean() > 0.999


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_no_key_is_used_on_both_sides_of_a_fork(monkeypatch):
    """Two forked runs drew the same noise, and their difference had none."""
    secret, seeded = Ratchet("noise"), Ratchet("noise", seed=0)
    before = secret.advance(), seeded.advance()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(EngineError, match="before this process was forked"):
        secret.advance()
    assert seeded.advance() not in before
    assert Ratchet("noise").advance() not in before


def test_a_run_of_lipdp_s_own_loop_leaves_the_script_s_generators():
    from lipdp.training import Trainer, configure

    trainer = Trainer(configure(dataset="digits", model="linear", noise_multiplier=2.0, accountant="rdp", steps=2))
    known()
    before = thrown()
    known()
    trainer.run()
    assert thrown() == before
