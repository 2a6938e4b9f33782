"""What is compared does the same work, and what is measured is what was done."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cmanp_ros.benchmark import measuring, peers, soak, studies
from cmanp_ros.benchmark.eager import EagerCMANP
from cmanp_ros.checkpoint import load_reference
from cmanp_ros.cli import bench
from cmanp_ros.core import CMANPConfig

SIZES = {'num_latents': 9, 'num_latents_per_block': 7, 'num_blocks': 2, 'dim_model': 16}
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
MB = 1 << 20


@pytest.fixture
def models():
    """Return our model and the eager one, of the same weights."""
    config = CMANPConfig.paper(2, 2, **SIZES, chunk_size=64)
    eager = EagerCMANP(config).eval().requires_grad_(False)
    return load_reference(eager.state_dict(), config), eager


def points(count, dim_y=2):
    return 4 * torch.rand(1, count, 2) - 2, torch.randn(1, count, dim_y)


@pytest.mark.parametrize('size', [1, 2, 10, 65, 300])
def test_eager_implementation_equals_ours(models, size):
    ours, eager = models
    first, new, at = points(50), points(size), points(20)[0]
    state = ours.update(ours.update(ours.init_state(1), *first), *new)
    other = eager.update(eager.condition(*first), *new)
    found, (mean, stddev) = ours.predict(state, at), eager.predict(other, at)
    torch.testing.assert_close(mean, found.mean, **CLOSE)
    torch.testing.assert_close(stddev, found.stddev, **CLOSE)
    for block in range(SIZES['num_blocks']):
        own = state.attention.logsumexp[:, block].float()
        torch.testing.assert_close(other.logsumexp[block], own, **CLOSE)
        own = state.attention.mean_value[:, block].float()
        torch.testing.assert_close(other.mean_value[block], own, **CLOSE)
    assert 2 * other.nbytes == state.nbytes - 8  # float32, and no count


def test_functions_are_timed_in_turn():
    called = []
    functions = {'a': lambda: called.append('a'), 'b': lambda: called.append('b')}
    found = list(measuring.measure('work', 7, functions, repeats=3))
    assert called == ['a', 'b'] * 4  # once for nothing
    assert [record['implementation'] for record in found] == ['a', 'b']
    for record in found:
        assert record['work'] == 'work'
        assert record['size'] == 7
        assert 0 <= record['median_s'] < 1
        assert record['spread_s'] >= 0


def test_peak_memory_is_that_of_the_call():
    def numbers(count):
        return lambda: float(torch.ones(count * MB // 8, dtype=torch.float64).sum())

    small, large = measuring.peak_bytes(numbers(1)), measuring.peak_bytes(numbers(100))
    if small is None:
        pytest.skip('Linux does not let the peak of a process be set back here')
    assert 95 * MB < large - small < 105 * MB


@pytest.mark.skipif(sys.platform != 'linux', reason='/proc names the children of a process')
def test_processes_that_any_thread_started_belong_to_a_process():
    with ThreadPoolExecutor(1) as thread:
        child = thread.submit(subprocess.Popen, ['sleep', '100']).result()
        try:
            assert {os.getpid(), child.pid} <= set(measuring.family(os.getpid()))
        finally:
            child.kill()
            child.wait()


def test_a_process_that_has_ended_has_no_memory():
    child = subprocess.Popen([sys.executable, '-c', ''])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays in the table
    assert child.pid in measuring.family(os.getpid())
    assert measuring.status_bytes('VmHWM', child.pid) == 0
    child.wait()


def test_what_is_called_apart_changes_nothing_here():
    seen = []
    result, _ = measuring.apart(lambda: (seen.append(1), len(seen))[1])
    assert result == 1
    assert seen == []


@pytest.mark.parametrize('name', studies.memories())
def test_peers_keep_what_they_are_given(name):
    peer = studies.memories()[name]
    chunks = [studies.points(30, seed) for seed in (1, 2, 3)]
    memory = peer.condition(chunks[:2])
    before = peer.nbytes(memory)
    after = peer.nbytes(peer.update(memory, *chunks[2]))
    assert before > 0
    if name != studies.TILES:  # points may open tiles
        keeps_all = name in ('LBANP-style', 'TNP-D-style', 'exact GP')
        assert (after > before) == keeps_all


def test_exact_gp_interpolates():
    x, y = studies.points(200)
    factor, weights = peers.ExactGP().condition([(x, y)])[1]
    known = peers.KERNEL(peers.distances(x.double().numpy(), x.double().numpy())) @ weights
    assert abs(known - y.numpy()).mean() < peers.KERNEL.noise


def test_slope_of_memory():
    times = [60.0 * minute for minute in range(1, 21)]
    found = soak.slope(times, [100 * MB + int(2 * MB * t / 60) for t in times])
    assert found['growth_bytes_per_min'] == pytest.approx(2 * MB, rel=1e-3)
    assert found['growth_error'] < 1e3


def test_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(studies, 'SEEN', (20, 40))
    monkeypatch.setattr(studies, 'CHUNK', 20)
    monkeypatch.setattr(studies, 'LONG_SEC', 0.0)
    output = tmp_path / 'new' / 'bench.json'
    assert bench.main(['condition', 'update', '--repeats', '2', '--output', str(output)]) == 0
    rate, *records = json.loads(output.read_text())
    assert rate['matrix_product_flops'] > 1e8
    assert {(r['work'], r['size']) for r in records} == {
        (work, size) for work in ('condition', 'update after') for size in (20, 40)
    }
    for record in records:
        keys = {'work', 'size', 'threads', 'implementation', 'median_s', 'spread_s', 'peak_bytes'}
        assert keys <= record.keys()
    assert {r['implementation'] for r in records} == set(studies.memories())
    assert output.with_suffix('.png').stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in studies.memories())


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['nonsense'], 'no study nonsense: expected some of paper,'),
        (['--threads', '0'], '--threads 0'),
        (['--repeats', '1'], '--repeats 1'),
    ],
)
def test_command_refuses_what_it_cannot_do(arguments, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err
