"""`cmanp train` as users run it: on recorded data, stopped and gone on with, alone and in two."""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cmanp_ros import cli, parameter_file
from cmanp_ros.checkpoint import load_model, save_model
from cmanp_ros.cli import train
from cmanp_ros.evaluation import tile_size
from cmanp_ros.training import recorded
from cmanp_ros.training.recipe import load_recipe

sys.path.append(str(Path(__file__).parent.parent / 'unit'))
import small_models  # noqa: E402

CMANP = [sys.executable, '-m', 'cmanp_ros.cli', 'train']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2']
TIMEOUT_SEC = 240  # of a busy computer
pytestmark = pytest.mark.timeout(4 * TIMEOUT_SEC)


@pytest.fixture
def files(tmp_path):
    """Write a recipe, the model that it goes on from, and a recorded track of 251 readings."""
    config = small_models.field(2)
    save_model(small_models.build(config, torch.float32), tmp_path / 'start.safetensors')
    recipe = {
        'model': config.to_dict(),
        'prior': {'worlds': {'num_batches': 3, 'max_context': 11, 'num_target': 5}},
        'start_from': str(tmp_path / 'start.safetensors'),
        'steps': 7,
        'batch_size': 2,
        'warmup': 2,
        'validate_every': 1,
    }
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    angle = np.linspace(0, 40, 251)
    x = (angle[:, None] / 4) * np.stack([np.cos(angle), np.sin(angle)], 1)
    write(tmp_path / 'gas.csv', np.column_stack([x, 7 + 3 * np.sin(x[:, 0])]))
    return tmp_path


def write(path, rows):
    np.savetxt(path, rows, delimiter=',', header='x,y,gas', comments='')


def arguments(files, *others, folder='folder', data='gas.csv'):
    words = [str(files / 'recipe.yaml'), '--folder', str(files / folder)]
    return [*words, '--data', str(files / data), '--source', ':gas', *others]


def run(command):
    found = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SEC)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def steps(folder):
    with open(folder / 'log.csv') as file:
        return [int(row['step']) for row in csv.DictReader(file)]


def stopped(command, signal_, to_all):
    """Start a training, stop it after a step, and return what it said then."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if line.startswith('step '):
                break
        (os.killpg if to_all else os.kill)(process.pid, signal_)
        output, _ = process.communicate(timeout=TIMEOUT_SEC)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    return output


@pytest.mark.parametrize(
    'signal_, to_all, workers', [(signal.SIGTERM, False, '0'), (signal.SIGINT, True, '1')]
)
def test_a_training_stops_cleanly_and_goes_on_where_it_was(files, signal_, to_all, workers):
    """Ctrl-C in a terminal reaches the workers, too."""
    command = [*CMANP, *arguments(files, '--tile-size', '2', '--workers', workers)]
    command += ['--steps', '100000']
    done = []
    for _ in range(2):
        output = stopped(command, signal_, to_all)
        assert 'Traceback' not in output and 'Error' not in output, output
        assert output.endswith(f'stopped; the same command goes on: {files / "folder"}\n')
        done.append(steps(files / 'folder'))
        assert done[-1] == list(range(len(done[-1])))
    assert len(done[1]) > len(done[0]) > 1


def test_the_end_says_what_was_gained_and_how_a_node_uses_it(files):
    command = [*CMANP, *arguments(files, '--tile-size', '2.5')]
    output = run(command)
    found = re.search(
        r'per held-out target, 6 tasks: (\S+) before \(.*start\.safetensors\), (\S+) after: '
        r'(\S+) \+- (\S+)\ntraining (helped|made)',
        output,
    )
    before, after, difference, _ = map(float, found.groups()[:4])
    assert difference == pytest.approx(after - before, abs=2e-3)
    parameters = parameter_file.read(files / 'folder' / 'parameters.yaml')
    assert parameters.checkpoint == str((files / 'folder' / 'model.safetensors').resolve())
    assert parameters.value_offset == pytest.approx(7, abs=3) and parameters.value_scale > 0.5
    assert output.endswith(f'value_scale: {parameters.value_scale}\n')
    assert parameters.tile_size == 2.5 and 'tiles of 2.5 m' in output
    assert load_model(parameters.checkpoint).config == small_models.field(2)
    assert steps(files / 'folder') == list(range(8))
    again = run(command)
    assert again.splitlines()[-7:] == output.splitlines()[-7:] and 'step 1' not in again


def test_a_tile_size_is_proposed_once_and_comes_from_the_parameters_first(files, monkeypatch):
    def recorded_as(*others):
        options = train._parser().parse_args(arguments(files, *others))
        return train._recorded(options, load_recipe(options.recipe), print)

    monkeypatch.setattr(tile_size, 'candidate_sizes', lambda x: [2.25])
    worlds, facts = recorded_as()
    assert facts['tile_size'] == 2.25
    recorded.keep(files / 'folder', facts)
    monkeypatch.setattr(tile_size, 'propose', lambda *_: pytest.fail('proposed again'))
    assert recorded_as()[1] == facts
    _, others = recorded_as('-p', 'tile_size:=3.0', '-p', 'value_offset:=9.0')
    assert (others['tile_size'], others['value_offset'], others['value_scale']) == (3.0, 9.0, 1.0)


def test_two_processes_train_the_same_weights_as_one(files):
    alone = run([*CMANP, *arguments(files, '--tile-size', '2', folder='alone')])
    both = run([*TORCHRUN, '-m', 'cmanp_ros.cli', 'train', *arguments(files, '--tile-size', '2')])
    assert both.count('trained: ') == alone.count('trained: ') == 1
    assert both.count('step 7:') == 1
    found, expected = (
        load_model(files / name / 'model.safetensors').state_dict() for name in ('folder', 'alone')
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


LEAVES = """
import os
import torch
from cmanp_ros.training import distributed

