"""Certified robustness: L2 radii per sample, certified accuracy and AUROC, and the attack that has to fail inside them.

    certificate = certify(model, test_x, test_y, maps=[Clip()])
    certificate.accuracy(36 / 255), certificate.radii

`moduli` holds the mathematics, `network` the constants of a model, `inputs` those of the preprocessing; `attack` needs
foolbox (`pip install "lipdp[robustness]"`); `run` reads a run's folder.
"""

from lipdp.certify.attack import AttackResult, pgd
from lipdp.certify.certificate import IMAGE_RADII, Certificate, certify, table_radii
from lipdp.certify.inputs import InputMap
from lipdp.certify.network import CONVOLUTIONS, Network

__all__ = [
    "CONVOLUTIONS",
    "IMAGE_RADII",
    "AttackResult",
    "Certificate",
    "InputMap",
    "Network",
    "certify",
    "pgd",
    "table_radii",
]
