"""Runs on the digits that take a second."""

from swalp.training import config, data, run_directory, study
from swalp.training.config import RunConfig

ARMS = ("float", "paper-small-block-8")


def settings(**changes) -> RunConfig:
    values = {
        "model": "mlp",
        "width": 8,
        "arms": ARMS,
        "seeds": 1,
        "batch_size": 200,
        "epochs": 3,
        "averaging_start": 2,
        "learning_rate": 0.1,
        "averaging_rate": 0.05,
        "checkpoint_seconds": 1000.0,
    }
    base = config.load("digits").model_dump()
    return RunConfig(**base | values | changes)


def train(run, *, stop_at=None, said=None, examples=None):
    """Train on `examples` to the end, or until `stop_at` steps of this process are done."""
    done = 0

    def stop():
        nonlocal done
        done += 1
        return done == stop_at

    summary = study.train(
        run,
        data.load("digits") if examples is None else examples,
        watch=lambda progress: None,
        say=lambda line: None if said is None else said.append(line),
        stop=stop,
    )
    run.finish(summary)
    return summary


def finished(path, **changes):
    run = run_directory.create(path, settings(**changes))
    train(run)
    return run
