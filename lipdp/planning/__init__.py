"""Planning with the total amount of noise: from a budget to (B, σ, T), and a search at a fraction of the compute.

`plan` chooses a batch size, a noise multiplier and a number of steps; `simulate` looks for hyper-parameters by runs at
B/k and σ/k, which are not private; `Repetitions` says what a search costs that is private;
`measure_cost(workload, m).predict(scale)` says what a run costs in time and memory on W devices, from
steps taken on one.
"""

from lipdp.lazy import facade

# public name → the module that defines it; imported on first use: Optuna is an extra
_NAMES = {
    "LABEL": "lipdp.planning.simulation",
    "Budget": "lipdp.planning.budget",
    "Cost": "lipdp.planning.cost",
    "Move": "lipdp.planning.tan",
    "Plan": "lipdp.planning.budget",
    "Point": "lipdp.planning.budget",
    "Prediction": "lipdp.planning.cost",
    "Repetitions": "lipdp.planning.repetitions",
    "Scale": "lipdp.planning.cost",
    "Simulation": "lipdp.planning.simulation",
    "Workload": "lipdp.planning.cost",
    "accuracy_against_rate": "lipdp.planning.pictures",
    "constant_eta": "lipdp.planning.budget",
    "eta_for": "lipdp.planning.tan",
    "evaluate": "lipdp.planning.budget",
    "iso_budget": "lipdp.planning.budget",
    "loss_curves": "lipdp.planning.pictures",
    "measure_cost": "lipdp.planning.cost",
    "parse_space": "lipdp.planning.space",
    "plan": "lipdp.planning.budget",
    "rule": "lipdp.planning.tan",
    "simulate": "lipdp.planning.search",
    "tan_epsilon": "lipdp.planning.tan",
    "tan_eta": "lipdp.planning.tan",
    "with_batch_size": "lipdp.planning.budget",
    "with_noise_multiplier": "lipdp.planning.budget",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
