"""California housing as a least-squares problem."""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path

import torch
from torch import Tensor

from swalp.lab.problems import LeastSquares
from swalp.training.data import cache_dir
from swalp.training.mistakes import UserError

NAME = "california-housing"
FILE = "housing.csv"
SHA256 = "8a3727f4cf54ac1a327f69b1d5b4db54c5834ea81c6e4efc0d163300022a685e"
# The file's home: A. Géron, Hands-On Machine Learning (Apache-2.0).
URL = "https://raw.githubusercontent.com/ageron/handson-ml2/master/datasets/housing/housing.csv"


def load(data_dir: Path | None, *, download: bool = False) -> LeastSquares:
    """The logarithm of a block's median house value from eight of its properties and a constant.

    Counts are taken by household and as logarithms, so that no row is far from the others.
    Longitude and latitude, which the coast ties together, are turned by 45 degrees: across it and
    along it. Every column is shifted and scaled to mean 0 and variance 1. Rows without a number of
    bedrooms are left out: 20,433 remain.

    Raises:
        UserError: the file is missing or not the published one.
    """
    root = cache_dir() if data_dir is None else data_dir
    paths = [root / NAME / FILE, root / FILE]
    path = next((path for path in paths if path.exists()), None)
    if path is None and download:
        path = _download(root / NAME)
    if path is None:
        option = "--data-dir DIR or " if data_dir is None else ""
        raise UserError(
            f"no {FILE} of {NAME} in {root / NAME} or {root}; give {option}--download to fetch it "
            f"from {URL}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path}: not the published {FILE} of {NAME} (its SHA-256 differs)")
    rows = [row for row in csv.DictReader(io.StringIO(content.decode())) if row["total_bedrooms"]]

    def column(name: str) -> Tensor:
        return torch.tensor([float(row[name]) for row in rows], dtype=torch.float64)

    households = column("households")
    longitude, latitude = _standard(column("longitude")), _standard(column("latitude"))
    features = [
        column("median_income").log(),
        column("housing_median_age"),
        (column("total_rooms") / households).log(),
        (column("total_bedrooms") / households).log(),
        (column("population") / households).log(),
        households.log(),
        longitude + latitude,
        longitude - latitude,
    ]
    x = torch.stack([*map(_standard, features), torch.ones(len(rows))], dim=1)
    return LeastSquares(
        x.float().contiguous(), _standard(column("median_house_value").log()).float()
    )


def _standard(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


def _download(target: Path) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(URL, f"sha256:{SHA256}", fname=FILE, path=target))
    except (OSError, ValueError) as error:  # no network, full disk; another checksum
        reason = " ".join(str(error).split())
        raise UserError(f"{URL}: cannot download to {target}: {reason}") from None
