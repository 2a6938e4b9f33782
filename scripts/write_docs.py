"""
Write what is generated in docs/: the tables of docs/parameters.md and docs/architecture.md.

A test compares; the text around the tables is written by hand.
"""

import ast
import re
from pathlib import Path

from cmanp_ros.parameters import SOURCE_TABLE, TABLE, markdown_table

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PACKAGE = ROOT / 'cmanp_ros'


def module_table(folder: str) -> str:
    """
    Make a table of modules with the first paragraph of their docstrings.

    :param folder: below the package; '.' for the package itself.
    """
    lines = ['| module | |', '|---|---|']
    for path in sorted((PACKAGE / folder).glob('*.py')):
        text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
        if text is None or path.name == '__init__.py':
            continue
        summary = ' '.join(text.split('\n\n')[0].split()).rstrip('.:')
        name = path.relative_to(PACKAGE).with_suffix('').as_posix()
        lines.append(f'| `{name}` | {summary} |')
    return '\n'.join(lines) + '\n'


def tables(page: str) -> dict[str, str]:
    """Return name -> table of all that a page has."""
    if page == 'parameters.md':
        return {
            'parameters': markdown_table(TABLE),
            'source_parameters': markdown_table(SOURCE_TABLE),
        }
    folders = [path.name for path in sorted(PACKAGE.iterdir()) if (path / '__init__.py').is_file()]
    return {'.': module_table('.')} | {folder: module_table(folder) for folder in folders}


def written(page: str) -> str:
    """Return a page with its tables as they should be."""
    text = (DOCS / page).read_text(encoding='utf-8')
    for name, table in tables(page).items():
        start, end = f'<!-- {name}: made by scripts/write_docs.py -->\n', f'<!-- end of {name} -->'
        pattern = re.compile(f'(?<={re.escape(start)}).*?(?={re.escape(end)})', re.DOTALL)
        text, count = pattern.subn(lambda _, table=table: f'\n{table}\n', text)
        if count != 1:
            raise SystemExit(f'docs/{page} has {count} places for {name}: expected {start!r}')
    return text


def main():
    """Write the pages that have tables."""
    for page in ('parameters.md', 'architecture.md'):
        (DOCS / page).write_text(written(page), encoding='utf-8')


if __name__ == '__main__':
    main()
