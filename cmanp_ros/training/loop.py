"""
Train a field model: resumable, one optimizer step for each batch, log beside the checkpoint.
"""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import cos, pi
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from cmanp_ros.checkpoint import save_model
from cmanp_ros.core import CMANP, CMANPConfig
from cmanp_ros.core.attention import AttentionSums
from cmanp_ros.core.blending import blend
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.core.lattice import Cover
from cmanp_ros.core.model import Decoded, Prior
from cmanp_ros.core.world import AT_ONCE, groups
from cmanp_ros.training.batches import Batch, Batches, augment


@dataclass(frozen=True)
class TrainingConfig:
    """
    What to train, on how much, into which folder.
    """

    folder: str
    steps: int = 10_000
    num_batches: int = 2_000
    """Distinct batches; each comes back mirrored and swapped."""
    batch_size: int = 8
    """Worlds in each."""
    max_context: int = 1200
    num_target: int = 48
    learning_rate: float = 1e-3
    warmup: int = 300
    seed: int = 0
    workers: int = 1
    """Processes that make batches."""

    def __post_init__(self):
        for name in ('steps', 'num_batches', 'batch_size', 'max_context', 'num_target'):
            if getattr(self, name) < 1:
                raise ConfigError(f'{name} is {getattr(self, name)}, expected at least 1')


def train(
    model_config: CMANPConfig,
    config: TrainingConfig,
    on_step: Callable[[int, float], bool | None] = lambda step, loss: None,
) -> Path:
    """
    Train from scratch, or go on where the folder's last checkpoint stands.

    :param on_step: called after every step with its number and loss; True stops cleanly.
    :return: the model file.
    """
    folder = Path(config.folder)
    _check(folder, model_config, config)
    torch.manual_seed(config.seed)
    model = CMANP(model_config)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=1e-2)
    start, seconds = _resume(folder, model, optimizer)
    batches = Batches(
        model_config,
        folder / 'batches',
        config.num_batches,
        config.batch_size,
        config.max_context,
        config.num_target,
        config.seed,
    )
    order = _order(config)[start : config.steps]
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        multiprocessing_context='spawn' if config.workers else None,
    )
    model.train()
    started, stop = time.monotonic() - seconds, False
    for step, tensors in enumerate(loader, start + 1):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss = -_soften(batch_log_likelihood(model, augment(Batch(**tensors), generator))).mean()
        for group in optimizer.param_groups:
            group['lr'] = config.learning_rate * _schedule(step, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        stop = bool(on_step(step, loss.item()))
        _log(folder, step, loss.item(), time.monotonic() - started)
        if step % 250 == 0 or step == config.steps or stop:
            _save(folder, model, optimizer, step, time.monotonic() - started, config)
        if stop:
            break
    return folder / 'model.safetensors'


def command(config: TrainingConfig) -> str:
    """Return the command line that trains with this configuration."""
    options = (f'--{k.replace("_", "-")} {v}' for k, v in asdict(config).items() if k != 'workers')
    return f'cmanp train {" ".join(options)}'


def _check(folder, model_config, config):
    """
    Refuse what cannot be trained, and a folder in which something else was.

    :raises ConfigError: saying what differs.
    """
    if model_config.dim_y != 1:
        raise ConfigError(f'a model with dim_y {model_config.dim_y}: expected dim_y 1')
    free = ('folder', 'workers', 'steps')
    fixed = {k: v for k, v in asdict(config).items() if k not in free}
    settings = json.loads(json.dumps({'model': model_config.to_dict(), 'training': fixed}))
    path = folder / 'settings.json'
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1))
    elif (found := json.loads(path.read_text())) != settings:
        differing = [
            f'{key} is {settings[part].get(key)!r}, was {found[part].get(key)!r}'
            for part in settings
            for key in settings[part] | found[part]
            if settings[part].get(key) != found[part].get(key)
        ]
        raise ConfigError(
            f'{folder} holds another training: {"; ".join(differing)}. Use another folder, or '
            'the settings of that one'
        )


