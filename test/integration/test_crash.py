"""
Crashes: a node under load is killed at random moments and started again, with its map.

CMANP_KILLS is how often each kind of map is killed; the default is for CI.
"""

import os
import shutil
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from cmanp_ros.srv import SaveState
from conftest import wait_for
from driving import driver_in, node_process

from cmanp_ros.checkpoint import map_from_bytes
from cmanp_ros.demo.processes import own_domain
from cmanp_ros.field import NeuralField

KILLS = int(os.environ.get('CMANP_KILLS', 2))
PERIOD_SEC = 0.3  # of saving; kills are at moments within three of them
BOUNDS = (-25.0, -25.0), (25.0, 25.0)
NUM_LEVELS, VOXELS = 3, 15  # along each axis of a tile; above the finest it spans 1.5 spacings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 40 * KILLS)]


def points_of_levels(keys, voxel_counts):
    """
    Return how many points each level holds; tiles that overlap hold the same.

    Every other one of the finest tiles begins where the last one ends: four sets, in each of which
    is every point. Coarser ones overlap by whole voxels, and have the same in each of these.

    :param voxel_counts: (tiles, VOXELS**2).
    """
    finest = {(i, j): 0.0 for i in (0, 1) for j in (0, 1)}
    of_level, spacing = [{} for _ in range(NUM_LEVELS)], round(VOXELS / 1.5)  # in voxels
    for (level, *tile), counts in zip(keys, voxel_counts, strict=True):
        if level == 0:
            finest[tile[0] % 2, tile[1] % 2] += counts.sum()
            continue
        counts = counts.reshape(VOXELS, VOXELS)
        for voxel in zip(*counts.nonzero(), strict=True):
            place = tuple(spacing * k + int(i) for k, i in zip(tile, voxel, strict=True))
            count = of_level[level].setdefault(place, counts[voxel])
            assert count == counts[voxel], 'torn'
    assert len(set(finest.values())) == 1, 'torn'
    return [finest[0, 0], *(sum(counts.values()) for counts in of_level[1:])]


class Content:
    """What a map holds, to the bit."""

    def __init__(self, keys, state, header):
        """Take what `NeuralField.exported` or `map_from_bytes` return."""
        self.num_observations, self.robots = header['num_observations'], header['robots']
        tensors = {} if state is None else state.tensors()
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.tiles = (
            [keys[i] for i in order],
            {name: tensor[order].numpy().tobytes() for name, tensor in tensors.items()},
        )
        if keys:
            points = points_of_levels(keys, tensors['least_squares.voxel_count'].numpy())
            assert points == [self.num_observations] * NUM_LEVELS, 'torn'

    def __eq__(self, other):
        return vars(self) == vars(other)


def of_file(path, model) -> Content:
    """Read a saved map, all of which is verified."""
    return Content(*map_from_bytes(path.read_bytes(), model, path))


def of_store(path, folder) -> Content:
    """Read a copy of a store as a process left it, with its log."""
    for part in path.parent.glob(f'{path.name}*'):
        shutil.copy(part, folder)
    field = NeuralField.load(bounds=BOUNDS, store=folder / path.name)
    try:
        return Content(*field.exported())
    finally:
        field.close()


@contextmanager
def running(folder, **parameters):
    """Start a node; return it and a driver who is connected to it."""
    with (
        own_domain() as domain_id,
        node_process(
            folder,
            domain_id,
            sources=['points'],
            status_rate=10.0,
            calibration_period=0.0,
            state_directory=folder / 'maps',
            **parameters,
        ) as node,
        driver_in(domain_id) as driver,
    ):
        driver.wait_until_ready()
        yield node, driver


def saved_by(driver, folder, model) -> Content:
    """Have the node save its map under another name, and read that."""
    request = SaveState.Request(name='now', overwrite=True)
    future = driver.connect(SaveState, 'save_state', request)(request)
    wait_for(future.done)
    assert future.result().success, future.result().message
    return of_file(folder / 'maps' / 'now.safetensors', model)


def kill_again_and_again(folder, read, seed, **parameters):
    """
    Kill a node under load, and compare the map it begins with to what `read` finds before.

    :return: the number of observations at each start.
    """
    model, random = NeuralField.load(bounds=BOUNDS).model, np.random.default_rng(seed)
    num_sent, counts, num_half_written, left = 0, [], 0, set()
    for kill in range(KILLS + 1):
        saved = read(model)
        with running(folder, **parameters) as (node, driver):
            begun = saved_by(driver, folder, model)
            assert saved is None or begun == saved, f'start {kill}: another map'
            assert begun.num_observations <= num_sent
            assert not left & {*folder.glob('maps/.*')}, 'half a file is left over'
            counts.append(begun.num_observations)
            with driver.driving(20.0, 200):
                wait_for(lambda: driver.counts('points').folded)
                threading.Event().wait(random.uniform(0, 3 * PERIOD_SEC))
                node.kill()
            num_sent += driver.num_points
        left = {*folder.glob('maps/.*')}
        num_half_written += len(left)
    print(f'\n{KILLS} kills, {num_half_written} while a file was written')
    print(f'{num_sent} points sent, observations at each start: {counts}')
    return counts


def test_map_after_a_kill_is_the_one_saved_last(tmp_path):
    path = tmp_path / 'maps' / 'autosave.safetensors'
    counts = kill_again_and_again(
        tmp_path,
        lambda model: of_file(path, model) if path.exists() else None,
        seed=1,
        autosave_period=PERIOD_SEC,
        restore='autosave',
    )
    assert counts == sorted(counts) and counts[-1] > 0


def test_map_after_a_kill_is_the_one_in_the_store(tmp_path):
    path, copies = tmp_path / 'map.db', tmp_path / 'copies'
    copies.mkdir()
    counts = kill_again_and_again(
        tmp_path,
        lambda model: of_store(path, copies) if path.exists() else None,
        seed=2,
        store=path,
        store_period=PERIOD_SEC,
    )
    assert counts == sorted(counts) and counts[-1] > 0
