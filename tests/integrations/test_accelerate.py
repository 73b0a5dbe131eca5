"""Accelerate releases what the plain loop does; what would break the account is refused."""

from __future__ import annotations

import pytest
import torch
from plain_loop import DELTA, QUIET, STEPS, net, plain, private, same

from lipdp.errors import EngineError

accelerate = pytest.importorskip("accelerate")


pytestmark = QUIET


def with_accelerate(
    digits, *, precision=None, size=10**6, clip=None, accumulate=1, compiled=False, model_first=False,
    prepare_model=True, criterion_too=False, scheduled=False, **options,
):  # fmt: skip
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    network = accelerator.prepare(net()) if model_first else net()
    engine, model, optimizer, loader, criterion = private(digits, network, **options)
    wrapped = torch.compile(model, backend="eager") if compiled else model
    if prepare_model and not model_first:
        wrapped = accelerator.prepare(wrapped)
    stepper, batches = accelerator.prepare(optimizer, loader)
    assert batches is loader  # not sharded, not read one batch ahead
    if criterion_too:
        criterion = accelerator.prepare(criterion)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1.0)) if scheduled else None
    for batch in batches:
        with accelerator.accumulate(wrapped):
            stepper.zero_grad()
            for x, y in engine.microbatches(*batch, size):
                with accelerator.autocast():
                    loss = criterion(wrapped(x), y)
                accelerator.backward(loss)
            if clip:
                getattr(accelerator, clip)(wrapped.parameters(), 0.1)
            stepper.step()
            if schedule:
                schedule.step()
    return model.state_dict(), engine.get_epsilon(DELTA)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_first": True},
        {"criterion_too": True},
        {"scheduled": True},
        {"compiled": True},
        {"prepare_model": False},
    ],
    ids=str,
)
def test_accelerate_releases_what_the_plain_loop_does(options, digits):
    weights, epsilon = with_accelerate(digits, **options)
    expected = plain(digits)
    assert same(weights, expected[0])
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"size": 100}, 1e-5), ({"precision": "bf16", "prepare_model": False, "forward_dtype": torch.bfloat16}, 0.1)],
    ids=["micro-batches", "bf16"],
)
def test_accelerate_within_float_error(options, tolerance, digits):
    weights, epsilon = with_accelerate(digits, **options)
    expected = plain(digits)
    assert all(torch.allclose(weights[n], expected[0][n], atol=tolerance) for n in weights)
    assert epsilon == expected[1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"accumulate": 2}, "gradient_accumulation_steps"),
        ({"clip": "clip_grad_norm_"}, r"accelerator\.clip_grad_norm_"),
        ({"clip": "clip_grad_value_"}, "changed between backward"),
        ({"precision": "bf16"}, r"accelerator\.autocast\(\)"),
        ({"precision": "bf16", "forward_dtype": torch.bfloat16}, r"accelerator\.autocast\(\)"),
    ],
    ids=str,
)
def test_what_accelerate_must_not_do_is_refused(options, named, digits):
    with pytest.raises(EngineError, match=named):
        with_accelerate(digits, **options)


@pytest.mark.parametrize("account", [True, False])
def test_accelerate_saves_and_loads_the_engine(account, digits, tmp_path):
    expected, epsilon = plain(digits)

    def run(batches, save=None, load=None):
        accelerator = accelerate.Accelerator(cpu=True)
        engine, model, optimizer, loader, criterion = private(digits)
        wrapped, stepper, loader = accelerator.prepare(model, optimizer, loader)
        if account:
            accelerator.register_for_checkpointing(engine)
        if load:
            accelerator.load_state(load)
        for _, (x, y) in zip(range(batches), loader, strict=False):
            stepper.zero_grad()
            accelerator.backward(criterion(wrapped(x), y))
            stepper.step()
        if save:
            accelerator.save_state(save)
        return model, engine

    run(7, save=tmp_path)
    if not account:
        with pytest.raises(EngineError, match="restored after 7 private steps"):
            run(STEPS, load=tmp_path)
        return
    model, engine = run(STEPS, load=tmp_path)
    assert same(model.state_dict(), expected)
    assert engine.get_epsilon(DELTA) == epsilon
