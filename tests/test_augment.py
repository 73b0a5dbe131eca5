"""Augmented views: no longer than their image, of no other record, and at no price."""

from __future__ import annotations

import multiprocessing
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import FALSE_ALARM, Raises
from npy_folders import SHORT, equal, images, weights
from scipy import stats
from torch.utils.data import TensorDataset

from lipdp import data
from lipdp.batches.loader import BatchLoader
from lipdp.batches.samplers import PoissonSampler
from lipdp.data.augment import AUGMENTS, Augmented, Crop, Flip, augment
from lipdp.errors import ParameterError, UnknownNameError
from lipdp.training import Interrupted, Trainer, configure, train

pytestmark = pytest.mark.usefixtures("no_environment")


@pytest.mark.parametrize("name", sorted(AUGMENTS))
@given(seed=st.integers(0, 10**6), height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_views_are_never_longer_and_hold_no_other_record(name, seed, height, width):
    """The norm bound, entry by entry: a view holds pixels of its own image, each as often as there, and zeros."""
    x = torch.randn(4, 2, height, width, generator=torch.Generator().manual_seed(seed)).double()
    x += torch.arange(4)[:, None, None, None] * 100  # records are told apart by their values
    torch.manual_seed(seed)
    views = augment(name)(x)
    assert views.shape == x.shape
    for view, image in zip(views, x, strict=True):
        kept = view[view != 0].tolist()
        assert sorted(kept) == sorted(set(kept) & set(image.flatten().tolist()))
        assert view.norm() <= image.norm() * (1 + 1e-12)


@pytest.mark.statistical
def test_views_have_their_law():
    torch.manual_seed(0)
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).expand(20_000, 1, 3, 3)
    mirrored = (Flip()(x)[:, 0, 0, 0] == 3).double()
    assert abs(mirrored.mean() - 0.5) < stats.norm.isf(FALSE_ALARM / 2) * 0.5 / 20_000**0.5
    crops = Crop(2)(x).flatten(1)
    kinds, counts = crops.unique(dim=0, return_counts=True)
    assert len(kinds) == 25
    assert stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM
    assert (crops == x.flatten(1)).all(1).any()


def test_views_of_one_record_are_drawn_apart():
    x = torch.rand(50, 3, 8, 8)
    torch.manual_seed(0)
    views, labels = Augmented(TensorDataset(x, torch.arange(50)), augment("crop-flip"), views=5).read_batch([7, 3])
    assert (views.shape, labels.tolist()) == ((2, 5, 3, 8, 8), [7, 3])
    assert len(views.flatten(0, 1).flatten(1).unique(dim=0)) == 10
    values = set(x[7].flatten().tolist()) | {0.0}
    assert set(views[0].flatten().tolist()) <= values
    one, label = Augmented(TensorDataset(x, torch.arange(50)), augment("flip"))[7]
    assert (one.shape, int(label)) == ((3, 8, 8), 7)


def test_bad_augmentations():
    images_ = TensorDataset(torch.rand(5, 3, 8, 8), torch.arange(5))
    with pytest.raises(UnknownNameError, match="crop-flip"):
        augment("mixup")
    with pytest.raises(ParameterError, match="views=0"):
        Augmented(images_, Flip(), views=0)
    with pytest.raises(ParameterError, match="augmentation is for images"):
        Augmented(TensorDataset(torch.rand(5, 3), torch.arange(5)), Flip())
    with pytest.raises(ParameterError, match="padding=0"):
        Crop(0)
    for given_, says in [
        ({"views": 4}, "but no augment"),
        ({"augment": "flip", "views": 0}, "views=0"),
        ({"augment": "flip", "features": "dct"}, "augment= and features="),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"pin_memory": 1}, "pin_memory=1"),
        ({"image_size": (8,)}, r"image_size=\(8,\)"),
        ({"image_size": 8}, "image_size=8"),
        ({"owner_column": 3}, "owner_column=3"),
    ]:
        with pytest.raises(ParameterError, match=says):
            configure(**given_)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_batch(tmp_path, workers):
    split = data.open_split(str(images(tmp_path))).bounded(data.Rescale(0.0, 1.0))
    dataset = Augmented(split.training_dataset(), augment("crop-flip"), views=2)

    def batches(count):
        sampler = PoissonSampler(30, sampling_rate=0.2, steps=12, seed=0)
        return list(BatchLoader(dataset, sampler, num_workers=count, pin_memory=True))

    for (x, y), (other_x, other_y) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert x.shape == (len(y), 2, 3, 8, 8)


def test_an_augmented_run_resumes_bit_identical_with_other_workers(digits_folder, tmp_path):
    already = set(multiprocessing.active_children())  # of other tests
    settings_ = {**SHORT, "dataset": str(digits_folder), "augment": "crop-flip"}
    whole = train(configure(**settings_), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(configure(**settings_, num_workers=2), out=tmp_path / "cut", monitor=Raises(3, signal.SIGINT))
    assert set(multiprocessing.active_children()) <= already
    rest = Trainer.resume(tmp_path / "cut", num_workers=1, pin_memory=True).run()
    assert equal(weights(whole), weights(rest))
    plain = train(configure(**{**settings_, "augment": None}), out=tmp_path / "plain")
    assert not equal(weights(whole), weights(plain))
    assert plain.epsilon == whole.epsilon  # augmentation does not touch the account
    memory = train(configure(**{**settings_, "dataset": str(digits_folder / "digits.npz")}), out=tmp_path / "memory")
    assert equal(weights(whole), weights(memory))


def test_several_views_of_a_record_cost_no_more_privacy(tmp_path):
    """K = 3: the same ε, Δ and noise as K = 1, in a run of its own that resumes with the same bits."""
    settings_ = {**SHORT, "steps": 4, "batch_size": 100, "augment": "crop-flip"}
    one = train(configure(**settings_), out=tmp_path / "one")
    many = train(configure(**settings_, views=3), out=tmp_path / "many")
    assert many.epsilon == one.epsilon
    alone, helped = (Trainer(configure(**settings_, views=views)).engine for views in (1, 3))
    assert alone.plan == helped.plan
    assert alone.sensitivity().total == helped.sensitivity().total
    with pytest.raises(Interrupted):
        train(configure(**settings_, views=3), out=tmp_path / "cut", monitor=Raises(2, signal.SIGINT))
    rest = Trainer.resume(tmp_path / "cut", num_workers=1).run()
    assert equal(weights(rest), weights(many))
    assert not equal(weights(one), weights(many))
    assert rest.metrics["train_loss_not_private"] == many.metrics["train_loss_not_private"]
