"""How many more steps a budget pays for."""

from __future__ import annotations

from lipdp.accounting.events import Ledger
from lipdp.errors import ParameterError
from lipdp.privacy.engine import PrivacyEngine


def steps_within(engine: PrivacyEngine, *, epsilon: float, delta: float) -> int:
    """How many more steps the budget ε pays for.

    ε grows with every step, so the number is found by bisection, with the engine's own accountant: what it says after
    the last of these steps is what was compared with the budget.

    Args:
        engine: after `make_private`; the steps that it has taken count.
        epsilon, delta: the budget; an infinite ε leaves what `make_private` planned.

    Returns:
        Between 0 and the steps that are left of those that `make_private` planned.

    Raises:
        ParameterError: ε is not positive. AccountingError: as `get_epsilon`. EngineError: before `make_private`.

    >>> dataset = torch.utils.data.TensorDataset(torch.randn(100, 4), torch.randint(2, (100,)))
    >>> model = torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 2))
    >>> engine = lipdp.PrivacyEngine("rdp")
    >>> _ = engine.make_private(module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), dataset=dataset,
    ...     criterion=lipdp.losses.TauCrossEntropy(), expected_batch_size=10, steps=50, noise_multiplier=1.0)
    >>> from lipdp.integrations import steps_within
    >>> steps_within(engine, epsilon=1e9, delta=1e-5), steps_within(engine, epsilon=0.01, delta=1e-5)
    (50, 0)
    """
    if not epsilon > 0:
        raise ParameterError(f"epsilon={epsilon}: a budget is a positive number")
    left = engine.steps_left
    if epsilon == float("inf"):
        return left

    def spent(steps: int) -> float:
        then = Ledger(engine.ledger.events)
        then.append(engine.plan.step_event.with_steps(steps))
        return engine.accountant.epsilon(then.events, delta).epsilon

    if left == 0 or spent(left) <= epsilon:
        return left
    affordable, beyond = 0, left
    while beyond - affordable > 1:
        middle = (affordable + beyond) // 2
        affordable, beyond = (middle, beyond) if spent(middle) <= epsilon else (affordable, middle)
    return affordable
