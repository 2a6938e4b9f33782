"""The pure parts of the demo: terrain, path, scan, scores, verdict, view, picture, processes."""

import io
import os
import signal
import socket
import sys
import time

import matplotlib.cbook
import matplotlib.image
import numpy as np
import pytest
from conftest import wait_for
from matplotlib import colormaps
from rich.console import Console

from cmanp_ros.cli import demo as command
from cmanp_ros.demo import drive, picture, processes, run, scores, summary, terrain, view
from cmanp_ros.parameters import parameters_from

SIZE = 2900.0  # [m]


@pytest.fixture(scope='module')
def whole():
    return terrain.load_terrain()


@pytest.fixture(scope='module')
def window(whole):
    return terrain.choose_window(whole, SIZE, seed=3)


# Terrain -------------------------------------------------------------------------------------


def test_terrain_is_the_elevation_model_with_north_up(whole):
    path = matplotlib.cbook.get_sample_data(terrain.FILE, asfileobj=False)
    with np.load(path) as data:
        elevation = data['elevation']
        assert data['ymin'] > data['ymax']  # the first row is the northern edge
    assert whole.heights.shape == elevation.shape == (344, 403)
    assert whole.heights[-1, 7] == elevation[0, 7]


def test_cells_have_the_size_of_three_arc_seconds(whole):
    along_x, along_y = whole.spacing
    assert along_y == pytest.approx(92.7, abs=0.1)
    assert along_x == pytest.approx(92.7 * np.cos(np.radians(36.59)), abs=0.1)


def test_window_lies_around_the_origin_and_keeps_the_measured_heights(window):
    x, heights = terrain.grid_points(window, SIZE)
    assert x.shape == (*heights.shape, 2)
    assert np.abs(x).max() <= SIZE / 2
    assert SIZE / 2 - np.abs(x).max() < max(window.spacing)
    assert np.diff(x[0, :, 0]).min() > 0 and np.diff(x[:, 0, 1]).min() > 0
    interpolated = terrain.height_at(window, x.reshape(-1, 2)).reshape(heights.shape)
    np.testing.assert_allclose(interpolated, heights, atol=1e-6)


def test_one_seed_is_one_window_with_relief(whole, window):
    again = terrain.choose_window(whole, SIZE, seed=3)
    assert again.origin == window.origin
    assert terrain.choose_window(whole, SIZE, seed=4).origin != window.origin
    assert terrain.grid_points(window, SIZE)[1].std() > 50.0


def test_window_larger_than_the_terrain_is_refused(whole):
    with pytest.raises(ValueError, match='at most'):
        terrain.choose_window(whole, 40000.0, seed=0)


def test_interpolation_is_exact_for_quadratic_surfaces():
    def surface(x):
        return 3.0 + 2.0 * x[..., 0] - x[..., 1] + 0.5 * x[..., 0] * x[..., 1] - x[..., 1] ** 2

    axes = np.arange(7) * 2.0 + 1.0, np.arange(11) * 3.0 - 5.0
    nodes = np.stack(np.meshgrid(*axes), axis=-1)
    patch = terrain.Terrain(surface(nodes), (2.0, 3.0), (1.0, -5.0))
    x = np.random.default_rng(0).uniform((4.0, -1.0), (10.0, 20.0), (13, 2))
    np.testing.assert_allclose(terrain.height_at(patch, x), surface(x), rtol=1e-9)


def test_beyond_the_edge_the_nearest_heights_count():
    patch = terrain.Terrain(np.full((5, 7), 41.0), (2.0, 3.0))
    far = np.array([[-100.0, 4.0], [1e4, 1e4]])
    np.testing.assert_allclose(terrain.height_at(patch, far), 41.0)


def test_weights_of_neighbors_add_up_to_one():
    weights = terrain.cubic_weights(np.linspace(0, 1, 11)[:-1])
    assert weights.shape == (10, 4)
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    np.testing.assert_array_equal(weights[0], [0, 1, 0, 0])


