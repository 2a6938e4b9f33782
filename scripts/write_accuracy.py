"""
Write docs/accuracy.md, and the table of README.md, from what `cmanp evaluate --json` wrote.

Run it after new figures were recorded in docs/accuracy/; a test compares the pages with them.
"""

import json
from pathlib import Path

import numpy as np

from cmanp_ros.evaluation.gp1d import NUM_LENGTHS, NUM_SCALES
from cmanp_ros.evaluation.scores import markdown_table
from cmanp_ros.evaluation.windows import TILE_SIZE
from cmanp_ros.optional import library

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / 'docs' / 'accuracy'
BEGIN, END = '<!-- accuracy: made by scripts/write_accuracy.py -->', '<!-- end of accuracy -->'
COMPARED_CONTEXT = 256  # observations of a window, in README.md
NAMES = {'rmse': 'RMSE', 'log_likelihood': 'log-likelihood', 'coverage_90': '90 % covers'}
TO_GP = {'rmse_over_reference': 'RMSE / GP', 'log_likelihood_to_reference': 'to GP'}
OURS, GP = 'cmanp tiles', 'exact GP'
ANSWER = """In short, each target alone (log-likelihood: higher is better):

{table}

Over all numbers of observations and noises of real terrain errors are {low:.2f} to {high:.2f}
times those of the exact GP, which is fitted to each window, and 90 % intervals cover {least:.1f}
to {most:.1f} %. Where its assumptions fail (readings that are far off, an edge, uneven noise)
errors are {robust_low:.2f} to {robust_high:.2f} times those of the GP, and log-likelihoods
{robust_least:.2f} to {robust_most:.2f} higher (± {robust_error:.2f} at most). On fields of a known
prior, {num} observed, the log-likelihood is {gap} below that of an exact GP which is told kernel
and hyperparameters."""
PAGE = """# Accuracy

Made by `scripts/write_accuracy.py` from the files in `docs/accuracy/`, which the commands below
wrote: mean ± standard error over tasks. Tuning was done on other data, with exceptions, so take
the last digits with care: [what was tuned on what](#what-was-tuned-on-what).

{answer}

## The paper's first benchmark

{gp1d_commands}

Curves of one-dimensional GPs: 3 to 46 observations, up to 46 targets, length 0.1 to 0.6, scale 0.1
to 1, noise 0.02, 16 curves a batch, seed 0; the number of curves is in the table, and `below` is
the difference to the ceiling on the same curves. The exact GP is told the hyperparameters; the
Bayes ceiling averages over them, by a quadrature of {num_lengths} lengths and {num_scales} scales
that knows the kernel: no method that has to infer them can exceed its joint on average, nor its
log-likelihood with a normal distribution for each target. Joint: all targets of a curve, divided
by their number; the models score blocks of targets, each folded in, with its true values, before
the next.

- `gp1d_attention`: the paper's memory alone, 32 latents (the paper: 128). Trained on RBF curves
  only, so Matern curves are zero-shot, as in the paper (which has 1.24 and 0.80).
- `gp1d_and`: CMANP-AND on as many latents, trained on blocks of 16, then of 1 to 30 (the paper:
  1.48 and 0.96).
- `gp1d`: both memories, RBF spectra only, noise known; zero-shot on Matern as well.
- `gp1d_matern`: the same with Matern-5/2 spectra admitted in the memory and in training.

The lengths of both, and their noise ratios, are midpoints of nine and eight equal parts of the
ranges that curves are drawn from, and all settings are averaged; `gp1d` has one shorter length,
for Matern. Lengths closer together, or more functions, are level (160 curves of seed 7, from which
that was chosen).

What training adds to least squares is nothing here: it is the right model for these curves. The
table of ablations below has fields for which it is not.

{gp1d}

![Samples of CMANP-AND and of both memories, fed back block by block](images/gp1d_samples.png)

Three curves, and what `gp1d_and` and `gp1d` sample of each; the gray band is the mean ± 2 standard
deviations of a reading at each x alone (`--picture`).

## What each part adds

    python scripts/ablate.py

Variants trained for {ablation_steps} steps of 16 curves on one-dimensional fields such as robots
meet: RBF, Matern and fractal kernels, uneven noise, 8-sigma outliers, steps and trends, each in a
quarter of them; observed anywhere, along trajectories, in one half, in clusters. Scored on
{ablation_tasks} curves of each design that no training saw: log-likelihood, mean and standard
error.

{ablation}

![Log-likelihood on held-out curves against training steps](images/ablation.png)

## Fields of a known prior

    cmanp evaluate prior --num-tasks 480 --json docs/accuracy/prior.json
    cmanp evaluate prior --kind "heavy tails" "short lengths" "long lengths" "step edge" \\
        --num-context 128 --num-tasks 24 --json docs/accuracy/beyond_prior.json

{prior_num} fields in two dimensions, seed 123: RBF or Matern-5/2, length 0.25 to 1.5, scale 0.3
to 1, noise 0.02 to 0.2, half of them seen along a track. `gap` is how far the log-likelihood is
below that of the exact GP which is told the kernel, on the same fields; the Bayes ceiling
averages over a grid of hyperparameters. `one tile, least squares` has 16 functions per axis and a
grid that suits this prior, tuned on other seeds, untrained; `field` is the shipped model, which
knows no prior.

{prior}

Beyond it, at N = 128: readings off by eight sigma, lengths that no grid here has, a step through
the map. The exact GP still knows the kernel, and not the step or which readings are wrong.

{beyond_prior}

## Real terrain

    cmanp evaluate terrain --attention attention.safetensors --json docs/accuracy/terrain.json

30 windows of 64 x 64 cells of the Jacksboro fault model (matplotlib), seed 0, scaled to a standard
deviation of 0.65; as many cells observed as the first column says, up to 1,000 others asked for;
observation noise added to both. One tile size and one set of weights for all. The exact GP is
fitted to each window: Matern-3/2 or -5/2, two starts, the best by evidence. `one tile` has 16
functions per axis. `attention alone` has no least-squares memory; its weights are not shipped:
the recipe `field` with `least_squares: null` in its model, 800 batches and 1,600 steps (10
minutes of one core, on the same worlds; the default had more), and its rows are of tiles that
overlapped more.

{terrain}

## Where the assumptions of a Gaussian process fail

    cmanp evaluate robust --attention attention.safetensors --json docs/accuracy/robust.json

Synthetic fields (`cmanp_ros/evaluation/robust.py`): 5 % of the readings off by 8 sigma; a step
edge; noise that varies tenfold over the map; and none of these, as a control. What tiles do about
readings that are far off is in [tiles.md](tiles.md), "Readings that are far off": chosen on tasks
of seed 1000, on simulated tracks with and without blunders, and on windows of another terrain, the
sea floor in `topobathy.npz` of matplotlib, whose lone peaks look most like blunders. `RMSE / GP`
is the ratio of the mean errors, `to GP` the difference of the log-likelihoods: both are compared
task by task, so that they are known better than the columns before them; `attention alone` was
scored on its own.

{robust}

## Along real tracks

    cmanp evaluate tracks --threads 1 --json docs/accuracy/tracks.json

82,970 ship soundings off Baja California in their order, each 100 predicted before they are
folded [km]. All peers are given mean, variance and hyperparameters fitted in hindsight to the
whole of it; `cmanp tiles` is given tiles of 22.5 km, and -2 ± 1 km. 1,954 soundings repeat an
earlier one exactly. One, number 78,708, is a reading of -5,817 m on a shelf 55 m deep, where the
bars of `cmanp tiles` are narrow: it alone decides the mean log-likelihood and its standard error,
so each method has a row without it, too (`no blunder`).

{tracks}

## Beside what users would pick

    pip install -r requirements/evaluate.txt
    {real_command}

The same points and targets for all, each task alone: {real_num} windows of the terrain above
without noise; and {real_num} stretches of the soundings, drawn without overlap, each of 2,560 in a
row without repeats, every tenth observed, 500 others asked for, in units in which the observed
have a standard deviation of 0.65 and 75 km are 1. `to GP` is the difference to the exact
GP, task by task. Times are of one processor, and memory is what a process took above what it had
with its libraries loaded; {real_load} processes wanted each of the two processors meanwhile, so
times may be too long by a factor, though not by another one for each.

- exact GP: gpytorch, Matern-3/2 or -5/2, hyperparameters by evidence. Vecchia GP: gpboost, the
  same choice, 20 neighbors. local GP: the nearest 64 observations. sparse GP: FITC, up to 512
  inducing points (below that it is exact), folded by 64. local basis filter: after Viset et al.,
  a grid of a twelfth of the support, folded by 64. random features: 1,024 frequencies. The last
  four have hyperparameters fitted to up to 512 observations.
- kriging: pykrige, the better of two variogram models. Kalman grid: cell size by cross-validation.
  linear interpolation: one standard deviation, by cross-validation.
- ConvCNP: neuralprocesses, trained for {convcnp_steps} steps of four synthetic fields,
  {convcnp_minutes} minutes of one core. Such networks get hours: this one is undertrained, and
  labeled so.
- cmanp tiles: tiles of {tile_size:g}; nothing is fitted to a task. Scored later than the others,
  on a machine that takes half as long for the exact GP, so its times are not to be compared with
  theirs (performance.md has ratios of one run).

![Log-likelihood relative to the exact GP against processor time, one panel for each data set and
number of observations](images/real.png)

{real}

## What was tuned on what

Tuning was done on synthetic fields, on draws of a Matern GP and on windows of `topobathy.npz`
(matplotlib). The exceptions: the terrain above was scored once with 8 functions per axis, levels a
factor of 4 apart and tiles of 0.3 (RMSE at N = 256 was 1.08 times the GP's); that showed the gap
between levels, and 10 functions, a factor of 3 and smaller tiles were then chosen on the other
data. The prior of the amplitude, `points_per_voxel`, the level factor and (earlier weights) tiles
of 10 to 60 km were also looked at on 2,000 to 4,000 of the soundings above, from numbers 20,000
and 50,000.

The grid of hyperparameters (four lengths, five noise ratios) and smoothness were chosen on windows
of `topobathy.npz` (seeds 7 and 100), robust tasks of seed 1000 and worlds of the training prior;
that noise ratios were too far apart was suspected from the figures above, of N = 1,024, as they
were before. That tiles of some 25 points know their noise too poorly was suspected from the
terrain above, of N = 256 with noise, as it was; how much of their neighbours' evidence tiles take
was then chosen on the tuning data.

Cosines, their box, how many points of a voxel count and how far tiles reach were chosen with least
squares alone on 282 tuning tasks: robust ones (seed 1000), windows of `topobathy.npz` (seed 7) and
simulated tracks over it; with the network on half of these, what is kept of its correction of the
standard deviation: 0.7 (of 1, 0.7, 0.6 and 0.5 the mean log-likelihoods, less the exact GP's, are
0.102, 0.107, 0.105 and 0.105). Tiles of 0.45 and 0.48 are level there; 0.48 was taken after the
terrain above, of N = 1,024 without noise, had been scored with 0.4, 0.45 and 0.52: RMSE was 1.10,
1.08 and 1.06 times the GP's. Later the finest tiles came to reach a whole spacing, 0.36: as far as
before. How far, where they answer, and that coarser ones stay as they were is from 36 windows of
`topobathy.npz` (seed 11) for each N and noise, and 36 robust tasks of each kind (seed 2000), see
[tiles.md](tiles.md): with 0.38 a third of what N = 1,024 gains is lost. Weights that were trained
on for 1,800 steps with such tiles were level, so the shipped ones stayed. On the way the soundings
above were looked at with other reaches: by one reading their log-likelihood went from -0.3 to
-2.1.

The same data say which lengths are on the grid now, that settings in between are averaged
([tiles.md](tiles.md)), and that the network narrows bars to 0.65 of the regression's at most, no
longer 0.5: likelihoods of terrain of N = 64 without noise are 0.007 ± 0.003 higher, of simulated
tracks with blunders 0.015, of smooth fields 0.004 ± 0.001 lower, all others level. The soundings
were looked at once with 0.65 and the grid as it was (-0.318), and then as they were with both
(-0.245). They also say that coarse tiles take fields for smoother than the finest do: 5/2, not
3/2. On the way all above was scored with priors that are those of the kernel up to the border of a
tile: better on tuning data and robust tasks, but bars of N = 64 were too narrow with these
weights, so they were not taken. That tiles which are full of readings have the head start for
standard deviations, too, is from drives of the demo and simulated tracks.

That finer tiles have a head start in the mean ([tiles.md](tiles.md)), and from which share of a
tile seen, was chosen on those windows and robust tasks; that it needs a bound on the amplitude was
seen in the soundings above, where without one errors are 5 % larger, most of that in twenty of 830
batches. Those tracks are also why more passes disagree in training; simulated tracks over
`topobathy.npz` show the same. A head start for standard deviations, too, where tiles were seen
all over, was level on tuning data, but not along the soundings (log-likelihood -0.46); so it also
takes readings that are scattered, as those of passes are not. How much of it, 0.4, is from the
tuning data, where 90 % intervals come closer to 90 %: of N = 1,024 from 91.1 to 89.3 %, of smooth
fields of N = 256 from 93.9 to 93.6 %. Log-likelihoods change by 0.006 at most, but for simulated
tracks where 2 % of what is predicted are blunders: 0.03 lower (0.001 higher where none counts less
than -4). That it helps most where terrain is smooth was known from the terrain above, of N = 1,024
without noise.
The shipped weights, the mean of four checkpoints, were taken for
those simulated tracks, repeated readings (`test/unit/test_properties.py`) and, of two that
are level there, for the soundings.
"""


