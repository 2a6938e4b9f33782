"""
What the pages say is what the code does.

Blocks marked `python` or `sh` are run, in the order of their page, in one namespace and one empty
folder. Of every other line that begins with `cmanp`, the options must exist.
"""

import contextlib
import io
import re
import runpy
import shlex
import textwrap
import xml.etree.ElementTree
from functools import cache
from pathlib import Path

import pytest
import yaml

from cmanp_ros import __version__, cli, parameter_file
from cmanp_ros.checkpoint import load_model
from cmanp_ros.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(DOCS.rglob('*.md'))]
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r'^(?:    |\$ )(?:ros2 run cmanp_ros )?cmanp ((?:.*\\\n)*.*)$', re.MULTILINE)
OPTION = re.compile(r'(?<![\w-])--?[a-z][a-z-]*')
MOST_BYTES = 200_000


def name(path):
    """Call a page as a person would."""
    return str(path.relative_to(ROOT))


def blocks(page, *languages):
    """Return (language, text) of the blocks in some languages, in order."""
    found = BLOCK.findall(page.read_text(encoding='utf-8'))
    return [(language, text) for language, text in found if language in languages]


RUN = [page for page in PAGES if blocks(page, 'python')]


@pytest.mark.timeout(300)  # of a busy computer
@pytest.mark.parametrize('page', RUN, ids=name)
def test_blocks_of_a_page_run_as_written(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in blocks(page, 'python', 'sh'):
        if language == 'python':
            exec(compile(text, name(page), 'exec'), names)
            continue
        for line in text.replace('\\\n', ' ').splitlines():
            program, *arguments = shlex.split(line)
            if program == 'cmanp':
                assert cli.main(arguments) == 0, line
                written = [a for a in arguments if a.endswith('.png')]
                assert all((tmp_path / picture).stat().st_size > 10_000 for picture in written)
    assert 'nan' not in capsys.readouterr().out


@cache
def help_of(*command):
    """Return what --help prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        cli.main([*command, '--help'])
    return out.getvalue()


def commands():
    """Return (page, words) of all lines that call cmanp."""
    for page in PAGES:
        for line in COMMAND.findall(page.read_text(encoding='utf-8')):
            words = line.replace('\\\n', ' ').split('#')[0].split()
            if words:
                yield page, words


def test_options_in_commands_exist():
    seen = 0
    for page, words in commands():
        assert words[0] in cli.COMMANDS, f'{name(page)}: cmanp {" ".join(words)}'
        command = words[:2] if words[0] == 'evaluate' else words[:1]
        known = set(OPTION.findall(help_of(*command)))
        for option in OPTION.findall(' '.join(words[1:]).replace(':=', ' ')):
            assert option in known, f'{name(page)}: cmanp {" ".join(words)} has {option}'
            seen += 1
    assert seen > 20


def test_an_option_that_does_not_exist_would_be_found():
    assert OPTION.findall('x.csv --no-such -q 5 -3') == ['--no-such', '-q']
    assert '--no-such' not in help_of('replay')


def test_parameter_files_are_read_by_the_node(tmp_path):
    found = [(page, text) for page in PAGES for _, text in blocks(page, 'yaml')]
    assert found
    for page, text in found:
        file = tmp_path / 'field.yaml'
        file.write_text(text, encoding='utf-8')
        assert parameter_file.read(file).tile_size > 0, name(page)


def test_the_recipe_on_the_page_goes_on_from_what_it_names(tmp_path):
    text = (DOCS / 'training.md').read_text(encoding='utf-8')
    (shown,) = re.findall(r'^    model:\n(?:    .*\n)+', text, re.MULTILINE)
    file = tmp_path / 'my_recipe.yaml'
    file.write_text(textwrap.dedent(shown), encoding='utf-8')
    recipe = load_recipe(file)
    assert recipe.model == load_model(recipe.start_from).config


def anchors(page):
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_links_lead_somewhere():
    count = 0
    for page in [*PAGES, *ROOT.glob('*.md')]:
        text = BLOCK.sub('', page.read_text(encoding='utf-8'))
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if link.startswith('http'):
                continue
            file, _, anchor = link.partition('#')
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f'{name(page)}: {link}'
            if anchor:
                assert anchor in anchors(target), f'{name(page)}: {link}'
            count += 1
    assert count > 30


PROMISED = re.compile(r'(?:\b(test_\w+\.py)(?:\]\([^)]*\))?)?(?:::(test_\w+))?')  # a file, a test


def promised(text):
    """Return (file, test) of all tests that a page names; '' where it names a whole file."""
    names, file = [], ''
    for found, test in PROMISED.findall(text):
        file = found or file
        if found or test:
            names.append((file, test))
    return names


def not_there(names):
    """Return those of `promised` that do not exist."""
    files = {path.name: path for path in (ROOT / 'test').rglob('test_*.py')}
    existing = {
        (name, test)
        for name, path in files.items()
        for test in ('', *re.findall(r'def (test_\w+)\(', path.read_text(encoding='utf-8')))
    }
    return [name for name in names if name not in existing]


def test_tests_that_are_promised_exist():
    text = (DOCS / 'reliability.md').read_text(encoding='utf-8')
    names = promised(text)
    assert {test for _, test in names} >= set(re.findall(r'\btest_\w+(?!\w|\.py)', text))
    assert len(set(names)) > 70
    assert not_there(names) == []


def test_a_promised_test_that_does_not_exist_would_be_found():
    text = '[test_docs.py](../test/unit/test_docs.py)::test_no_such, ::test_links_lead_somewhere'
    assert not_there(promised(text)) == [('test_docs.py', 'test_no_such')]
    assert not_there(promised('see test_no_such.py')) == [('test_no_such.py', '')]


def test_tables_made_from_the_code_are_up_to_date():
    script = runpy.run_path(str(ROOT / 'scripts' / 'write_docs.py'))
    for page in ('parameters.md', 'architecture.md'):
        text = (DOCS / page).read_text(encoding='utf-8')
        assert text == script['written'](page), 'run scripts/write_docs.py'


def test_reference_has_every_module():
    files = (ROOT / 'cmanp_ros').rglob('*.py')
    modules = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
        for path in files
    }
    programs = ('cmanp_ros.cli', 'cmanp_ros.demo')  # --help says what they do
    pages = ''.join(page.read_text(encoding='utf-8') for page in (DOCS / 'api').glob('*.rst'))
    listed = set(re.findall(r'automodule:: (\S+)', pages))
    assert listed == {module for module in modules if not module.startswith(programs)}


def test_pictures_of_the_tutorials_are_small():
    pictures = {
        (page.parent / link).resolve()
        for page in (DOCS / 'tutorials').glob('*.md')
        for link in re.findall(r'!\[[^\]]*\]\(([^)]+)\)', page.read_text(encoding='utf-8'))
    }
    assert len(pictures) >= 3
    for picture in pictures:
        assert picture.stat().st_size < MOST_BYTES, picture.name


def test_version_is_written_in_package_xml_only():
    version = xml.etree.ElementTree.parse(ROOT / 'package.xml').findtext('version')
    assert re.fullmatch(r'\d+\.\d+\.\d+', version)
    assert __version__ == version
    for file in ('pyproject.toml', 'setup.py', 'CMakeLists.txt', 'CITATION.cff', 'docs/conf.py'):
        text = (ROOT / file).read_text(encoding='utf-8')
        assert not re.search(r'^\s*version\s*[:=]\s*["\']?\d', text, re.MULTILINE), file


def test_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
    (paper,) = citation['references']
    assert {'type', 'title', 'authors'} <= paper.keys()
    assert {'type': 'other', 'value': 'arXiv:2305.14567'} in paper['identifiers']


def test_workflow_runs_what_contributors_run():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text(encoding='utf-8'))
    steps = [step for job in workflow['jobs'].values() for step in job['steps']]
    assert any(step.get('run') == '.ci/run' for step in steps)
    assert any('industrial_ci' in step.get('uses', '') for step in steps)