# Drive ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(5))
def test_path_stays_inside_at_constant_speed_without_sharp_turns(seed):
    path = drive.winding_path(SIZE, 997, seed)
    assert path.shape == (997, 2)
    assert np.abs(path).max() <= SIZE / 2 - drive.EDGE_M + 1e-6
    steps = np.diff(path, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    assert lengths.max() < 1.1 * np.median(lengths)
    cosines = (steps[1:] * steps[:-1]).sum(-1) / (lengths[1:] * lengths[:-1])
    assert np.degrees(np.arccos(np.clip(cosines, -1, 1))).max() < 75.0
    np.testing.assert_array_equal(path, drive.winding_path(SIZE, 997, seed))


@pytest.mark.parametrize('seed', range(5))
def test_path_sees_a_part_of_the_window_and_leaves_a_part(seed, window):
    x, _ = terrain.grid_points(window, SIZE)
    path = drive.winding_path(SIZE, 350, seed)
    distance = np.linalg.norm(x[:, :, None] - path, axis=-1).min(-1)
    assert 0.4 < (distance < drive.FOOTPRINT_M).mean() < 0.9
    assert distance.max() > 2 * drive.FOOTPRINT_M


def test_seeds_give_different_paths():
    first, second = (drive.winding_path(SIZE, 31, seed) for seed in (0, 1))
    assert np.abs(first - second).max() > 100.0


def test_resampled_path_keeps_both_ends_and_its_length():
    corner = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]])
    resampled = drive.resample(corner, 8)
    np.testing.assert_allclose(resampled[[0, 3, 7]], [[0, 0], [3, 0], [3, 4]])
    assert drive.path_length(resampled) == pytest.approx(7.0)


def test_scan_reads_heights_below_the_rover_with_noise_and_dropouts(window):
    position = np.array([310.0, -170.0])
    points = drive.scan(window, position, np.random.default_rng(5), num_points=20011)
    assert points.shape == (20011, 3)
    distance = np.linalg.norm(points[:, :2] - position, axis=1)
    assert distance.max() <= drive.FOOTPRINT_M
    assert np.median(distance) == pytest.approx(drive.FOOTPRINT_M / np.sqrt(2), rel=0.02)
    lost = np.isnan(points[:, 2])
    assert lost.mean() == pytest.approx(drive.DROPOUT_RATE, rel=0.2)
    noise = (points[:, 2] - terrain.height_at(window, points[:, :2]))[~lost]
    assert noise.std() == pytest.approx(drive.RANGE_NOISE_M, rel=0.03)
    assert abs(noise.mean()) < 0.05


def test_scenario_survives_the_command_line():
    scenario = drive.Scenario(seed=11, window_m=1300.0, duration_sec=7.5, rate_hz=4.0)
    assert drive.Scenario.from_json(scenario.to_json()) == scenario
    assert scenario.num_scans == 30


# Scores and verdict --------------------------------------------------------------------------


def test_scores_of_numbers_worked_by_hand():
    result = scores.scores(
        mean=np.array([1.0, 2.0]),
        stddev=np.array([1.0, 2.0]),
        heights=np.array([4.0, 6.0]),
        readings=np.array([1.0, 6.0]),
    )
    assert result['rmse'] == pytest.approx(np.sqrt((9 + 16) / 2))
    assert result['coverage'] == 0.5
    expected = -0.5 * np.log(2 * np.pi) - 0.5 * np.log(2.0) - 0.5 * 4 / 2
    assert result['log_likelihood'] == pytest.approx(expected)


def test_predictions_that_are_right_cover_ninety_percent_and_are_calibrated():
    rng = np.random.default_rng(0)
    stddev = rng.uniform(1, 30, 20000)
    mean = np.zeros_like(stddev)
    reading = stddev * rng.standard_normal(stddev.shape)
    result = scores.scores(mean, stddev, reading, reading)
    assert result['coverage'] == pytest.approx(0.9, abs=0.01)
    predicted, made = scores.calibration(mean - reading, stddev, num_bins=7)
    assert predicted.shape == made.shape == (7,)
    np.testing.assert_allclose(predicted, made, rtol=0.06)


def test_points_that_no_counter_explains_are_found():
    counters = {
        'points_received': 100,
        'points_folded': 70,
        'points_rejected_not_finite': 11,
        'points_rejected_outside_workspace': 7,
        'points_dropped': 5,
        'points_pending': 3,
        'messages_folded': 2,
    }
    assert scores.unaccounted(counters | {'points_received': 96}) == 0
    assert scores.unaccounted(counters | {'points_received': 101}) == 5


def good_report():
    """Return the report of a run in which nothing is missing."""
    measured = {
        'tile_bytes': 382176,
        'tiles': 0,
        'folded': 0,
        'points_per_second': 0.0,
        'rmse': 130.0,
        'coverage': 0.9,
        'log_likelihood': -6.3,
        'seconds': 0.0,
        'message': 'no observations yet',
    }
    answers = {
        'service_asked': 9,
        'service': 9,
        'service_latency_sec': 0.07,
        'topic_asked': 11,
        'topic': 11,
        'field': 17,
    }
    end = measured | {
        'folded': 5500,
        'tiles': 207,
        'rmse': 20.0,
        'coverage': 0.88,
        'seconds': 12.0,
    }
    seen = {'share': 0.6, 'stddev': 5.0, 'rmse': 5.0, 'coverage': 0.9, 'log_likelihood': -3.0}
    return {
        'scenario': {'seed': 6, 'window_m': SIZE, 'duration_sec': 12.0, 'rate_hz': 10.0},
        'start': measured,
        'end': end,
        'series': [measured | {'answers': answers}, end | {'answers': answers}],
        'observations': {
            'published_messages': 120,
            'published': 5760,
            'folded': 5500,
            'rejected': {'not_finite': 130, 'outside_workspace': 130},
            'dropped': 0,
            'pending': 0,
            'not_received': 48,
            'unaccounted': 0,
            'points_per_second': 430.0,
        },
        'answers': answers | {'difference_m': 1e-4},
        'places': {'seen': seen},
        'seconds': {'setup': 5.0, 'all': 20.0},
        'missing': [],
    }


