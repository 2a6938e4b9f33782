"""`cmanp train`: train a model from a recipe, on synthetic fields or on recorded ones."""

import argparse
import shlex
import signal
import sys

import torch

from cmanp_ros.cli.progress import progress_for
from cmanp_ros.training.loop import train
from cmanp_ros.training.recipe import load_recipe, shipped_recipes

OVERRIDES = ('steps', 'batch_size', 'learning_rate', 'seed', 'precision', 'start_from')


def main(arguments) -> int:
    """
    Train, or go on, and print progress.
    """
    parser = argparse.ArgumentParser(prog='cmanp train', description=__doc__)
    parser.add_argument(
        'recipe', help=f'a YAML file, or the name of a shipped one: {", ".join(shipped_recipes())}'
    )
    parser.add_argument('--folder', required=True, help='of this training: go on if it has begun')
    parser.add_argument('--steps', type=int, help='instead of those in the recipe')
    parser.add_argument('--batch-size', type=int)
    parser.add_argument('--learning-rate', type=float)
    parser.add_argument('--seed', type=int)
    parser.add_argument('--precision', help='of matrix products: float32 or bfloat16')
    parser.add_argument('--start-from', help='a model file or the name of a shipped model')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--workers', type=int, default=0, help='processes that make batches')
    parser.add_argument('--device', default='cpu', help='cpu or cuda')
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options['threads'])
    recipe = load_recipe(options['recipe'], **{name: options[name] for name in OVERRIDES})

    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    recent = []
    with progress_for(recipe.steps, 'steps') as progress:

        def on_step(step, loss, validation):
            recent.append(loss)
            progress.show(step)
            if validation is not None:
                mean = sum(recent) / len(recent)
                recent.clear()
                print(f'step {step}: loss {mean:.3f}, on held-out tasks {validation:.3f}')
                sys.stdout.flush()
            return bool(stopping)

        path = train(
            recipe,
            options['folder'],
            on_step,
            options['workers'],
            options['device'],
            command=shlex.join(['cmanp', 'train', *arguments]),
        )
    print(f'stopped; the same command goes on: {path}' if stopping else f'trained: {path}')
    return 0
