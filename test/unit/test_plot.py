"""In pictures and files of a map numbers lie where they belong, and unknown is unknown."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from small_models import build
from small_models import field as small_config

from cmanp_ros import checkpoint, cli
from cmanp_ros.core import Lattice, Normalization, OneTile
from cmanp_ros.core.errors import ConfigError, InputError
from cmanp_ros.field import NeuralField
from cmanp_ros.plots import geotiff, picture, ply, raster, watching
from cmanp_ros.plots.watching import MAX_POSITIONS, Coverage, Track, Watched
from cmanp_ros.recordings import Recording
from cmanp_ros.recordings.folding import Folding
from cmanp_ros.visualization import Grid, color_table

SIZE = 2.0  # [m] of a tile


def small_map(geometry=None, dim_x=2):
    """Make an empty map of a small model."""
    torch.manual_seed(0)
    model = build(small_config(dim_x))
    geometry = geometry or Lattice.of(model.config, SIZE)
    return NeuralField(model, geometry, Normalization(3.0, 2.0), max_tiles=10_000)


@pytest.fixture(scope='module')
def corner():
    """Return a map of 31 observations in an L: nothing is known in its upper right."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform((0, 0), (14, 2), (17, 2)), rng.uniform(0, (2, 10), (14, 2))])
    field = small_map()
    field.observe(x, 3 + np.sin(x[:, 0]))
    return field


