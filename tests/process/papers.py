"""Runs the command ``paper`` with experiments of its own: a small one, a long one, and one whose runs fail."""

from functools import partial

from hpcavg.cli.main import main
from hpcavg.experiments import registry
from hpcavg.experiments.experiment import Experiment, Finding, table_of
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.training_results import accuracy_plot, at_end, made_up
from hpcavg.experiments.verdict import all_of, exceeds

OPTIONS = {"task": "digits", "model": "logistic", "algorithm": "k-avg", "learners": 4, "batch_size": 16}


def judge(results):
    accuracies = at_end(results, "test_accuracy", diverged=0.1)
    first, last, *_ = results
    judgement = all_of(exceeds("gain", accuracies[first], accuracies[last]))
    return Finding(judgement, ("arm", "%"), table_of(accuracies, factor=100), [accuracy_plot(results)])


def experiment(name, epochs, **options):
    return Experiment(
        f"k-avg-{name}",
        "k-avg",
        *("Nowhere", "Often is better.", "It was.", "It holds if it is.", "Nothing."),
        lambda scale: {f"K = {k}": partial(training, k=k, epochs=epochs, **OPTIONS, **options) for k in (1, 16)},
        judge,
        lambda holds: made_up({"K = 1": 0.9, "K = 16": 0.8 if holds else 1.0}),
    )


EXPERIMENTS = [experiment("small", 2), experiment("long", 20), experiment("failing", 2, learning_rate=-1)]

if __name__ == "__main__":
    registry.experiments = lambda: {each.name: each for each in EXPERIMENTS}
    main()
