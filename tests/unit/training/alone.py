"""Training without averaging, by a loop as short as it can be."""

import torch

from hpcavg import Topology, tasks
from hpcavg.training.loader import BatchLoader


def train_alone(config, optimizer_of, num_epochs):
    """Train the model of the task of `config`; return its loader and how many test samples the model gets right.

    optimizer_of : makes the optimizer of the parameters that it is given.
    """
    task = tasks.load(config)
    torch.manual_seed(0)
    loader, model = BatchLoader(task, config, Topology(), torch.device("cpu")), task.build_model()
    optimizer = optimizer_of(model.parameters())
    for _ in range(num_epochs * loader.steps_per_epoch):
        _, inputs, targets = loader.next()
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    return loader, sum(int(task.count_correct(model(inputs), targets)) for inputs, targets in loader.test_batches())