@pytest.fixture(scope='module')
def surface(corner):
    """Return its raster of 11 x 7 cells."""
    return raster.rasterize(corner, Grid((-1.0, -2.0), 1.7, 11, 7))


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """Write files where they are not in the way."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    """Run the command; return its exit status and what it printed."""
    status = cli.main(['plot', *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


# Cells -------------------------------------------------------------------------------------------


def test_cells_are_predictions_at_their_centers_and_nan_where_nothing_was_observed(
    corner, surface
):
    assert surface.mean.shape == surface.stddev.shape == (7, 11)
    known = corner.is_known(surface.grid.targets).reshape(7, 11)
    np.testing.assert_array_equal(np.isfinite(surface.stddev), known)
    np.testing.assert_array_equal(surface.known, known)
    assert 0 < known.sum() < 77
    for row, column in ((0, 0), (3, 1), (1, 8)):
        center = [[-1 + 1.7 * (column + 0.5), -2 + 1.7 * (row + 0.5)]]
        mean, stddev = corner.predict(center)
        np.testing.assert_allclose(surface.mean[row, column], mean[0, 0], rtol=1e-5)
        np.testing.assert_allclose(surface.stddev[row, column], stddev[0, 0], rtol=1e-5)


def test_cells_are_the_same_however_many_are_predicted_at_once(corner, surface, monkeypatch):
    monkeypatch.setattr(raster, 'CELLS_AT_ONCE', 23)
    done = []
    again = raster.rasterize(corner, surface.grid, done.append)
    np.testing.assert_allclose(again.mean, surface.mean, rtol=1e-6)
    np.testing.assert_allclose(again.stddev, surface.stddev, rtol=1e-6)
    assert done == [22, 44, 66, 77]


def test_bounds_are_those_of_the_finest_tiles_that_hold_data(corner):
    lower, upper = raster.extent(corner)
    np.testing.assert_array_equal(lower, [-1.5, -1.5])
    np.testing.assert_array_equal(upper, [15.5, 11.5])
    inside = np.stack(np.meshgrid([-1.4, 0.1], [-1.4, 11.4]), -1).reshape(-1, 2)
    assert corner.is_known(inside).all()
    outside = [[-1.6, 1.0], [15.6, 1.0], [1.0, -1.6], [1.0, 11.6]]
    assert not corner.is_known(outside).any()
    grid = raster.layout(corner)
    assert grid.origin == (-1.5, -1.5) and (grid.upper >= upper).all()


def test_one_tile_is_drawn_within_its_bounds():
    field = small_map(OneTile((0.0, 0.0), (7.0, 5.0)))
    field.observe([[2.0, 3.0]], [3.0])
    found = raster.rasterize(field, raster.layout(field, ((-1, 0), (7, 5)), 1.0))
    assert not found.known[:, 0].any() and found.known[:, 1:].all()


@pytest.mark.parametrize(
    ('sides', 'expected'),
    [
        ((1600.0, 500.0), 2.0),  # [m]: a fifth of a tile of 10 m
        ((48.0, 80.0), 0.5),  # few tiles: as many cells as one can see
        ((5000.0, 20_000.0), 20.0),  # many: so that the cells are not too many
    ],
)
def test_cells_are_a_fifth_of_a_tile_unless_too_few_or_too_many(sides, expected):
    assert raster.default_resolution(10.0, np.array(sides)) == expected


def test_what_cannot_be_drawn_is_refused(corner):
    with pytest.raises(InputError, match='the map is empty: it holds no observations'):
        raster.layout(small_map())
    beside = (20, 20), (30, 30)
    with pytest.raises(InputError, match=r'within \(20, 20\) to \(30, 30\) m; expected bounds'):
        raster.layout(corner, beside)
    with pytest.raises(InputError, match=r'overlap \(-1.5, -1.5\) to \(15.5, 11.5\) m'):
        raster.layout(corner, beside)
    with pytest.raises(InputError, match='no center of a cell .*; expected bounds around'):
        raster.rasterize(corner, Grid((10.0, 8.0), 0.5, 3, 2))
    with pytest.raises(ConfigError, match='expected bounds_min < bounds_max'):
        raster.layout(corner, ((5, 5), (1, 1)))
    with pytest.raises(ConfigError, match='3 numbers per location and 1 per value; expected 2'):
        raster.check(small_map(dim_x=3))


# Files -------------------------------------------------------------------------------------------


def test_geotiff_has_both_bands_where_they_belong(corner, surface, tmp_path):
    rasterio = pytest.importorskip('rasterio', reason='rasterio is missing: pip install rasterio')
    geotiff.write(surface, tmp_path / 'a.tif', 'm')
    with rasterio.open(tmp_path / 'a.tif') as file:
        assert file.descriptions == ('mean', 'stddev') and file.units == ('m', 'm')
        assert np.isnan(file.nodata) and file.res == (1.7, 1.7)
        np.testing.assert_allclose(file.bounds, (-1, -2, -1 + 11 * 1.7, -2 + 7 * 1.7))
        at = (3.25, 0.55)  # the center of a cell
        (found,) = file.sample([at])
        np.testing.assert_allclose(found, np.ravel(corner.predict([at])), rtol=1e-5)
        assert np.isnan(next(iter(file.sample([(14.3, 8.2)])))).all()
        assert file.read(1)[0, 0] == surface.mean[-1, 0]  # the file begins in the north


def read_ply(path):
    """Read vertices and faces of a binary PLY by its own header."""
    head, _, body = path.read_bytes().partition(b'end_header\n')
    kinds = {'double': '<f8', 'float': '<f4', 'uchar': 'u1'}
    lines = [line.split() for line in head.decode().splitlines()]
    assert ['format', 'binary_little_endian', '1.0'] in lines
    num_vertices, num_faces = (int(line[2]) for line in lines if line[0] == 'element')
    names = [(w[2], kinds[w[1]]) for w in lines if w[0] == 'property' and w[1] != 'list']
    assert ['property', 'list', 'uchar', 'int', 'vertex_indices'] in lines
    vertices = np.frombuffer(body, names, num_vertices)
    face = [('count', 'u1'), ('corners', '<i4', 3)]
    faces = np.frombuffer(body, face, num_faces, offset=vertices.nbytes)
    assert len(body) == vertices.nbytes + faces.nbytes
    return vertices, faces


def test_ply_is_the_surface_without_what_is_unknown(surface, tmp_path):
    ply.write(surface, tmp_path / 'a.ply')
    vertices, faces = read_ply(tmp_path / 'a.ply')
    known = surface.known
    assert len(vertices) == known.sum()
    expected = surface.grid.targets[known.reshape(-1)]
    np.testing.assert_allclose(np.stack([vertices['x'], vertices['y']], 1), expected)
    np.testing.assert_array_equal(vertices['z'], surface.mean[known])
    np.testing.assert_array_equal(vertices['stddev'], surface.stddev[known])
    whole = known[:-1, :-1] & known[1:, :-1] & known[:-1, 1:] & known[1:, 1:]
    assert whole.sum() * 2 <= len(faces) and (faces['count'] == 3).all()
    a, b, c = (np.stack([vertices[n][faces['corners'][:, k]] for n in 'xy'], 1) for k in range(3))
    (ux, uy), (vx, vy) = (b - a).T, (c - a).T
    turns = ux * vy - uy * vx
    np.testing.assert_allclose(turns, 1.7**2)  # half a cell each, seen from above


def test_ply_has_the_colors_of_the_stddev(surface, tmp_path):
    ply.write(surface, tmp_path / 'a.ply')
    vertices, _ = read_ply(tmp_path / 'a.ply')
    colors = np.stack([vertices[name] for name in ('red', 'green', 'blue')], 1)
    ends = np.rint(color_table()[[0, -1]] * 255)
    order = vertices['stddev'].argsort()
    np.testing.assert_array_equal(colors[order[[0, -1]]], ends)


def test_ply_of_one_cell_is_a_vertex(surface, tmp_path):
    one = np.full((1, 1), 2.0, np.float32)
    ply.write(raster.Raster(Grid((0.0, 0.0), 1.0, 1, 1), one, one), tmp_path / 'a.ply')
    vertices, faces = read_ply(tmp_path / 'a.ply')
    assert len(vertices) == 1 and len(faces) == 0


# Pictures ----------------------------------------------------------------------------------------


def flat(width, height, known):
    """Return a raster whose values rise to the east, known in some columns from the west."""
    mean = np.tile(np.linspace(5, 11, width, dtype=np.float32), (height, 1))
    stddev = np.linspace(0.5, 0.7, width * height, dtype=np.float32).reshape(height, width)
    mean[:, known:] = stddev[:, known:] = np.nan
    return raster.Raster(Grid((100.0, 50.0), 1.0, width, height), mean, stddev)


def colorful(path):
    """Return the share of pixels of a picture that are neither white nor grey."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return float(np.mean(np.ptp(pixels, axis=-1) > 0.15)), pixels.shape


