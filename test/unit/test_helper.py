"""A second process solves what a solver here solves, and is not there for longer than this one."""

import os
import signal
import subprocess
import sys
from select import select

import pytest
import torch
from small_models import build, field, paper

from cmanp_ros.checkpoint import save_model
from cmanp_ros.checkpoint import weights_hash as hash_of
from cmanp_ros.core import Lattice, OneTile, World
from cmanp_ros.helper import Helper, HelperError

TIMEOUT_SEC = 60.0


@pytest.fixture(params=['field', 'paper'])
def world(request, tmp_path):
    """Return a world with observations, and the file of its model."""
    config = {'field': field, 'paper': paper}[request.param]()
    model, path = build(config, torch.float32), tmp_path / 'model.safetensors'
    save_model(model, path)
    is_field = request.param == 'field'
    geometry = Lattice.of(config, 1.3) if is_field else OneTile((-4.0, -4.0), (4.0, 4.0))
    made = World(model, geometry)
    x = torch.rand(53, 2, dtype=torch.float64) * 6 - 3
    made.fold(x, torch.sin(x[:, :1]))
    return made, path


@pytest.fixture
def helper(world):
    """Return a helper that is ready."""
    helper = start(world)
    helper.begun.result(TIMEOUT_SEC)
    assert helper.is_ready
    yield helper
    helper.close()


def start(world, path=None, weights_hash=None):
    """Start a helper."""
    made, own = world
    return Helper(str(path or own), weights_hash or hash_of(made.model), made.geometry)


def test_a_helper_solves_as_this_process_does(world, helper):
    made, _ = world
    x_target = torch.rand(19, 2, dtype=torch.float64) * 6 - 3
    with torch.inference_mode():
        job = made.begin_refresh(made.tiles.keys())
        solution = helper.solve(job.request).result(TIMEOUT_SEC)
        made.end_refresh(job, solution)
        again = made.begin_refresh(made.tiles.keys())  # nothing is left to do
        assert not again.request.levels and not len(again.stale_rows)
        found = made.predict(x_target, renew=False)
        again = World(made.model, made.geometry)
        again.load(*made.export(), made.num_observations)
        for one, other in zip(found, again.predict(x_target), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_who_waits_for_a_helper_that_is_killed_is_told(world, helper):
    job = world[0].begin_refresh(world[0].tiles.keys())
    helper.process.send_signal(signal.SIGSTOP)
    future = helper.solve(job.request)
    helper.process.kill()
    with pytest.raises(HelperError, match='the second process ended'):
        future.result(TIMEOUT_SEC)


def test_who_waits_for_a_helper_that_does_not_answer_is_told(world, helper, monkeypatch):
    monkeypatch.setattr('cmanp_ros.helper.TIMEOUT_SEC', 0.1)
    helper.process.send_signal(signal.SIGSTOP)
    future = helper.solve(world[0].begin_refresh(world[0].tiles.keys()).request)
    with pytest.raises(HelperError, match='no answer within 0.1 s'):
        future.result(TIMEOUT_SEC)


def test_a_fault_of_a_helper_is_that_of_who_asked_and_it_goes_on(world, helper):
    job = world[0].begin_refresh(world[0].tiles.keys())
    wrong = job.request._replace(levels=None, attention=None)
    assert isinstance(helper.solve(wrong).exception(TIMEOUT_SEC), TypeError)
    assert helper.solve(job.request).result(TIMEOUT_SEC).latents


def test_a_helper_without_a_model_is_never_ready(world, tmp_path):
    helper = start(world, path=tmp_path / 'nowhere.safetensors')
    assert isinstance(helper.begun.exception(TIMEOUT_SEC), HelperError) and not helper.is_ready
    helper.close()


def test_a_helper_with_other_weights_is_never_ready(world):
    helper = start(world, weights_hash='of others')
    assert 'has other weights by now' in str(helper.begun.exception(TIMEOUT_SEC))
    helper.close()


def test_a_helper_ends_when_it_is_closed(world):
    helper = start(world)
    helper.begun.result(TIMEOUT_SEC)
    assert helper.process.poll() is None
    helper.close()
    assert helper.process.returncode is not None


SCRIPT = """
import signal
from cmanp_ros.checkpoint import load_model, weights_hash
from cmanp_ros.core import Lattice
from cmanp_ros.helper import Helper

# Whatever runs it is not run again.
helper = Helper('field', weights_hash(load_model('field')), Lattice(1.0, 2, 3, 3))
helper.begun.result()
print(helper.process.pid, flush=True)
signal.pause()
"""


def test_a_helper_does_not_outlive_a_process_that_is_killed(tmp_path):
    path = tmp_path / 'killed.py'
    path.write_text(SCRIPT)
    command, pipe, none = [sys.executable, path], subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdout=pipe, stderr=none, text=True) as process:
        helper = os.pidfd_open(int(process.stdout.readline()))  # readable once it has ended
        assert not select([helper], [], [], 0)[0]
        process.kill()
    assert select([helper], [], [], TIMEOUT_SEC)[0]
    os.close(helper)
