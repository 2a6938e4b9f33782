"""
Measure what each part of the model adds: train variants at equal budget, score them on one set.

Writes docs/accuracy/ablation.json and docs/images/ablation.png. Trainings lie in build/ablation
and go on where they stopped.
"""

import csv
from pathlib import Path

import torch

from cmanp_ros.checkpoint import load_model
from cmanp_ros.core import CMANP
from cmanp_ros.evaluation.scores import mean_and_error, score, terminal_table, to_json
from cmanp_ros.training.loop import train
from cmanp_ros.training.recipe import Recipe, from_dict

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / 'build' / 'ablation'
FAR = 1e4  # a score that outweighs all others, or that all others outweigh
NUM_TEST = 60  # batches of 16 tasks for each design

MODEL = {
    'preset': 'field',
    'dim_x': 1,
    'dim_y': 1,
    'num_levels': 1,
    'num_latents': 16,
    'num_latents_per_block': 16,
    'location_lengths': [0.1, 2.0],
    'least_squares': {
        'functions_per_axis': 32,
        'box_half_width': 2.4,
        'lengths': [0.1, 0.2, 0.4, 0.8],
        'noise_ratios': [0.03, 0.1, 0.3, 1.0],
        'voxels_per_axis': 48,
    },
}
PRIOR = {
    'kernels': ['rbf', 'matern32', 'matern52', 'fractal'],
    'designs': ['uniform', 'trajectory', 'half_seen', 'clusters'],
    'length': [0.1, 0.8],
    'scale': [0.3, 1.0],
    'noise': [0.02, 0.2],
    'log_uniform': ['length', 'noise'],
    'num_context': [3, 64],
    'num_target': 48,
    'heavy_tails': 0.25,
    'uneven_noise': 0.25,
    'step_edge': 0.25,
    'trend': 0.25,
}
BASE = {'model': MODEL, 'prior': {'maps': PRIOR}, 'steps': 1200, 'validate_every': 150}
BARE = {'least_squares': None}
ANYWHERE = {'designs': ['uniform']}
UNTRAINED = 'least squares, untrained'
VARIANTS = {  # name: changes of the model, of the prior, of the recipe, and the null point's score
    'both memories': ({}, {}, {}, None),
    'least squares with decoder, no attention': ({}, {}, {}, FAR),
    'attention alone': (BARE, {}, {}, None),
    'attention alone, no null point': (BARE, {}, {}, -FAR),
    'attention alone, plain start': (BARE | {'inducing_points': False}, {}, {}, None),
    'attention alone, evidence lower bound': (
        BARE | {'num_global': 16},
        {},
        {'objective': 'evidence_lower_bound'},
        None,
    ),
    'attention alone, uniform contexts only': (BARE, ANYWHERE, {}, None),
    'both memories, uniform contexts only': ({}, ANYWHERE, {}, None),
}


def recipe_of(model: dict, prior: dict, options: dict) -> Recipe:
    """Return the recipe of a variant."""
    return from_dict(BASE | options | {'model': MODEL | model, 'prior': {'maps': PRIOR | prior}})


def without_part(recipe: Recipe, null_score: float | None) -> CMANP | None:
    """
    Return a model whose attention reads nothing but its null point, or all but that.
    """
    if null_score is None:
        return None
    torch.manual_seed(recipe.seed)
    model = CMANP(recipe.model)
    model.encoder.null_score.data.fill_(null_score)
    model.encoder.null_score.requires_grad_(False)
    return model


@torch.no_grad()
def scores_of(model: CMANP) -> dict:
    """
    Return log-likelihood and RMSE of targets, mean and standard error over tasks, by design.
    """
    row = {}
    for design in PRIOR['designs']:
        prior = recipe_of({}, {'designs': [design]}, {}).prior
        found = []
        for index in range(NUM_TEST):
            generator = torch.Generator().manual_seed(1_000_000 + index)
            tasks = prior.draw(generator, 16)
            state = model.update(model.init_state(16), tasks.x, tasks.y)
            predicted = model.predict(state, tasks.x_target)
            for mean, stddev, y in zip(
                predicted.mean.numpy(),
                predicted.stddev.numpy(),
                tasks.y_target.numpy(),
                strict=True,
            ):
                found.append(score(mean, stddev, y))
        row[design] = mean_and_error([s.log_likelihood for s in found])
        row[f'{design}_rmse'] = mean_and_error([s.rmse for s in found])
    return row


def draw_curves(path: Path):
    """Draw the loss on held-out tasks against the steps of every variant with the same prior."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout='constrained')
    for name, (_, prior, options, _) in VARIANTS.items():
        if prior or options:
            continue
        with (folder_of(name) / 'log.csv').open(encoding='utf-8') as file:
            rows = [row for row in csv.DictReader(file) if row['held_out_loss']]
        steps = [int(row['step']) for row in rows]
        axes.plot(steps, [-float(row['held_out_loss']) for row in rows], label=name)
    axes.set(xlabel='steps of 16 tasks', ylabel='log-likelihood on held-out tasks [nat]')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def folder_of(name: str) -> Path:
    """Return where a variant is trained."""
    return FOLDER / name.replace(', ', '_').replace(' ', '_')


def main():
    """Train what is not trained yet, score all of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget = {'steps': BASE['steps'], 'num_tasks': 16 * NUM_TEST}
    bare = CMANP(recipe_of({}, {}, {}).model).eval()
    rows = [{'variant': UNTRAINED} | budget | scores_of(bare)]
    for name, (model, prior, options, null_score) in VARIANTS.items():
        recipe = recipe_of(model, prior, options)
        path = train(recipe, folder_of(name), model=without_part(recipe, null_score))
        rows.append({'variant': name} | budget | scores_of(load_model(path)))
        print(terminal_table(rows[-1:]), flush=True)
    (ROOT / 'docs' / 'accuracy' / 'ablation.json').write_text(to_json(rows), encoding='utf-8')
    draw_curves(ROOT / 'docs' / 'images' / 'ablation.png')


if __name__ == '__main__':
    main()