@pytest.mark.parametrize('hillshade', [False, True])
def test_unknown_has_no_color_of_the_scale(tmp_path, hillshade):
    shares = []
    for known in (23, 11):
        path = tmp_path / 'new' / f'{known}.png'
        picture.draw(flat(23, 23, known), path, picture.Labels('a'), hillshade=hillshade)
        shares.append(colorful(path)[0])
    assert shares[0] > 0.3
    assert 0.35 < shares[1] / shares[0] < 0.65


def test_long_maps_lie_over_each_other(tmp_path):
    shapes = []
    for width, height in ((13, 17), (61, 17)):
        path = tmp_path / f'{width}.png'
        picture.draw(flat(width, height, 11), path, picture.Labels('a', 'b', 'm'))
        shapes.append(colorful(path)[1])
    assert shapes[0][1] > 1.3 * shapes[0][0] and shapes[1][1] < 1.5 * shapes[1][0]


@pytest.mark.parametrize('north', [0.0, 5_400_000.0], ids=['near', 'as UTM has it'])
def test_what_stands_at_the_axes_is_in_the_picture(north):
    drawn = flat(50, 50, 50)._replace(grid=Grid((500_000.0, north), 1.0, 50, 50))
    page = picture._Page(drawn, has_chart=False)
    axes, _ = page.maps()
    FigureCanvasAgg(page.figure).draw()
    assert axes.yaxis.label.get_window_extent().x0 > 0


def test_the_chart_and_the_dots_are_drawn(tmp_path):
    coverage = Coverage()
    coverage.add(np.zeros(13), np.ones(13), np.linspace(-2, 2, 13))
    args = flat(23, 19, 11), tmp_path / 'a.png', picture.Labels('a')
    picture.draw(*args)
    _, without = colorful(tmp_path / 'a.png')
    picture.draw(*args, coverage, np.array([[103.0, 57.0]]))
    _, with_chart = colorful(tmp_path / 'a.png')
    assert with_chart[1] > without[1] + 300


def test_a_constant_map_can_be_drawn(tmp_path):
    one = np.full((3, 2), 0.0, np.float32)
    constant = raster.Raster(Grid((0.0, 0.0), 2000.0, 2, 3), one, one + 1)
    picture.draw(constant, tmp_path / 'a.png', picture.Labels('a'), hillshade=True)
    assert colorful(tmp_path / 'a.png')[0] > 0.2


# What is seen while a recording is folded --------------------------------------------------------