def recorded(study: str) -> list[dict]:
    """Return rows as the command wrote them."""
    return json.loads((FIGURES / f'{study}.json').read_text(encoding='utf-8'))


def rows(study: str) -> list[dict]:
    """Return recorded rows, ready for a table."""
    columns = ('noise', 'kind', 'num_context', 'method', *NAMES)
    columns += tuple(TO_GP) if study == 'robust' else ()
    chosen = [{c: row[c] for c in columns if c in row} for row in recorded(study)]
    if study == 'tracks':
        for row, whole in zip(chosen, recorded(study), strict=True):
            row.pop('num_context')
            row['seconds in all'] = whole['seconds_observe'] + whole['seconds_predict']
    titles = NAMES | TO_GP | {'num_context': 'N'}
    return [{titles.get(k, k): v for k, v in r.items()} for r in chosen]


def page() -> str:
    """Return docs/accuracy.md."""
    tables = {study: markdown_table(rows(study)) for study in ('terrain', 'robust', 'tracks')}
    return PAGE.format(
        **tables,
        **_gp1d(),
        **_ablation(),
        **{name: markdown_table([_prior_row(row) for row in recorded(name)]) for name in PRIORS},
        prior_num=recorded('prior')[0]['num_tasks'],
        **_real(),
        answer=answer(),
    )


