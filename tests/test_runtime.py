"""Memory format and precision: what they compute, bound and cost."""

from __future__ import annotations

import kit
import pytest
import torch
from small_convnet import config, weights

from lipdp import nn as lnn
from lipdp.cli import main
from lipdp.errors import UnknownNameError
from lipdp.training import Trainer, configure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model", ["cnn", "vgg", "resnet", "mixer"])
def test_channels_last_computes_the_same(model):
    options = {"width": 8} if model != "mixer" else {}
    ends = []
    for last in (False, True):
        trainer = Trainer(config(model=model, model_options=options, steps=3, channels_last=last))
        trainer.run()
        ends.append(weights(trainer.model))
        filters = [p for p in trainer.model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) == last for p in filters)
        layers = [m for m in trainer.model.modules() if isinstance(m, lnn.Constrained)]
        assert all(m.constraint.contains(m.weight_matrix()) for m in layers)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_autocast_enlarges_the_bound_and_leaves_the_account(tmp_path):
    plain, low = (Trainer(config(autocast=name, steps=3)) for name in (None, "bf16"))
    assert low.planned.epsilon == plain.planned.epsilon
    before, after = plain.engine.sensitivity(), low.engine.sensitivity()
    assert all(after[name] > before[name] for name in before)
    low.run()
    assert low.engine.steps_taken == 3


def test_runtime_settings_may_change_at_a_resume(tmp_path):
    given = config(checkpoint_every=2, log_every=6, autocast="bf16", channels_last=True)
    with pytest.raises(KeyboardInterrupt):
        Trainer(given, out=tmp_path, monitor=kit.Raises(4, KeyboardInterrupt())).run()
    trainer = Trainer.resume(tmp_path, autocast="off", channels_last=False)
    assert trainer.forward.autocast is None
    trainer.run()
    assert trainer.engine.get_epsilon(trainer.delta) == pytest.approx(trainer.planned.epsilon)


def test_an_unknown_precision_is_refused(capsys):
    with pytest.raises(UnknownNameError, match="bf16, off"):
        configure(autocast="fp8")
    assert main(["train", "--autocast", "fp8", "--steps", "1"]) == 2
    assert "bf16, off" in capsys.readouterr().err