def test_coverage_is_the_share_within_each_interval():
    coverage = Coverage()
    assert np.isnan(coverage.shares[-1])
    half_widths = np.array([0.1, 0.6744, 0.6746, 1.6448, 1.6450, 7.0, 50.0])
    coverage.add(np.full(7, 5.0), np.full(7, 3.0), 5.0 - 3.0 * half_widths)
    assert coverage.num_points == 7
    assert coverage.share(0.5) == 2 / 7 and coverage.share(0.9) == 4 / 7
    assert coverage.shares[0] == 0 and coverage.shares[-1] == 1
    assert coverage.summary == '50 % bars hold 29 %, 90 % bars hold 57 %'


def test_coverage_of_true_bars_is_the_diagonal():
    coverage, rng = Coverage(), np.random.default_rng(0)
    for _ in range(7):
        stddev = rng.uniform(1, 11, 997)
        coverage.add(np.zeros(997), stddev, stddev * rng.standard_normal(997))
    np.testing.assert_allclose(coverage.shares, coverage.levels, atol=0.02)


@pytest.mark.parametrize('step', [1, 7, 9973])
def test_a_track_is_thinned_evenly_however_it_comes(step):
    x = np.stack([np.arange(9973.0), np.zeros(9973)], axis=1)
    track = Track()
    for start in range(0, len(x), step):
        track.add(x[start : start + step])
    found = track.positions
    assert MAX_POSITIONS / 2 < len(found) <= MAX_POSITIONS
    np.testing.assert_array_equal(found, x[::8])


def test_watching_changes_nothing_but_rounding_and_compares_before_it_folds(tmp_path):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.uniform(0, 3, (5, 2)), 31, axis=0)  # each place again and again
    rows = np.column_stack([x, 100 + np.arange(155)])
    np.savetxt(tmp_path / 'a.csv', rows, delimiter=',', header='x,y,value', comments='')
    fields, watched = [small_map(), small_map()], None
    for field in fields:
        with Recording(tmp_path / 'a.csv') as recording:
            into = field
            if field is fields[1]:
                into = watched = Watched(field, recording)
            for _ in Folding(recording, into).run():
                pass
    (_, one, _), (_, other, _) = (field.exported() for field in fields)
    for name, part in one.tensors().items():
        torch.testing.assert_close(part, other.tensors()[name])
    np.testing.assert_array_equal(watched.track.positions, x)
    assert watched.coverage.num_points == 32 + 155 - 128  # of the second chunk, and the third


def test_a_short_table_is_compared_in_the_order_of_its_lines(tmp_path):
    x = np.linspace(0, 3, 300)[:, None] * [1, 0]  # along a line
    np.savetxt(tmp_path / 'a.csv', np.column_stack([x, x[:, :1]]), delimiter=',')
    with Recording(tmp_path / 'a.csv') as recording:
        watched = Watched(small_map(), recording)
        chunks = watched.in_chunks(x, 1024)
    assert [len(chunk) for chunk in chunks] == [64, 64, 64, 64, 44]
    assert np.concatenate(chunks).tolist() == list(range(300))


class Reading:
    """What `Watched` asks of a recording."""

    num_messages, duration_sec, num_read = 101, 5.0, 0


def test_few_chunks_are_compared_and_only_where_the_map_is_known(monkeypatch):
    monkeypatch.setattr(watching, 'NUM_COMPARED', 13)
    recording, predicted = Reading(), []
    field = small_map()
    watched = Watched(field, recording)

    def predict(x):
        predicted.append(x)
        return np.zeros((len(x), 1)), np.ones((len(x), 1))

    field.predict = predict
    for recording.num_read in range(1, 102):
        x = np.array([[1.0, 1.0], [1.1, 1.0], [1000.0 + 10 * recording.num_read, 0.0]])
        watched.observe(x, np.zeros((3, 1)))
    assert len(predicted) == 13
    assert all((x < 2).all() and len(x) == 2 for x in predicted)
    assert watched.coverage.num_points == 2 * len(predicted)
    assert watched.coverage.share(0.01) == 1
    assert len(watched.track.positions) == 101


# The command -------------------------------------------------------------------------------------


def test_a_saved_map_is_drawn_in_all_formats(in_an_empty_folder, corner, capsys):
    checkpoint.save_model(corner.model, 'model.safetensors')
    corner.save('harbor.safetensors', frame='odom', oldest_stamp=10**18, newest_stamp=10**18)
    model = ('--checkpoint', 'model.safetensors', '--resolution', 1.3)
    status, text = run(capsys, 'harbor.safetensors', *model)
    assert status == 0 and 'harbor.png' in text
    assert colorful('harbor.png')[0] > 0.1
    status, _ = run(capsys, 'harbor.safetensors', *model, '--out', 'a.ply', '--bounds', 0, 0, 3, 2)
    assert status == 0
    vertices, _ = read_ply(in_an_empty_folder / 'a.ply')
    assert len(vertices) == 3 * 2 and vertices['x'].max() == 2.5 * 1.3