def answer() -> str:
    """Return what the tables say, in short."""
    terrain, robust = by_setting('terrain'), by_setting('robust')
    (prior,) = (each for each in by_setting('prior') if _num(each) == COMPARED_CONTEXT)
    tracks = {each[OURS]['kind']: each for each in by_setting('tracks')}
    (clean,) = (e for e in terrain if (_num(e), e[OURS]['noise']) == (COMPARED_CONTEXT, 0))
    (far_off,) = (
        e for e in robust if (_num(e), e[OURS]['kind']) == (COMPARED_CONTEXT, 'outliers')
    )
    shown = (
        (f'real terrain, {COMPARED_CONTEXT} observed', clean, GP),
        (f'synthetic fields, 5 % of {COMPARED_CONTEXT} readings off by 8 sigma', far_off, GP),
        (f'{_num(tracks["all"]):,} soundings along tracks [km]', tracks['all'], 'local GP'),
        ('the same without one blunder', tracks['no blunder'], 'local GP'),
    )
    lines = [
        {'data': data, 'method': name} | {NAMES[score]: found[name][score] for score in NAMES}
        for data, found, peer in shown
        for name in (OURS, peer)
    ]
    ratios = [each[OURS]['rmse'][0] / each[GP]['rmse'][0] for each in terrain]
    covered = [100 * each[OURS]['coverage_90'][0] for each in terrain]
    failing = [each[OURS] for each in robust if each[OURS]['kind'] != 'gaussian']
    errors = [row['rmse_over_reference'][0] for row in failing]
    gains, gain_errors = zip(*(row['log_likelihood_to_reference'] for row in failing), strict=True)
    gap = prior['field, tiles']['gap']
    return ANSWER.format(
        table=markdown_table(lines),
        num=COMPARED_CONTEXT,
        low=min(ratios),
        high=max(ratios),
        robust_low=min(errors),
        robust_high=max(errors),
        robust_least=min(gains),
        robust_most=max(gains),
        robust_error=max(gain_errors),
        least=min(covered),
        most=max(covered),
        gap=f'{gap[0]:.3f} ± {gap[1]:.3f}',
    )


