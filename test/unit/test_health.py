"""Every way to be stuck has a name; calibration is counted exactly, in constant memory."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cmanp_ros.health import (
    ENOUGH_POINTS,
    STATES,
    Calibration,
    ClockView,
    Counts,
    Coverage,
    Level,
    Publisher,
    Recent,
    Snapshot,
    Source,
    TopicView,
    judge,
    verdict_from_text,
)

CLOUD = 'sensor_msgs/msg/PointCloud2'
LIDAR = Publisher('/lidar/driver', CLOUD, 'best effort, volatile')
FLOWING = Counts(received=7, folded=7)


def source(name='points', publishers=(LIDAR,), similar=(), age_sec=0.2, **kwargs):
    """Return a source through which messages come, unless something else is asked for."""
    view = TopicView(f'/{name}', CLOUD, tuple(publishers), tuple(similar))
    return Source(name, view, **{'age_sec': age_sec, 'messages': FLOWING, **kwargs})


def snapshot(*sources, **kwargs):
    """Return a node that folds, unless something else is asked for."""
    working = {'points': Counts(101, 101), 'num_folded': 101, 'idle_sec': 0.1}
    return Snapshot(sources=sources or (source(),), **{**working, **kwargs})


def nothing_folded(*sources, **kwargs):
    """Return a node that has folded nothing yet."""
    return snapshot(*sources, **{'points': Counts(), 'num_folded': 0, 'idle_sec': None, **kwargs})


def rejected(**reasons):
    """Return counts of what was received and all rejected."""
    return Counts(sum(reasons.values()), 0, reasons)


HALTED = ClockView(use_sim_time=True, has_publisher=False, is_running=False)
QOS = 'best effort publisher and reliable subscription'
SITUATIONS = {
    'no_node': (snapshot(lifecycle=None), ('/cmanp', 'ros2 launch', 'ROS_DOMAIN_ID')),
    'no_answer': (snapshot(lifecycle=''), ('does not answer',)),
    'not_active': (snapshot(lifecycle='inactive'), ('inactive', 'set /cmanp activate')),
    'paused': (snapshot(paused=True), ('/cmanp/pause',)),
    'no_sources': (snapshot(source(enabled=False)), ('parameter sources',)),
    'clock_not_running': (
        nothing_folded(source(publishers=()), clock=HALTED),
        ('use_sim_time is true', '/clock', '--clock'),
    ),
    'no_publisher': (
        nothing_folded(source(publishers=(), similar=['/lidar/points'])),
        ("nothing publishes on '/points'", CLOUD, 'remap points:=/lidar/points'),
    ),
    'wrong_type': (
        nothing_folded(source(publishers=[Publisher('/scan', 'sensor_msgs/msg/LaserScan')])),
        ('sensor_msgs/msg/LaserScan from /scan', CLOUD, 'laser_geometry'),
    ),
    'incompatible_qos': (
        nothing_folded(source(publishers=[dataclasses.replace(LIDAR, conflict=QOS)])),
        (QOS, '/lidar/driver', "points.reliability to 'best_effort'"),
    ),
    'no_messages': (
        nothing_folded(source(age_sec=None, messages=Counts())),
        ("nothing has come on '/points' yet", '/lidar/driver', 'ros2 topic hz /points'),
    ),
    'no_transform': (
        nothing_folded(pending_transforms={'lidar': 12.3, 'imu': 2.0}),
        ("'map' <- 'lidar'", '12.3 s'),
    ),
    'field_missing': (
        nothing_folded(source(messages=rejected(missing_field=7), example='fields x, y, z')),
        ('7 rejected', 'fields x, y, z', 'value_field'),
    ),
    'all_outside': (
        snapshot(points=rejected(outside_workspace=53, not_finite=2)),
        ('53 rejected', 'bounds_min'),
    ),
    'no_points': (
        snapshot(source(messages=Counts(9, 9)), points=Counts(), num_folded=0),
        ('no point is in any', 'its range'),
    ),
    'all_thinned': (snapshot(points=rejected(thinned=53)), ('53 points', 'voxels')),
    'all_rejected': (
        snapshot(source(messages=rejected(odd=7), example='it is odd')),
        ('odd', 'it is odd', 'correct what is published'),
    ),
    'overloaded': (
        snapshot(num_dropped=5, queue_length=10, latency_sec=3.2),
        ('5 messages dropped', '10 wait', '3.2 s', 'max_processes'),
    ),
    'tiles_dropped': (snapshot(tiles_dropped=11), ('11 tiles', 'store')),
    'not_saved': (
        snapshot(save_fault='no space left'),
        ('in memory only', 'no space left', 'make room'),
    ),
    'peer_refused': (
        snapshot(peer_fault={'/r2/state': 'it is damaged: reset it'}),
        ("'/r2/state'", 'it is damaged', 'reset it'),
    ),
    'overconfident': (
        snapshot(coverage=Coverage(0.2, 0.61, 900)),
        ('61%', '90 % interval', 'value_scale'),
    ),
    'underconfident': (snapshot(coverage=Coverage(0.9, 0.999, 900)), ('100%', 'value_scale')),
    'idle': (
        snapshot(source(publishers=()), idle_sec=37.0),
        ('37 s', '101 observations', "nothing publishes on '/points'"),
    ),
    'folding': (snapshot(), ('101 observations',)),
}


@pytest.mark.parametrize('state', STATES)
def test_situation_is_named_and_says_what_to_do(state):
    facts, words = SITUATIONS[state]
    verdict = judge(facts)
    assert (verdict.state, verdict.level) == (state, STATES[state])
    for word in words:
        assert word in verdict.text
    assert bool(verdict.way_out) == (verdict.level != Level.OK)
    assert '\n' not in verdict.text


def test_a_map_that_is_not_saved_is_named_though_nothing_new_comes():
    facts, _ = SITUATIONS['idle']
    verdict = judge(dataclasses.replace(facts, save_fault='no space left'))
    assert (verdict.state, verdict.level) == ('not_saved', Level.ERROR)


def test_a_peer_that_is_refused_is_named_though_nothing_new_comes():
    facts = snapshot(source(age_sec=30.0), peer_fault={'/r2/state': 'it is damaged: reset it'})
    assert judge(facts).state == 'peer_refused'


@pytest.mark.parametrize(
    ('reason', 'way_out'), [('not_stored', 'store writable'), ('too_near', 'min_range')]
)
def test_what_is_not_the_fault_of_a_publisher_is_not_corrected_there(reason, way_out):
    verdict = judge(snapshot(points=rejected(**{reason: 7})))
    assert verdict.state == 'all_rejected' and way_out in verdict.text
    assert 'what is published' not in verdict.text


def test_every_state_has_a_section_in_the_documentation():
    page = Path(__file__).parents[2] / 'docs' / 'troubleshooting.md'
    if not page.is_file():
        pytest.skip('not in the source tree')
    titles = [line[4:] for line in page.read_text().splitlines() if line.startswith('### ')]
    assert titles == list(STATES)


def test_what_stops_everything_comes_first():
    """All is wrong at once; it is named in this order as one after the other is repaired."""
    repairs = [
        ('no_node', {'lifecycle': 'unconfigured'}),
        ('not_active', {'lifecycle': 'active'}),
        ('paused', {'paused': False}),
        ('clock_not_running', {'clock': ClockView(True, True, True)}),
        ('no_publisher', {'sources': (source(publishers=[Publisher('/x', 'a/msg/B')]),)}),
        (
            'wrong_type',
            {'sources': (source(publishers=[dataclasses.replace(LIDAR, conflict=QOS)]),)},
        ),
        ('incompatible_qos', {'sources': (source(age_sec=None),)}),
        ('no_messages', {'sources': (source(messages=rejected(missing_field=3)),)}),
        ('field_missing', {'sources': (source(),)}),
        ('no_transform', {'pending_transforms': {}, 'points': rejected(outside_workspace=3)}),
        ('all_outside', {'points': Counts(9, 9), 'num_folded': 9}),
        ('not_saved', {'save_fault': ''}),
        ('overloaded', {'num_dropped': 0}),
        ('tiles_dropped', {'tiles_dropped': 0}),
        ('peer_refused', {'peer_fault': {}}),
        ('overconfident', {'coverage': Coverage(0.5, 0.9, 900)}),
        ('folding', {}),
    ]
    facts = nothing_folded(
        source(publishers=()),
        lifecycle=None,
        paused=True,
        clock=HALTED,
        pending_transforms={'lidar': 1.0},
        num_dropped=3,
        tiles_dropped=3,
        save_fault='full',
        peer_fault={'/a': 'b'},
        coverage=Coverage(0.1, 0.1, 900),
    )
    for state, repair in repairs:
        assert judge(facts).state == state
        facts = dataclasses.replace(facts, **repair)


def test_of_sources_that_are_stuck_the_one_that_came_furthest_is_named():
    unused = source('observations', publishers=())
    broken = source(messages=rejected(missing_field=7))
    for sources in ((unused, broken), (broken, unused)):
        verdict = judge(nothing_folded(*sources))
        assert verdict.state == 'field_missing' and 'observations' not in verdict.text


def test_sources_stuck_alike_are_named_together():
    verdict = judge(
        nothing_folded(
            source(publishers=(), similar=['/a', '/b']), source('observations', publishers=())
        )
    )
    assert verdict.state == 'no_publisher'
    for word in ("'/points'", "'/observations'", 'remap points:=/a', '/b', 'observations.topic'):
        assert word in verdict.text


def test_working_node_lists_sources_that_are_silent():
    verdict = judge(snapshot(source(), source('sonar', publishers=())))
    assert (verdict.state, verdict.level) == ('folding', Level.OK)
    assert "besides, sonar: nothing publishes on '/sonar'" in verdict.text
    assert 'points' not in verdict.text


def test_working_node_with_a_mistake_in_another_source_is_a_warning():
    wrong = source('sonar', publishers=[Publisher('/x', 'a/msg/B')])
    verdict = judge(snapshot(source(), wrong))
    assert (verdict.state, verdict.level) == ('folding', Level.WARN)
    assert 'sonar: ' in verdict.text and 'a/msg/B' in verdict.text


@pytest.mark.parametrize(
    ('published', 'words'),
    [
        ('sensor_msgs/msg/Range', ('set points.type', 'points.value_field')),
        ('cmanp_ros/msg/Observations', ('set points.type',)),
    ],
)
def test_wrong_type_is_used_as_it_can_be(published, words):
    verdict = judge(nothing_folded(source(publishers=[Publisher('/x', published)])))
    assert verdict.state == 'wrong_type' and all(word in verdict.way_out for word in words)
    assert ('value_field' in verdict.way_out) == ('points.value_field' in words)


def test_source_that_is_not_enabled_is_not_missed():
    verdict = judge(snapshot(source(), source('sonar', publishers=(), enabled=False)))
    assert 'sonar' not in verdict.text


def test_one_usable_publisher_is_enough():
    others = [Publisher('/x', 'a/msg/B'), dataclasses.replace(LIDAR, conflict=QOS), LIDAR]
    assert judge(snapshot(source(publishers=others))).state == 'folding'


def test_source_that_fell_silent_says_since_when():
    verdict = judge(nothing_folded(source(age_sec=31.0)))
    assert verdict.state == 'no_messages' and 'for 31 s' in verdict.text


def test_fault_after_good_times_is_named_and_not_idle():
    verdict = judge(snapshot(source(messages=rejected(missing_field=7)), idle_sec=60.0))
    assert verdict.state == 'field_missing'


@pytest.mark.parametrize('reason', ['paused', 'disabled', 'rate_limited'])
def test_what_somebody_wanted_is_no_fault(reason):
    assert judge(nothing_folded(source(messages=rejected(**{reason: 3})))).state == 'folding'


@pytest.mark.parametrize('within_90', [0.75, 0.9, 0.98])
def test_calibrated_map_is_healthy(within_90):
    assert judge(snapshot(coverage=Coverage(0.5, within_90, 900))).state == 'folding'


def test_calibration_is_not_judged_by_a_few_points():
    few = Coverage(0.0, 0.0, ENOUGH_POINTS - 1)
    assert judge(snapshot(coverage=few)).state == 'folding'


def test_simulated_time_that_stands_does_not_hide_a_node_that_folds():
    verdict = judge(snapshot(clock=HALTED))
    assert (verdict.state, verdict.level) == ('folding', Level.WARN)
    assert 'use_sim_time is true' in verdict.text


def test_simulated_time_that_stands_is_told_from_one_that_is_missing():
    standing = ClockView(use_sim_time=True, has_publisher=True, is_running=False)
    verdict = judge(nothing_folded(source(publishers=()), clock=standing))
    assert verdict.state == 'clock_not_running' and 'stands still' in verdict.text


def test_other_nodes_are_proposed():
    verdict = judge(snapshot(lifecycle=None, others=('/robot1/cmanp', '/mapper')))
    assert '--namespace /robot1 --name cmanp' in verdict.text
    verdict = judge(snapshot(lifecycle=None, others=('/mapper',)))
    assert '--namespace / --name mapper' in verdict.text


@pytest.mark.parametrize('state', STATES)
def test_verdict_survives_the_text_of_a_status(state):
    verdict = judge(SITUATIONS[state][0])
    read = verdict_from_text(str(verdict))
    assert (read.state, read.level, read.text) == (state, verdict.level, verdict.text)


@pytest.mark.parametrize('text', ['', 'folding observations', 'all is well: really'])
def test_text_without_a_state_is_no_verdict(text):
    assert verdict_from_text(text) is None


# What happened lately ----------------------------------------------------------------------------


def test_recent_forgets_what_is_older_than_the_window():
    now = [0.0]
    recent = Recent(10.0, lambda: now[0])
    assert recent(Counts(3, 3)) == Counts(3, 3)
    now[0] = 6.0
    assert recent(Counts(5, 4, {'odd': 1})) == Counts(5, 4, {'odd': 1})
    now[0] = 11.0
    assert recent(Counts(12, 4, {'odd': 8}, 2)) == Counts(9, 1, {'odd': 8}, 2)
    now[0] = 17.0
    assert recent(Counts(13, 4, {'odd': 9}, 2)) == Counts(8, 0, {'odd': 8}, 2)


def test_recent_tells_the_last_that_is_known_when_nothing_comes():
    now = [0.0]
    recent, total = Recent(10.0, lambda: now[0]), Counts(3, 0, {'odd': 3})
    for now[0] in (0.0, 9.0, 31.0, 99.0):
        assert recent(total) == total


def test_recent_keeps_little_however_often_it_is_asked():
    now = [0.0]
    recent = Recent(10.0, lambda: now[0])
    for step in range(5000):
        now[0] = step * 0.01
        assert recent(Counts(step, step)).received <= 1100
    assert len(recent._seen) < 64


# Calibration -------------------------------------------------------------------------------------


def drawn(num_points, spread=1.0, seed=0):
    """Return mean, stddev and observations that deviate `spread` times as much as predicted."""
    rng = np.random.default_rng(seed)
    mean, stddev = rng.normal(size=(num_points, 1)), rng.uniform(0.1, 3, (num_points, 1))
    return mean, stddev, mean + spread * stddev * rng.normal(size=(num_points, 1))


def counted(mean, stddev, y, sizes=None, **kwargs):
    """Return the coverage after adding in batches."""
    calibration, start = Calibration(**kwargs), 0
    for size in sizes or (len(mean),):
        batch = slice(start, start + size)
        calibration.add(mean[batch], stddev[batch], y[batch])
        start += size
    assert start == len(mean)
    return calibration.coverage()


def test_no_observation_no_coverage():
    assert Calibration().coverage() is None


def test_coverage_of_a_true_model_is_that_of_its_intervals():
    coverage = counted(*drawn(40000), window_points=10000)
    assert coverage.within_50 == pytest.approx(0.5, abs=0.02)
    assert coverage.within_90 == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize(('spread', 'state'), [(2.5, 'overconfident'), (0.3, 'underconfident')])
def test_wrong_spread_is_found(spread, state):
    coverage = counted(*drawn(5000, spread))
    assert judge(snapshot(coverage=coverage)).state == state


@pytest.mark.parametrize('sizes', [(101,), (1,) * 101, (7, 0, 31, 63)])
def test_coverage_is_the_weighted_share_however_it_is_batched(sizes):
    mean, stddev, y = drawn(101)
    coverage = counted(mean, stddev, y, sizes, window_points=37)
    weight = (1 - 1 / 37) ** np.arange(100, -1, -1)
    deviation = (np.abs(y - mean) / stddev)[:, 0]
    assert coverage.num_points == pytest.approx(weight.sum(), rel=1e-12)
    for share, half_width in ((coverage.within_50, 0.67449), (coverage.within_90, 1.64485)):
        expected = weight[deviation <= half_width].sum() / weight.sum()
        assert share == pytest.approx(expected, rel=1e-12)


def test_old_observations_are_forgotten():
    calibration = Calibration(window_points=1000)
    calibration.add(*drawn(5000, spread=20.0))
    assert calibration.coverage().within_90 < 0.2
    calibration.add(*drawn(8000))
    assert calibration.coverage().within_90 == pytest.approx(0.9, abs=0.03)
    assert calibration.coverage().num_points == pytest.approx(1000, rel=1e-3)


def test_what_cannot_be_compared_does_not_count():
    mean = np.array([np.nan, 0.0, 0.0, 0.0, 0.0])
    stddev = np.array([1.0, np.inf, 0.0, -1.0, 1.0])
    y = np.array([0.0, 0.0, 0.0, 0.0, 0.1])
    assert counted(mean, stddev, y) == Coverage(1.0, 1.0, 1.0)


def test_health_needs_no_ros():
    code = 'import sys, cmanp_ros.health; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert 'cmanp_ros.health' in loaded.stdout.split()
    assert not {'rclpy', 'torch', 'diagnostic_msgs'} & set(loaded.stdout.split())
