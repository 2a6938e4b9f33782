"""Check that the XML and YAML files of the repository can be parsed."""

import sys
import xml.etree.ElementTree
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PARSERS = {'.xml': xml.etree.ElementTree.parse} | dict.fromkeys(
    ('.cff', '.rviz', '.yaml', '.yml'), yaml.safe_load
)


def main():
    """Print each file that cannot be parsed, and why."""
    paths = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in ('.github', 'config', 'docs', 'examples', 'launch', 'security', 'test'):
        paths += (ROOT / folder).rglob('*')
    faults = 0
    for path in sorted(paths):
        if path.suffix in PARSERS:
            try:
                with path.open('rb') as file:
                    PARSERS[path.suffix](file)
            except (xml.etree.ElementTree.ParseError, yaml.YAMLError) as error:
                faults += 1
                print(f'{path.relative_to(ROOT)}: {error}')
    return 1 if faults else 0


sys.exit(main())