def by_setting(study: str) -> list[dict[str, dict]]:
    """Return method -> row, for each setting in which methods were compared."""
    found = {}
    for row in recorded(study):
        setting = tuple(row.get(name) for name in ('kind', 'noise', 'num_context'))
        found.setdefault(setting, {})[row['method']] = row
    return list(found.values())


def _num(compared) -> int:
    """Return how many were observed."""
    return next(iter(compared.values()))['num_context']


def _real() -> dict:
    """Return what the page says of the methods that users would pick."""
    found = recorded('real')
    trained = next(row for row in found if 'training_steps' in row)
    loads = sorted(row['load'][0] for row in found)
    return {
        'real': markdown_table([_real_row(row) for row in found]),
        'real_command': found[0]['command'],
        'real_num': found[0]['num_tasks'],
        'real_load': f'{loads[0]:.1f} to {loads[-1]:.1f}',
        'convcnp_steps': f'{trained["training_steps"]:,}',
        'convcnp_minutes': f'{trained["training_seconds"] / 60:.0f}',
    }


def _gp1d() -> dict:
    """Return what the page says of the paper's benchmark."""
    found = recorded('gp1d')
    titles = {
        'kernel': 'kernel',
        'method': 'method',
        'num_tasks': 'curves',
        'log_likelihood': 'log-likelihood',
        'below_ceiling': 'below',
        'joint': 'joint',
        'joint_below_ceiling': 'joint below',
        'coverage_90': '90 % covers',
        'state_bytes': 'state [bytes]',
    }
    commands = list(dict.fromkeys(row['command'] for row in found))
    return {
        'gp1d': markdown_table([{titles[k]: row[k] for k in titles} for row in found]),
        'gp1d_commands': '\n'.join(f'    {command}' for command in commands),
        'num_lengths': NUM_LENGTHS,
        'tile_size': TILE_SIZE,
        'num_scales': NUM_SCALES,
    }


