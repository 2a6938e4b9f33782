"""
Train a model: resumable to the same result, alone or in several processes.

A folder holds one training: `settings.json` (its recipe), `last.safetensors` (to go on from),
`model.safetensors` and `best.safetensors` (to predict with), `log.csv`.
"""

import atexit
import csv
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from math import cos, inf, pi
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from cmanp_ros.checkpoint import load_model, read_extra, save_model, usable_device
from cmanp_ros.core import CMANP
from cmanp_ros.core.errors import ConfigError
from cmanp_ros.training import distributed, priors
from cmanp_ros.training.batches import MapBatches, WorldBatches
from cmanp_ros.training.objectives import soften
from cmanp_ros.training.recipe import Recipe, WorldPrior

SAVE_EVERY = 250  # steps
NUM_HELD_OUT = 16  # batches


def train(
    recipe: Recipe,
    folder,
    on_step: Callable[[int, float, float | None], bool | None] = lambda *_: None,
    num_workers: int = 0,
    device: str = 'cpu',
    draw: Callable = priors.world_task,
    model: CMANP | None = None,
    command: str = '',
) -> Path:
    """
    Train from scratch, or go on where the folder's last checkpoint stands.

    :param on_step: called after every step with its number, its loss, and the loss on held-out
        tasks or None; True stops cleanly.
    :param num_workers: processes that make batches.
    :param draw: of one world, for recorded ones; its attribute `held_out`, where it has one, draws
        the tasks that are never trained on.
    :param model: the one to begin with, of the recipe's configuration; None: a new one.
    :param command: kept in the model file.
    :return: the model file.
    :raises ConfigError: for a folder in which something else was trained, or a device that cannot
        be used.
    """
    folder, part = Path(folder), distributed.start()
    device = usable_device(device)
    if recipe.batch_size % part[1]:
        raise ConfigError(
            f'batch_size is {recipe.batch_size}, expected a multiple of the {part[1]} processes'
        )
    is_first = part[0] == 0
    if is_first:
        _check(folder, recipe)
    distributed.wait()  # or others would make batches before the folder is checked
    torch.manual_seed(recipe.seed)
    model = (_new_model(recipe) if model is None else model).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    progress = _resume(folder, model, optimizer)
    if is_first:
        _forget_rows_after(folder, progress['step'])
    data = _batches(recipe, folder / 'batches', False, draw)
    held_out = _batches(recipe, folder / 'held_out', True, getattr(draw, 'held_out', draw))
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=data.order()[progress['step'] :],
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        multiprocessing_context='spawn' if num_workers else None,
        worker_init_fn=_set_up_worker,
    )
    board = _tensorboard(folder) if is_first else None
    model.train()
    is_logged = progress['step'] or (folder / 'log.csv').is_file()
    if recipe.start_from is not None and not is_logged:  # what there is to improve on
        validation = _validate(recipe, held_out, model, part)
        if is_first:
            _log(folder, board, 0, None, validation, 0.0)
    began = time.monotonic() - progress['seconds']
    for step, tensors in enumerate(loader, progress['step'] + 1):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        loss = _loss(recipe, data, model, tensors, generator, part)
        for group in optimizer.param_groups:
            group['lr'] = recipe.learning_rate * schedule(step, recipe)
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        distributed.average([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        is_last, validation = step == recipe.steps, None
        if step % recipe.validate_every == 0 or is_last:
            validation = _validate(recipe, held_out, model, part)
        stop = distributed.any_says(bool(on_step(step, loss.item(), validation)))
        progress |= {'step': step, 'seconds': time.monotonic() - began}
        if not is_first:
            if stop:
                break
            continue
        _log(folder, board, step, loss.item(), validation, progress['seconds'])
        if validation is not None or stop:
            extra = _provenance(recipe, progress, command, validation)
            save_model(model, folder / 'model.safetensors', extra)
        if validation is not None and validation < progress['best']:
            progress['best'] = validation
            save_model(model, folder / 'best.safetensors', extra)
        if step % SAVE_EVERY == 0 or is_last or stop:
            _save(folder, model, optimizer, progress)
        if stop:
            break
    if board is not None:
        board.close()
    distributed.stop()
    return folder / 'model.safetensors'


def schedule(step: int, recipe: Recipe) -> float:
    """
    Return the share of the learning rate: a linear warmup, then a cosine to 0.
    """
    warm = min(step / recipe.warmup, 1)
    return warm * 0.5 * (1 + cos(pi * min(step / recipe.steps, 1)))


def _new_model(recipe):
    model = CMANP(recipe.model)
    if recipe.start_from is not None:
        other = load_model(recipe.start_from)
        if other.config != recipe.model:
            ours, theirs = recipe.model.to_dict(), other.config.to_dict()
            differing = [key for key in ours if ours[key] != theirs[key]]
            raise ConfigError(
                f'start_from {recipe.start_from}: its {", ".join(differing)} are '
                f'{[theirs[key] for key in differing]}, the recipe has '
                f'{[ours[key] for key in differing]}; expected one model'
            )
        model.load_state_dict(other.state_dict())
    return model


def _set_up_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to workers, too
    atexit.register(_let_threads_end)


def _let_threads_end(seconds=1.0):
    """Give queues time: a thread that the end of Python meets within C++ may abort the process."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(seconds)


def _batches(recipe, folder, is_held_out, draw):
    if isinstance(recipe.prior, WorldPrior):
        return WorldBatches(recipe, folder, is_held_out, draw)
    return MapBatches(recipe, is_held_out)


def _loss(recipe, data, model, tensors, generator, part):
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == 'bfloat16'):
        found = data.log_likelihood(model, tensors, generator, part)
    return -soften(found).mean()


@torch.no_grad()
def _validate(recipe, held_out, model, part):
    """
    Return the loss on tasks that are never trained on, always the same.
    """
    model.eval()
    losses = []
    for index in range(min(NUM_HELD_OUT, len(held_out))):
        generator = torch.Generator().manual_seed(index)
        losses.append(_loss(recipe, held_out, model, held_out[index], generator, part))
    loss = torch.stack(losses).mean()
    distributed.average([loss])
    model.train()
    return loss.item()


def _check(folder, recipe):
    """
    Refuse a folder in which something else was trained.

    :raises ConfigError: saying what differs.
    """
    settings = recipe.to_dict()
    path = folder / 'settings.json'
    if not (path.is_file() and has_begun(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), encoding='utf-8')
        return
    found, wanted = _flat(json.loads(path.read_text(encoding='utf-8'))), _flat(settings)
    differing = [
        f'{key} is {wanted.get(key)!r}, was {found.get(key)!r}'
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise ConfigError(
            f'{folder} holds another training: {"; ".join(differing)}. Use another folder, or '
            'the settings of that one'
        )


def has_begun(folder: Path) -> bool:
    """
    Return whether a training has made batches or steps in a folder.
    """
    made = ('batches', 'held_out', 'log.csv', 'last.safetensors')
    return any((folder / name).exists() for name in made)


def _flat(values, prefix=''):
    found = {}
    for key, value in values.items():
        name = f'{prefix}{key}'
        found |= _flat(value, f'{name}.') if isinstance(value, dict) else {name: value}
    return found


def _provenance(recipe, progress, command, validation):
    return {
        'command': command,
        'recipe': recipe.to_dict(),
        'started_from': recipe.start_from and read_extra(recipe.start_from),
        'git_commit': git_commit(),
        'torch': torch.__version__,
        'held_out_log_likelihood': None if validation is None else -validation,
        'step': progress['step'],
        'seconds': progress['seconds'],
    }


@cache
def git_commit() -> str:
    """
    Return the commit of this package's repository, '+' if it was changed since; or 'unknown'.
    """
    here, found = Path(__file__).resolve(), []
    for words in (
        ('ls-files', '--error-unmatch', here.name),  # or it is the repository of somebody else
        ('rev-parse', 'HEAD'),
        ('status', '--porcelain', '--untracked-files=no'),
    ):
        command = ['git', '-C', str(here.parent), *words]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return 'unknown'
        found.append(run.stdout.strip())
    return found[1] + '+' * bool(found[2])


def _save(folder, model, optimizer, progress):
    tensors = {f'model.{name}': value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()['state'].items():
        tensors |= {f'optimizer.{index}.{name}': value for name, value in state.items()}
    partial = folder / 'last.partial'
    save_file(tensors, partial, {'progress': json.dumps(progress)})
    partial.replace(folder / 'last.safetensors')


def _resume(folder, model, optimizer):
    path = folder / 'last.safetensors'
    if not path.is_file():
        return {'step': 0, 'seconds': 0.0, 'best': inf}
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
        return json.loads(file.metadata()['progress'])


def _forget_rows_after(folder, step):
    """
    Drop rows of the log that a crash left of steps which are taken again.
    """
    path = folder / 'log.csv'
    if path.is_file():
        head, *lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
        kept = [line for line in lines if int(line.split(',')[0]) <= step]
        path.write_text(head + ''.join(kept), encoding='utf-8')


def _tensorboard(folder):
    """
    Return a writer of TensorBoard's files, or None where it is not installed.
    """
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder / 'tensorboard'))
    return None


def _log(folder, board, step, loss, validation, seconds):
    path = folder / 'log.csv'
    is_new = not path.is_file()
    shown = ['' if value is None else f'{value:.5f}' for value in (loss, validation)]
    with path.open('a', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(['step', 'loss', 'held_out_loss', 'seconds'])
        writer.writerow([step, *shown, f'{seconds:.1f}'])
    for name, value in (('loss', loss), ('held_out_loss', validation)):
        if board is not None and value is not None:
            board.add_scalar(name, value, step)
