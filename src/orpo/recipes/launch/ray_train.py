"""python ray_train.py NUM_WORKERS run.yaml [--key value …]: one training over so many workers of Ray Train.

Workers get a GPU each where the cluster has some. The run's folder must be on a disk that all machines see: process 0 writes it, and when
a worker is lost Ray starts all of them again and the run goes on from its newest checkpoint, as it does when this command is given again.
"""

import os
import sys

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(start: dict) -> None:
    """One worker: the command `orpo train`, in the folder where this script was started."""
    from orpo.cli import main

    os.chdir(start["folder"])
    code = main(["train", *start["words"]])
    if code:
        raise RuntimeError(f"orpo train left with exit code {code}; process 0 has said why")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdigit():
        sys.exit(__doc__)
    ray.init()
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": os.getcwd(), "words": sys.argv[2:]},
        scaling_config=ScalingConfig(num_workers=int(sys.argv[1]), use_gpu=ray.cluster_resources().get("GPU", 0) > 0),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=1)),
    )
    trainer.fit()