PRIORS = ('prior', 'beyond_prior')


def _prior_row(row) -> dict:
    """Return what fits into a table of the page."""
    shown = {} if row['kind'] == 'prior' else {'field': row['kind']}
    shown |= {'N': row['num_context'], 'method': row['method'], 'RMSE': row['rmse']}
    shown |= {'log-likelihood': row['log_likelihood'], 'gap': row['gap']}
    return shown | {f'{level} % covers': row[f'coverage_{level}'] for level in (50, 90, 95)}


def _ablation() -> dict:
    """Return what the page says of the parts of the model."""
    found = recorded('ablation')
    designs = [name for name in found[0] if f'{name}_rmse' in found[0]]
    table = [
        {'variant': row['variant']} | {name.replace('_', ' '): row[name] for name in designs}
        for row in found
    ]
    return {
        'ablation': markdown_table(table),
        'ablation_steps': f'{found[0]["steps"]:,}',
        'ablation_tasks': f'{found[0]["num_tasks"]:,}',
    }


def _real_row(row) -> dict:
    """Return what fits into a table of the page."""
    shown = {'data': row['kind'], 'N': row['num_context'], 'method': row['method']}
    shown |= {title: row[name] for name, title in NAMES.items()}
    return shown | {
        'to GP': row['log_likelihood_to_reference'],
        'CRPS': row['crps'],
        'fit [s]': row['seconds_fit'][0],
        'predict [s]': row['seconds_predict'][0],
        'MB': f'{row["memory_mb"][0]:.0f}',
    }


