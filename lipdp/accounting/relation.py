"""Which two datasets count as neighbours: the relation that every ε in lipdp is stated under."""

from __future__ import annotations

from enum import Enum


class Relation(str, Enum):
    """The neighbouring relation, carried by the sensitivity, the accountant and every report.

    - `ADD_OR_REMOVE_ONE`: one record is added or removed; Poisson batches; a sum moves by at most Δ. The default.
    - `REPLACE_ONE`: one record is replaced; fixed-size batches without replacement; a sum moves by at most 2Δ.

    >>> Relation("replace_one").sensitivity_factor
    2.0

    Source: Dwork & Roth (2014), section 2.3; Balle, Barthe & Gaboardi (2018), table 1.
    """

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"

    @property
    def sensitivity_factor(self) -> float:
        """How far a sum of vectors of norm ≤ Δ moves between neighbours, in units of Δ."""
        return 1.0 if self is Relation.ADD_OR_REMOVE_ONE else 2.0

    @property
    def words(self) -> str:
        """What one does to one unit to get the neighbour: "add or remove one", "replace one"."""
        return self.value.replace("_", " ")
