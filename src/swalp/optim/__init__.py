"""Low-precision optimizers: pure step functions, thin state."""

from swalp.optim.adam import Adam, adam_step
from swalp.optim.sgd import SGD, sgd_step

__all__ = ["SGD", "Adam", "adam_step", "sgd_step"]
