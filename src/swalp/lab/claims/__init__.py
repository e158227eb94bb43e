"""The claims, by name."""

from swalp.lab.claim import Claim
from swalp.lab.claims import (
    averaging,
    cifar,
    linear_regression,
    logistic_regression,
    noise_ball,
    related_work,
    word_length,
)

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        linear_regression.SYNTHETIC,
        linear_regression.HOUSING,
        logistic_regression.CLAIM,
        noise_ball.CLAIM,
        averaging.FREQUENCY,
        averaging.PRECISION,
        word_length.CLAIM,
        cifar.CLAIM,
        related_work.CLAIM,
    )
}
