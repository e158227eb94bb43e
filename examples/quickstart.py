"""A small network on scikit-learn's digits in 8 bits: convert, optimizer, average, batch norm."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import swalp

torch.manual_seed(0)
digits = load_digits()
x, y = (
    torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16,
    torch.tensor(digits.target),
)
train = torch.arange(len(x)) % 5 != 0
block = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU()]

recipe = swalp.recipes.get("paper-small-block-8")
model = swalp.convert(nn.Sequential(*block, nn.Flatten(), nn.Linear(512, 10)), recipe)
optimizer = swalp.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9, recipe=recipe)
average = swalp.WeightAverage(model, start=100, every=5)
for _ in range(200):
    batch = torch.nonzero(train).squeeze(1)[torch.randint(int(train.sum()), (64,))]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
    optimizer.step()
    average.update_parameters(model)
swalp.recompute_batchnorm(average.module, x[train].split(256))
for name, network in (("8-bit SGD", model), ("SWALP", average.module)):
    wrong = network.eval()(x[~train]).argmax(1) != y[~train]
    print(f"{name}: test error {100 * wrong.float().mean():.2f} %")