def batch_log_likelihood(model: CMANP, batch: Batch) -> torch.Tensor:
    """
    Return the log-likelihood of each target, with gradients for everything but the regressions.
    """
    y = batch.y_target.double()
    if not len(batch.pair_tile):  # nothing was observed in any of the worlds
        return torch.distributions.Normal(0.0, 1.0).log_prob(y)
    num_tiles = int(batch.pair_tile.max()) + 1
    parts, order = [], []
    for tiles, points, mask in groups(batch.point_tile, AT_ONCE):
        tokens = model.embed(batch.point_x[points], batch.point_y[points])
        parts.append(model.encoder.fold(tokens, mask))
        order.append(tiles)
    place = torch.empty(num_tiles, dtype=torch.int64)
    place[torch.cat(order)] = torch.arange(num_tiles)  # every tile has points
    sums = AttentionSums(*(torch.cat(part)[place] for part in zip(*parts, strict=True)))
    latents = model.latents(sums)

    has_prior = model.config.least_squares is not None
    found, order = [], []
    for tiles, pairs, mask in groups(batch.pair_tile, AT_ONCE):
        prior = Prior(*(part[pairs] for part in batch.prior)) if has_prior else None
        answers = model.decode([z[tiles] for z in latents], batch.pair_x[pairs], prior)
        found.append([part[mask] for part in answers])
        order.append(pairs[mask])
    place = torch.cat(order).argsort()
    answers = Decoded(*(torch.cat(part)[place] for part in zip(*found, strict=True)))
    cover = Cover(
        batch.pair_target, batch.pair_level[:, None], batch.pair_x, batch.pair_window.double()
    )
    mixture = blend(cover, answers, len(batch.y_target), model.config.num_levels)
    return torch.distributions.Normal(mixture.mean, mixture.stddev).log_prob(y)


def _soften(log_likelihood):
    """
    Compress what lies far below -10: one target must not decide on a whole step.
    """
    excess = (-10 - log_likelihood).clamp(min=0)
    return log_likelihood + excess - 10 * torch.log1p(excess / 10)


def _order(config):
    """
    Return the batch of every step: all of them shuffled, again and again.
    """
    epochs = -(-config.steps // config.num_batches)
    order = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(config.seed + epoch)
        order += torch.randperm(config.num_batches, generator=generator).tolist()
    return order


def _schedule(step, config):
    warm = min(step / config.warmup, 1)
    return warm * 0.5 * (1 + cos(pi * min(step / config.steps, 1)))


def _save(folder, model, optimizer, step, seconds, config):
    tensors = {f'model.{name}': value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()['state'].items():
        tensors |= {f'optimizer.{index}.{name}': value for name, value in state.items()}
    partial = folder / 'last.partial'
    progress = {'step': step, 'seconds': seconds}
    save_file(tensors, partial, {'progress': json.dumps(progress)})
    partial.replace(folder / 'last.safetensors')
    named = replace(config, folder=folder.name)  # no paths of the machine that trained
    line = command(named) + ' --attention-only' * (model.config.least_squares is None)
    extra = {'command': line, 'training': asdict(named), **progress}
    save_model(model, folder / 'model.safetensors', extra)


def _resume(folder, model, optimizer):
    path = folder / 'last.safetensors'
    if not path.is_file():
        return 0, 0.0
    tensors = load_file(path)
    model.load_state_dict(
        {k.removeprefix('model.'): v for k, v in tensors.items() if k.startswith('model.')}
    )
    state = {}
    for name, value in tensors.items():
        if name.startswith('optimizer.'):
            _, index, key = name.split('.')
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {'state': state})
    with safe_open(path, framework='pt') as file:
        progress = json.loads(file.metadata()['progress'])
    return progress['step'], progress['seconds']


def _log(folder, step, loss, seconds):
    path = folder / 'log.csv'
    is_new = not path.is_file()
    with path.open('a', newline='') as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(['step', 'loss', 'seconds'])
        writer.writerow([step, f'{loss:.5f}', f'{seconds:.1f}'])