def test_complete_run_lacks_nothing():
    assert scores.shortcomings(good_report()) == []


@pytest.mark.parametrize(
    ('part', 'key', 'value', 'complaint'),
    [
        ('answers', 'service', 0, 'the service cmanp/predict gave no answers'),
        ('answers', 'service', 8, 'answered 8 of 9'),
        ('answers', 'topic', 0, 'cmanp/prediction'),
        ('answers', 'field', 0, 'cmanp/field'),
        ('answers', 'difference_m', None, 'same answers'),
        ('answers', 'difference_m', 0.5, 'differ by 0.5 m'),
        ('observations', 'folded', 0, 'no observation was folded'),
        ('observations', 'unaccounted', 48, '48 of the points received were lost'),
        ('observations', 'not_received', 480, '480 of the published points did not reach'),
        ('end', 'tile_bytes', 382184, '382176 bytes at the start and 382184'),
        ('end', 'rmse', 131.0, 'RMSE did not fall'),
        ('end', 'rmse', float('nan'), 'RMSE did not fall'),
        ('end', 'coverage', 0.62, 'covers 0.62'),
    ],
)
def test_what_is_missing_is_named(part, key, value, complaint):
    report = good_report()
    report[part] = report[part] | {key: value}
    assert any(complaint in reason for reason in scores.shortcomings(report))


# View, summary and picture -------------------------------------------------------------------


@pytest.fixture
def progress(window):
    report = good_report()
    scenario = drive.Scenario(window_m=SIZE, duration_sec=12.0)
    return run.Progress(
        scenario,
        window,
        domain_id=57,
        phase='driving',
        drive_sec=6.0,
        rover={'messages': 60, 'points': 2880, 'position': [-1300.0, 1200.0]},
        start=report['start'],
        series=report['series'],
        map={'mean': np.full((13, 17), 500), 'stddev': np.full((13, 17), 20)},
    )


def rendered(thing, width=130, height=50):
    """Return what a renderable looks like, as text."""
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(thing)
    return console.file.getvalue()


def test_sparkline_goes_from_low_to_high_and_is_never_too_long():
    assert view.sparkline([0, 1, 2, 99, -5], 0, 2) == '▁▅██▁'
    assert len(view.sparkline(range(1000), 0, 999, width=23)) == 23


@pytest.mark.parametrize(('width', 'height'), [(130, 50), (100, 40), (80, 24), (60, 12)])
def test_screen_fits_the_terminal(progress, width, height):
    lines = rendered(view.screen(progress, width, height), width, height).splitlines()
    assert max(len(line) for line in lines) <= width
    if height > 12:
        assert len(lines) < height
        assert '▀' in ''.join(lines) and '●' in ''.join(lines)


def test_screen_before_the_first_measurement_has_no_numbers_yet(progress):
    progress.start, progress.series, progress.map, progress.rover = None, [], None, {}
    assert '…' in rendered(view.screen(progress, 130, 50))


def test_map_is_painted_with_north_up():
    values = np.zeros((5, 3))
    values[4] = 1.0  # the northernmost row
    values[0, 0] = np.nan
    painted = view.paint(values, colormaps['gray'], 0.0, 1.0, side=10)
    assert painted.shape == (10, 10, 3)
    assert (painted[:2] == 255).all() and (painted[2:] == 0).all()


def test_rover_is_marked_where_it_is_on_every_map():
    maps = view.Maps([np.zeros((4, 4, 3), int)] * 2, mark=(0.1, 0.1))
    north, south = rendered(maps).splitlines()
    assert north.split() == ['▀▀▀▀', '▀▀▀▀'] and south.split() == ['●▀▀▀', '●▀▀▀']


def test_plain_view_prints_lines_without_escape_codes(progress):
    console = Console(file=io.StringIO(), width=80)
    with view.view(console, plain=False) as shown:
        shown.show(progress)
        shown._due = 0.0
        shown.show(progress)
    phase, line = console.file.getvalue().splitlines()  # the headline comes at the very start
    assert phase == 'driving'
    assert '5,500 observations folded' in line and 'RMSE  20.0 m' in line
    assert '\x1b' not in line