distributed.start()
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.AdamW([parameter], 1e-3)
parameter.sum().backward()
distributed.average([parameter.grad])
optimizer.step()
for when in ('in', 'after'):
    names = [open(f'/proc/self/task/{id_}/comm').read() for id_ in os.listdir('/proc/self/task')]
    count = sum('gloo' in name for name in names)
    os.write(1, f'{when} {count};'.encode())  # at once: torchrun's processes are not buffered
    distributed.stop()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc names the threads of a process')
def test_no_thread_of_a_group_outlives_it(tmp_path):
    """One that the end of Python meets aborts the process."""
    (tmp_path / 'leaves.py').write_text(LEAVES)
    output = run([*TORCHRUN, str(tmp_path / 'leaves.py')])
    counts = dict.fromkeys(['in', 'after'], 0)
    for when, count in re.findall(r'(in|after) (\d+);', output):
        counts[when] += int(count)
    assert counts['in'] >= 2 and counts['after'] == 0, output


def fails(capsys, words):
    """Run the command in this process, and return what it says."""
    assert cli.main(['train', *words]) == 1
    return capsys.readouterr().err


def test_data_that_cannot_be_trained_on_is_refused(files, capsys):
    rows = np.loadtxt(files / 'gas.csv', delimiter=',', skiprows=1)
    write(files / 'few.csv', rows[:49])
    assert '49 usable observations: expected at least 50' in fails(
        capsys, arguments(files, data='few.csv')
    )
    write(files / 'flat.csv', rows * [1, 1, 0])
    assert 'all 251 values are 0: expected a field that varies' in fails(
        capsys, arguments(files, data='flat.csv')
    )
    assert 'nowhere.csv is not there; expected a bag' in fails(
        capsys, arguments(files, data='nowhere.csv')
    )
    assert 'tile_size is -1.0, expected a positive length' in fails(
        capsys, arguments(files, '--tile-size', '-1')
    )
    assert not (files / 'folder').exists()


def test_rows_that_are_not_finite_are_counted_aloud(files, capsys):
    rows = np.loadtxt(files / 'gas.csv', delimiter=',', skiprows=1)
    rows[[3, 5], 2] = np.nan
    write(files / 'some.csv', rows[:51])
    fails(capsys, arguments(files, data='some.csv'))
    rows[:, 2] = np.nan
    rows[0, 2] = 1
    write(files / 'none.csv', rows)
    assert '1 usable observations: expected at least' in fails(
        capsys, arguments(files, data='none.csv')
    )


def test_options_of_data_need_data_and_data_needs_a_recipe_of_worlds(files, capsys):
    recipe = [str(files / 'recipe.yaml'), '--folder', str(files / 'folder')]
    assert fails(capsys, [*recipe, '--source', ':gas', '-p', 'a:=1']).startswith(
        'cmanp train: --source, -p without --data: expected the recordings, too'
    )
    assert 'gp1d_attention, whose prior is maps: expected one with' in fails(
        capsys, ['gp1d_attention', *arguments(files)[1:]]
    )
    assert not (files / 'folder').exists()


def test_shipped_recipes_of_worlds_are_for_the_default_model():
    for name, start in (('field', None), ('fine_tune', 'field')):
        recipe = load_recipe(name)
        assert recipe.model == load_model('field').config and recipe.start_from == start