def draw_real(path):
    """Draw how much each method takes, and how far its log-likelihood is from the exact GP's."""
    pyplot = library('matplotlib.pyplot', 'the picture')
    panels = {}
    for row in recorded('real'):
        panels.setdefault((row['kind'], row['num_context'], row['noise']), []).append(row)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.5 + 3.5 * len(panels), 4), sharey=True, layout='constrained'
    )
    for axis, ((kind, num_context, noise), found) in zip(
        np.ravel(axes), panels.items(), strict=True
    ):
        for number, row in enumerate(found):
            seconds = row['seconds_fit'][0] + row['seconds_predict'][0]
            mean, error = row['log_likelihood_to_reference']
            is_ours, marker = row['method'] == 'cmanp tiles', 'osD^vP*X<>h'[number % 11]
            color = 'black' if is_ours else f'C{number % 10}'  # the colors begin again at ours
            axis.errorbar(seconds, mean, error, fmt=marker, ms=6, color=color, label=row['method'])
        added = f', noise {noise:g}' if noise else ''
        axis.set(xscale='log', title=f'{kind}, {num_context} observed{added}')
        axis.set_xlabel('fit and predict [s]')
        axis.grid(alpha=0.3)
    np.ravel(axes)[0].set_ylabel('log-likelihood, relative to the exact GP [nat]')
    handles, labels = np.ravel(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right center', frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


KEPT = {
    'cmanp tiles': 'tiles, 44 kB each',
    'exact GP': 'all observations, squared',
    'local GP': 'all observations',
    'sparse GP': 'inducing points',
    'local basis filter': 'one grid of basis functions',
    'linear interpolation': 'all observations; no bars of its own',
    'Kalman grid': 'cells; bars only inside them',
    'nearest value': 'all observations',
}  # method -> what it keeps


BLUNDER = """

A single sounding, of 5.8 km between others of 55 m, decides the log-likelihood of `cmanp tiles`
along the tracks: without it that is {:.3f} ± {:.3f}, and {:.3f} ± {:.3f} for the local GP."""


def readme_table() -> str:
    """Return the table of README.md: who is how good at what, and at what price."""
    terrain = {
        row['method']: row
        for row in rows('terrain')
        if row['noise'] == 0 and row['N'] == COMPARED_CONTEXT
    }
    tracks, clean = (
        {row['method']: row for row in rows('tracks') if row['kind'] == kind}
        for kind in ('all', 'no blunder')
    )
    head = ('', 'terrain: RMSE', 'log-lik.', 'tracks: RMSE', 'log-lik.', '90 % covers', 'keeps')
    lines = ['| ' + ' | '.join(head) + ' |', '| --- |' + ' ---: |' * 5 + ' --- |']
    for method, kept in KEPT.items():
        on_terrain, on_tracks = terrain.get(method, {}), tracks.get(method, {})
        scores = [on_terrain.get(name) for name in ('RMSE', 'log-likelihood')]
        scores += [on_tracks.get(name) for name in ('RMSE', 'log-likelihood', '90 % covers')]
        cells = ['-' if score is None else f'{score[0]:.3f} ± {score[1]:.3f}' for score in scores]
        lines.append('| ' + ' | '.join([method, *cells, kept]) + ' |')
    ours, peer = (clean[name]['log-likelihood'] for name in ('cmanp tiles', 'local GP'))
    return '\n'.join(lines) + BLUNDER.format(*ours, *peer)


def main():
    """Write both pages, and the picture."""
    draw_real(ROOT / 'docs' / 'images' / 'real.png')
    (ROOT / 'docs' / 'accuracy.md').write_text(page(), encoding='utf-8')
    path = ROOT / 'README.md'
    before, rest = path.read_text(encoding='utf-8').split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f'{before}{BEGIN}\n\n{readme_table()}\n\n{END}{after}', encoding='utf-8')


if __name__ == '__main__':
    main()
