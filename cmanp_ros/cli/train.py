"""`cmanp train`: train a field model on synthetic tasks; interrupt and start again at will."""

import argparse
import signal
import time
from dataclasses import fields

import torch

from cmanp_ros.core import CMANPConfig
from cmanp_ros.training.loop import TrainingConfig, train


def main(arguments) -> int:
    """
    Train and print progress.
    """
    parser = argparse.ArgumentParser(prog='cmanp train', description=__doc__)
    for field in fields(TrainingConfig):
        required = field.name == 'folder'
        parser.add_argument(
            f'--{field.name.replace("_", "-")}',
            type=str if required else type(field.default),
            required=required,
            default=None if required else field.default,
        )
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument(
        '--attention-only', action='store_true', help='without the least-squares memory'
    )
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop('threads'))
    bare = options.pop('attention_only')

    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    config = TrainingConfig(**options)
    first, started, losses = [], time.monotonic(), []

    def on_step(step, loss):
        if not first:
            first.append(step - 1)
        losses.append(loss)
        if step % 50 == 0:
            recent, losses[:] = sum(losses) / len(losses), []
            rate = (step - first[0]) / (time.monotonic() - started)
            left = (config.steps - step) / rate / 60
            print(
                f'step {step}/{config.steps}  loss {recent:.3f}  {rate:.1f} steps/s  '
                f'{left:.0f} min left',
                flush=True,
            )
        return bool(stopping)

    model_config = CMANPConfig.field(2, 1, **({'least_squares': None} if bare else {}))
    path = train(model_config, config, on_step)
    print(f'stopped; start again to go on: {path}' if stopping else f'trained: {path}')
    return 0
