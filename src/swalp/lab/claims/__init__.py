"""The claims, by name."""

from swalp.lab.claim import Claim
from swalp.lab.claims import linear_regression, logistic_regression, noise_ball

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        linear_regression.SYNTHETIC,
        linear_regression.HOUSING,
        logistic_regression.CLAIM,
        noise_ball.CLAIM,
    )
}
