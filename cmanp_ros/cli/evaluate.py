"""`cmanp evaluate`: held-out scores of a model beside least squares alone and an exact GP."""

import argparse

import torch

from cmanp_ros.checkpoint import load_model, read_extra, save_model
from cmanp_ros.core.metrics import mean_and_error
from cmanp_ros.training.evaluation import field_scores


def main(arguments) -> int:
    """Print a table, and write it as JSON if asked for."""
    parser = argparse.ArgumentParser(prog='cmanp evaluate', description=__doc__)
    parser.add_argument('--checkpoint', default='field', help='file or name of a shipped model')
    parser.add_argument('--num-context', type=int, nargs='+', default=[32, 128, 256, 1024])
    parser.add_argument('--num-tasks', type=int, default=200, help='tasks for each size')
    parser.add_argument('--seed', type=int, default=123)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument(
        '--record', metavar='FILE', help='also write the model with these scores in its header'
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    model = load_model(options.checkpoint)
    print(
        f'field prior, {options.num_tasks} held-out tasks for each size, seed {options.seed}; '
        'mean and standard error.\ngap: log-likelihood below the exact GP that knows the '
        'hyperparameters, same tasks.'
    )
    print(
        f'{"N":>5}  {"method":<14}{"log-likelihood":>17}{"gap":>15}{"RMSE":>16}{"90 % covers":>13}'
    )
    rows = []
    for scores in field_scores(model, options.num_context, options.num_tasks, seed=options.seed):
        if scores.method == 'gp':
            reference = scores.log_likelihood
        columns = {
            'log_likelihood': mean_and_error(scores.log_likelihood),
            'gap': mean_and_error(reference - scores.log_likelihood),
            'rmse': mean_and_error(scores.rmse),
            'coverage_90': mean_and_error(scores.coverage),
        }
        rows.append({'num_context': scores.num_context, 'method': scores.method, **columns})
        shown = [f'{mean:.3f} ± {error:.3f}' for mean, error in columns.values()]
        print(
            f'{scores.num_context:>5}  {scores.method:<14}{shown[0]:>17}{shown[1]:>15}'
            f'{shown[2]:>16}{columns["coverage_90"][0]:>13.3f}',
            flush=True,
        )
    if options.record:
        extra = read_extra(options.checkpoint)
        settings = {'num_tasks': options.num_tasks, 'seed': options.seed, 'rows': rows}
        print(f'written: {save_model(model, options.record, extra | {"scores": settings})}')
    return 0


def markdown_table(scores) -> str:
    """
    Render recorded scores for the README.

    :param scores: 'scores' of `read_extra`.
    """
    lines = ['| observations | this model | least squares alone | 90 % intervals cover |']
    lines.append('|---|---|---|---|')
    sizes = dict.fromkeys(row['num_context'] for row in scores['rows'])
    for size in sizes:
        rows = {r['method']: r for r in scores['rows'] if r['num_context'] == size}
        gaps = ['{:.3f} ± {:.3f}'.format(*rows[m]['gap']) for m in ('model', 'least squares')]
        covered = '{:.3f} ± {:.3f}'.format(*rows['model']['coverage_90'])
        lines.append(f'| {size} | {gaps[0]} | {gaps[1]} | {covered} |')
    return '\n'.join(lines)
