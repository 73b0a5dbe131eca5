"""Fabric releases what the plain loop does; what would break the account is refused."""

from __future__ import annotations

import pytest
import torch
from plain_loop import DELTA, QUIET, STEPS, plain, private, same

from lipdp.errors import EngineError

Fabric = pytest.importorskip("lightning.fabric").Fabric
pytestmark = QUIET


def with_fabric(
    digits,
    *,
    precision="32-true",
    size=10**6,
    clip=None,
    accumulate=1,
    compiled=False,
    apart=False,
    wrap=False,
    **options,
):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    engine, model, optimizer, loader, criterion = private(digits, **options)
    quick = torch.compile(model, backend="eager") if compiled else model
    if apart:
        wrapped, stepper = fabric.setup_module(quick), fabric.setup_optimizers(optimizer)
    else:
        wrapped, stepper = fabric.setup(quick, optimizer)
    if wrap:
        loader = fabric.setup_dataloaders(loader)
    for number, batch in enumerate(loader, 1):
        due = number % accumulate == 0
        with fabric.no_backward_sync(wrapped, enabled=not due):
            for x, y in engine.microbatches(*batch, size):
                fabric.backward(criterion(wrapped(x), y))
        if clip:
            fabric.clip_gradients(wrapped, stepper, **clip)
        if due:
            stepper.step()
            stepper.zero_grad()
    return model.state_dict(), engine.get_epsilon(DELTA)


@pytest.mark.parametrize("options", [{}, {"apart": True}, {"compiled": True}], ids=str)
def test_fabric_releases_what_the_plain_loop_does(options, digits):
    weights, epsilon = with_fabric(digits, **options)
    expected = plain(digits)
    assert same(weights, expected[0])
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"size": 100}, 1e-5), ({"precision": "bf16-mixed", "forward_dtype": torch.bfloat16}, 0.1)],
    ids=["micro-batches", "bf16"],
)
def test_fabric_within_float_error(options, tolerance, digits):
    weights, epsilon = with_fabric(digits, **options)
    expected = plain(digits)
    assert all(torch.allclose(weights[n], expected[0][n], atol=tolerance) for n in weights)
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"accumulate": 2}, EngineError, "accumulate_grad_batches"),
        ({"clip": {"max_norm": 0.1}}, EngineError, r"fabric\.clip_gradients"),
        ({"clip": {"clip_val": 0.1}}, EngineError, r"fabric\.clip_gradients"),
        ({"precision": "bf16-mixed"}, EngineError, r"forward_dtype=torch\.bfloat16"),
        ({"precision": "bf16-true"}, EngineError, "torch.bfloat16"),
        ({"wrap": True}, TypeError, "DataLoader"),  # Fabric's own refusal
    ],
    ids=str,
)
def test_what_fabric_must_not_do_is_refused(options, error, named, digits):
    with pytest.raises(error, match=named):
        with_fabric(digits, **options)


@pytest.mark.parametrize("account", [True, False])
def test_fabric_saves_and_loads_the_engine(account, digits, tmp_path):
    expected, epsilon = plain(digits)
    fabric = Fabric(accelerator="cpu", devices=1)

    def run(batches, load=None):
        engine, model, optimizer, loader, criterion = private(digits)
        wrapped, stepper = fabric.setup(model, optimizer)
        state = {"model": wrapped, "optimizer": stepper, **({"engine": engine} if account else {})}
        if load:
            fabric.load(load, state)
        for _, (x, y) in zip(range(batches), loader, strict=False):
            stepper.zero_grad()
            fabric.backward(criterion(wrapped(x), y))
            stepper.step()
        return model, engine, state

    fabric.save(tmp_path / "state.ckpt", run(7)[2])
    if not account:
        with pytest.raises(EngineError, match="restored after 7 private steps"):
            run(STEPS, load=tmp_path / "state.ckpt")
        return
    model, engine, _ = run(STEPS, load=tmp_path / "state.ckpt")
    assert same(model.state_dict(), expected)
    assert engine.get_epsilon(DELTA) == epsilon
