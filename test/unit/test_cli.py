"""Calls that cannot work are refused in a line, before the work."""

import subprocess
import sys
from pathlib import Path

import pytest
import small_models

from cmanp_ros import cli
from cmanp_ros.checkpoint import save_model
from cmanp_ros.cli import demo, evaluate
from cmanp_ros.cli.options import check_output
from cmanp_ros.core.errors import ConfigError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words):
    """Call cmanp; return its exit status and the last line that it said."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f'cmanp {words[0]}')
    return status, said


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('words', 'option', 'expected'),
    [
        ('train gp1d --folder a --threads 0', '--threads: 0', '1 to 1,024'),
        ('train gp1d --folder a --workers -1', '--workers: -1', 'at least 0'),
        ('evaluate terrain --threads 0', '--threads: 0', '1 to 1,024'),
        ('evaluate robust --num-tasks 0', '--num-tasks: 0', 'at least 1'),
        ('evaluate prior --num-tasks -1', '--num-tasks: -1', 'at least 1'),
        ('evaluate real --num-context 64 0', '--num-context: 0', 'at least 1'),
        ('evaluate gp1d --num-batches 0', '--num-batches: 0', 'at least 1'),
        ('evaluate gp1d --block-size 0', '--block-size: 0', 'at least 1'),
        ('evaluate tracks --limit -3', '--limit: -3', 'at least 1'),
        ('evaluate terrain --noise 0.1 -1', '--noise: -1', 'at least 0'),
        ('evaluate terrain --noise inf', '--noise: inf', 'at least 0'),
        ('evaluate seams --seed -1', '--seed: -1', '0 to 2,147,483,648'),
        ('demo --domain-id 233', '--domain-id: 233', '0 to 232'),
        ('demo --rate nan', '--rate: nan', '1 to 100'),
    ],
)
def test_numbers_out_of_range_are_a_wrong_call(capsys, words, option, expected):
    status, said = refused(capsys, *words.split())
    assert status == 2
    assert said.endswith(f'error: argument {option} is out of range, expected {expected}')


def test_what_is_no_number_is_a_wrong_call(capsys):
    status, said = refused(capsys, 'evaluate', 'gp1d', '--num-batches', 'many')
    assert status == 2 and said.endswith("--num-batches: invalid int value: 'many'")


@pytest.mark.parametrize('domain_id', [0, 232])
def test_the_demo_takes_each_domain_that_dds_has(domain_id):
    assert demo._options(['--domain-id', str(domain_id)]).domain_id == domain_id


@pytest.mark.parametrize('words', [[], ['--version']])
def test_a_call_without_a_command_names_them(capsys, words):
    with pytest.raises(SystemExit, match='2'):
        cli.main(words)
    assert 'expected a command first, one of demo, node, replay' in capsys.readouterr().err


# Files to be written -----------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_refused(in_an_empty_folder):
    folder = in_an_empty_folder
    check_output('--out', folder / 'a.PNG', ['.png'])
    (folder / 'b.png').mkdir()
    for name, words in (
        ('a.jpg', 'a.jpg: expected a name that ends in .png, .pdf'),
        ('b.png', 'b.png is a folder; expected the name of a file'),
        ('no/a.png', 'no; expected one: make it'),
    ):
        with pytest.raises(ConfigError, match=f'^--out .*{words}$'):
            check_output('--out', folder / name, ['.png', '.pdf'])


def test_a_folder_that_may_not_be_written_is_refused_before_the_work(
    capsys, monkeypatch, tmp_path
):
    (tmp_path / 'a.csv').write_text('x,y,z\n1,2,3\n')
    monkeypatch.setattr('os.access', lambda *_: False)
    for command, name in (('replay', 'b.safetensors'), ('plot', 'b.png')):
        status, said = refused(capsys, command, 'a.csv', '--out', f'{tmp_path}/{name}')
        assert status == 1 and f'{name}: {tmp_path} cannot be written; expected a file' in said


def test_a_pipe_that_breaks_is_said(in_an_empty_folder):
    Path('a.csv').write_text('x,y,z\n2,3,5\n', encoding='utf-8')
    command = [sys.executable, '-m', 'cmanp_ros.cli', 'replay', 'a.csv']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert (process.returncode, said) == (1, 'cmanp replay: [Errno 32] Broken pipe\n')


def test_what_the_system_refuses_is_a_line(capsys):
    status, said = refused(capsys, 'train', 'gp1d', '--folder', '/proc/new')
    assert status == 1 and "'/proc/new'" in said


def test_a_disk_that_is_full_at_the_end_is_said_in_a_line(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device', 'a.safetensors')

    monkeypatch.setattr('cmanp_ros.maps.save', full)
    with open('a.csv', 'w', encoding='utf-8') as file:
        file.write('x,y,z\n2,3,5\n')
    status, said = refused(capsys, 'replay', 'a.csv')
    assert status == 1 and said.endswith("No space left on device: 'a.safetensors'")


@pytest.mark.parametrize(
    'words',
    ['terrain --json no/a.json', 'seams --picture no/a.png', 'gp1d --picture no/a.png'],
)
def test_studies_begin_only_where_their_end_can_be_written(capsys, words):
    status, said = refused(capsys, 'evaluate', *words.split())
    assert status == 1 and 'there is no folder no; expected one: make it' in said


def test_the_folder_of_a_picture_that_nobody_chose_is_made(in_an_empty_folder, monkeypatch):
    monkeypatch.setattr(evaluate, '_seams', lambda options: 0)
    assert cli.main(['evaluate', 'seams']) == 0
    assert (in_an_empty_folder / 'build').is_dir()


# Training ----------------------------------------------------------------------------------------


def test_a_training_needs_a_folder_that_can_be_made(capsys, in_an_empty_folder):
    file = in_an_empty_folder / 'file'
    file.write_text('')
    for folder in (file, file / 'below'):
        status, said = refused(capsys, 'train', 'gp1d', '--folder', folder)
        assert status == 1 and said.endswith(
            f'{file} is no folder; expected a folder, or a new one'
        )


def test_going_on_without_data_says_what_is_trained_on(capsys, in_an_empty_folder, monkeypatch):
    monkeypatch.setattr('cmanp_ros.cli.train.train', lambda *_, **__: 'model.safetensors')
    for recipe, is_said in (('fine_tune', True), ('gp1d', False)):
        assert cli.main(['train', recipe, '--folder', recipe]) == 0
        assert (
            'from field with synthetic fields, which takes hours' in capsys.readouterr().out
        ) == is_said


def test_a_tile_size_of_zero_is_one_that_was_given(capsys):
    status, said = refused(capsys, 'train', 'field', '--folder', 'a', '--tile-size', 0)
    assert status == 1 and '--tile-size without --data: expected the recordings, too' in said


def test_data_of_which_nothing_can_be_used_say_why(capsys, in_an_empty_folder):
    (in_an_empty_folder / 'a.csv').write_text('x,y,depth\n1,2,deep\n')
    words = ['fine_tune', '--folder', 'a', '--data', 'a.csv', '--tile-size', '3']
    assert cli.main(['train', *words]) == 1
    assert "[not_finite] a.csv: 'deep' in '1,2,deep' is no number" in capsys.readouterr().out


# Studies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('study', ['terrain', 'robust', 'tracks', 'real', 'prior', 'seams'])
def test_models_of_other_fields_are_named_with_what_a_study_expects(capsys, study):
    status, said = refused(capsys, 'evaluate', study, '--checkpoint', 'gp1d')
    assert status == 1
    assert said == (
        'cmanp evaluate: the model gp1d has dim_x 1 and dim_y 1; '
        f"`cmanp evaluate {study}` expects 2 and 1, such as 'field'"
    )


def test_models_to_stand_beside_are_of_the_same_fields(capsys, in_an_empty_folder):
    save_model(small_models.build(small_models.field(2, 2)), 'two.safetensors')
    for words in (
        'gp1d --checkpoint gp1d field',
        'terrain --attention two.safetensors',
        'tile-size a.csv --checkpoint two.safetensors',
    ):
        status, said = refused(capsys, 'evaluate', *words.split())
        assert status == 1 and 'has dim_x 2 and dim_y ' in said


@pytest.mark.parametrize('study', evaluate.STUDIES)
def test_help_says_what_is_taken_where_nothing_is_given(capsys, study):
    with pytest.raises(SystemExit):
        cli.main(['evaluate', study, '--help'])
    printed = ' '.join(capsys.readouterr().out.split())
    assert '(default: 1)' in printed and 'None' not in printed
