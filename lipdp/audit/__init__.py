"""Empirical lower bounds on ε: does the engine keep its promise?

    lipdp.audit.many_runs(epsilon=4.0)                  # N against N + 1 records, many tiny runs
    lipdp.audit.one_run(epsilon=4.0)                    # one run, thousands of canaries

A lower bound above the claim refutes it; one below proves nothing.
"""

from lipdp.audit.experiments import Experiment, gradient_canaries, input_canaries, worst_case
from lipdp.audit.run import AuditResult, many_runs, one_run
from lipdp.audit.statistics import independent_lower_bound, one_run_lower_bound, one_run_p_value

__all__ = [
    "AuditResult",
    "Experiment",
    "gradient_canaries",
    "independent_lower_bound",
    "input_canaries",
    "many_runs",
    "one_run",
    "one_run_lower_bound",
    "one_run_p_value",
    "worst_case",
]
