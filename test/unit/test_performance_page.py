"""docs/performance.md is what its recorded figures give."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def script():
    return runpy.run_path(str(ROOT / 'scripts' / 'write_performance.py'))


def test_page_is_what_its_figures_give(script):
    page = (ROOT / 'docs' / 'performance.md').read_text(encoding='utf-8')
    assert page == script['PAGE'].format(**script['values']())


def test_every_peer_of_the_studies_is_in_the_figures(script):
    found = script['records']()[1:]
    names = {row['implementation'] for row in found if row['study'] == 'condition'}
    assert names == {
        'cmanp',
        'cmanp tiles',
        'eager',
        'LBANP-style',
        'TNP-D-style',
        'sparse GP',
        'exact GP',
    }
    assert {'exact GP', 'Vecchia GP'} <= {
        row['implementation'] for row in found if row['study'] == 'terrain'
    }
