"""A program that gives the model's state to another process on one rank, and goes on averaging."""

import torch
from torch import multiprocessing, nn


def total(state, queue):
    queue.put(float(state["weight"].sum()))


def main():
    from hpcavg import Averager, Topology, algorithms  # not in the other process, which is no rank

    topology = Topology()
    model = nn.Linear(300, 300, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, algorithms.k_avg(1), topology, check_rounds=1)
    model.weight.grad = torch.full((300, 300), -float(topology.rank))
    with torch.no_grad():
        model.weight.zero_()
    for step in range(3):
        if topology.rank == 0 and step == 1:
            spawning = multiprocessing.get_context("spawn")
            queue = spawning.Queue()
            process = spawning.Process(target=total, args=(model.state_dict(), queue))
            process.start()
            print("seen", queue.get())
            process.join()
        averager.step()
    averager.finish()
    print(f"rank {topology.rank} has {model.weight.min().item()} {model.weight.max().item()}")


if __name__ == "__main__":
    main()