@pytest.mark.parametrize('stamp', [17 * 10**26, 17 * 10**20, -17 * 10**20])
def test_a_map_with_stamps_of_no_year_is_drawn(in_an_empty_folder, corner, capsys, stamp):
    checkpoint.save_model(corner.model, 'model.safetensors')
    corner.save('a.safetensors', oldest_stamp=stamp, newest_stamp=stamp)
    model = ('--checkpoint', 'model.safetensors', '--resolution', 1.3)
    assert run(capsys, 'a.safetensors', *model, '--out', 'a.ply')[0] == 0


def test_a_recording_is_drawn_with_what_became_of_it(in_an_empty_folder, capsys):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 2, (101, 2))
    rows = np.column_stack([x, 3 + x[:, 0]])
    rows[7, 2] = np.nan
    np.savetxt('dive.csv', rows, delimiter=',', header='x,y,depth', comments='')
    settings = ('-p', 'chunk_size:=53', '-p', 'tile_size:=5.0', '-p', 'value_offset:=3.0')
    status, text = run(capsys, 'dive.csv', *settings, '--resolution', 2.9, '--units', 'm')
    assert status == 0, text
    assert 'left out: 1 points (not_finite)' in text
    assert 'bars hold' in text and 'of 32 observations that were predicted' in text
    assert colorful('dive.png')[0] > 0.1


def test_mistakes_are_explained_with_the_way_out(in_an_empty_folder, corner, capsys, monkeypatch):
    checkpoint.save_model(corner.model, 'model.safetensors')
    corner.save('a.safetensors')
    for arguments, words in (
        (['gone.safetensors'], 'gone.safetensors: no such file'),
        (['model.safetensors'], "is 'cmanp_ros model', expected 'cmanp_ros map'"),
        (['a.safetensors'], 'load it with the checkpoint that made it: --checkpoint NAME or FILE'),
        (['a.safetensors', 'b.safetensors'], 'expected one saved map at a time'),
        (['a.safetensors', '--source', 'b'], 'are for recordings; leave them out'),
        (['a.safetensors', '--out', 'a.jpg'], 'expected a name that ends in .png, .pdf, .svg'),
        (['a.safetensors', '--out', 'new/a.png'], 'there is no folder new; expected one: make it'),
        (['gone.mcap', '--bounds', 5, 5, 1, 1], 'every lower below its upper [m]'),
        (['gone.mcap'], 'gone.mcap is not there; expected a bag'),
    ):
        status, text = run(capsys, *arguments)
        assert status == 1 and words in text, (arguments, text)
        assert text.startswith('cmanp plot: ')
    with pytest.raises(SystemExit):
        run(capsys, 'gone.mcap', '--resolution', 'nan')
    assert 'nan is out of range, expected 0.0001 to' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, 'gone.mcap', '--bounds', 0, 0, '1e300', '1e300')
    assert '1e300 is out of range, expected -1,000,000,000,000.0 to' in capsys.readouterr().err


@pytest.mark.parametrize(('ending', 'package'), [('png', 'matplotlib'), ('tif', 'rasterio')])
def test_a_missing_package_is_named_before_the_work(
    in_an_empty_folder, capsys, monkeypatch, ending, package
):
    monkeypatch.setitem(sys.modules, package, None)
    status, text = run(capsys, 'gone.safetensors', '--out', f'a.{ending}')
    assert status == 1
    assert f'--out a.{ending} needs {package}' in text and f'pip install {package}' in text


def test_nothing_of_it_loads_ros():
    names = ['cli.plot', *(f'plots.{n}' for n in ('picture', 'geotiff', 'ply', 'watching'))]
    code = '\n'.join(f'import cmanp_ros.{name}' for name in names)
    code += '\nimport sys; print(*sys.modules)'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = {name.split('.')[0] for name in result.stdout.split()}
    assert 'cmanp_ros' in loaded
    assert not [n for n in loaded if n == 'rclpy' or n.endswith('_msgs')]