def test_summary_names_what_became_of_the_readings(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    summary.print_summary(console, good_report(), tmp_path / 'a.png')
    text = console.file.getvalue()
    assert '130 not_finite' in text and '0 unaccounted' in text
    assert text.count('382,176') == 2 and 'RMSE of the mean [m]' in text


def test_picture_is_drawn_and_not_blank(window, tmp_path):
    x, heights = terrain.grid_points(window, SIZE)
    rng = np.random.default_rng(0)
    stddev = rng.uniform(3, 40, heights.shape)
    grids = {
        'x': x,
        'heights': heights,
        'readings': drive.readings(heights, rng),
        'mean': heights + stddev * rng.standard_normal(heights.shape),
        'stddev': stddev,
    }
    output = tmp_path / 'new' / 'picture.png'
    picture.draw(grids, drive.winding_path(SIZE, 350, 3), good_report(), output)
    image = matplotlib.image.imread(output)
    assert image.shape[0] > 1000 and image.shape[1] > 1500
    assert image[..., :3].std() > 0.1


def test_node_is_told_only_what_a_user_would_know(window):
    scenario = drive.Scenario(window_m=SIZE)
    parameters = run.node_parameters(scenario, window)
    assert parameters_from(parameters).bounds_min == (-1450.0, -1450.0)
    offset = parameters['value_offset']
    assert offset % 50 == 0
    assert abs(offset - terrain.grid_points(window, SIZE)[1].mean()) <= 25


# Processes -----------------------------------------------------------------------------------


def test_domains_of_two_demos_differ():
    with processes.own_domain() as first, processes.own_domain() as second:
        assert 1 <= first <= processes.MAX_DOMAIN_ID
        assert first != second
    with processes.own_domain(83) as given:
        assert given == 83


def test_domain_with_a_participant_left_is_not_taken(monkeypatch):
    monkeypatch.setattr(processes, 'MAX_DOMAIN_ID', 1)
    for participant in (0, 3, processes.MAX_PARTICIPANTS - 1):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as left:
            left.bind(('', 7400 + 250 + 10 + 2 * participant))
            with pytest.raises(OSError, match='every ROS domain'), processes.own_domain():
                pass


def test_children_talk_only_within_this_machine(monkeypatch):
    monkeypatch.setenv('ROS_NAMESPACE', '/robot')
    env = processes.environment(41)
    assert env['ROS_DOMAIN_ID'] == '41'
    assert env['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'LOCALHOST'
    assert 'ROS_NAMESPACE' not in env


@pytest.fixture
def child(tmp_path):
    """Return a function that starts a script as a child; all are stopped afterwards."""
    children = []

    def start(script):
        (tmp_path / 'script.py').write_text(script)
        env = os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), *sys.path])}
        children.append(processes.Child('script', 'script', [], tmp_path, env))
        return children[-1]

    yield start
    processes.stop(children, 0.1)


def test_what_a_child_says_is_an_event_or_goes_to_its_log(child):
    said = child(
        'import json, sys\n'
        'print(json.dumps({"told": sys.stdin.readline()}))\n'
        'print("not json")\nprint("7")\nprint("oops", file=sys.stderr)\nsys.exit(3)\n'
    )
    said.tell('go')
    wait_for(lambda: said.ended() is not None)
    assert said.ended() == 3
    assert said.events() == [{'told': 'go\n'}]
    assert sorted(said.last_lines().split('\n')) == ['7', 'not json', 'oops']
    said.tell('nobody hears this')


def test_child_that_does_not_stop_is_killed_in_time(child):
    stubborn = child(
        'import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n'
        'print("{}", flush=True)\ntime.sleep(60)\n'
    )
    wait_for(stubborn.events)
    started = time.monotonic()
    assert processes.stop([stubborn], 0.5) == ['script']
    assert time.monotonic() - started < 5.0
    assert stubborn.process.returncode == -signal.SIGKILL


def test_child_that_stops_is_not_killed(child):
    polite = child('import time\nprint("{}", flush=True)\ntime.sleep(60)\n')
    wait_for(polite.events)
    assert processes.stop([polite]) == []


# Command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('option', 'value', 'complaint'),
    [
        ('--duration', '1', 'out of range, expected 5 to'),
        ('--window', '90000', 'out of range, expected 1,000 to'),
        ('--rate', 'fast', 'invalid float'),
        ('--output', 'picture.txt', 'expected a name that ends in'),
    ],
)
def test_wrong_option_is_refused_with_its_range(option, value, complaint, capsys):
    with pytest.raises(SystemExit, match='2'):
        command.main([option, value])
    assert complaint in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match='0'):
        command.main(['--help'])
    text = capsys.readouterr().out
    for option in ('--duration', '--seed', '--output', '--window', '--rate', '--plain'):
        assert option in text
