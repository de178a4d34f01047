"""The table of all cases as a CSV file, and its summary."""
import csv
import io
import math
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path

from ..files import format_csv, replace_text
from .cases import COLUMNS, RESULTS, Row, operations
from .libraries import LIBRARIES
from .workers import DIED

__all__ = ['read_rows', 'summarise', 'write_rows']


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a table, less a last one that was cut off in the middle.

    Raises:
        OSError: It cannot be read, or is no file.
        ValueError: The file is another one, which writing the table would destroy.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise OSError(f'{str(path)!r} is no file, and a table is read again to go on.')
    try:
        text = path.read_text(encoding='utf-8')
        rows = csv.DictReader(io.StringIO(text[:text.rfind('\n') + 1]))
        table = [dict(library='timm') | row for row in rows]  # version 0.1 knew no other library
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f'{str(path)!r} is no table of coverage: {e}') from e
    columns = {'library', *(rows.fieldnames or ())}
    if (text and columns != set(COLUMNS)) or any(None in row or None in row.values() for row in table):
        raise ValueError(f'{str(path)!r} is no table of coverage, whose columns are {", ".join(COLUMNS)}.')
    return table


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a table."""
    replace_text(path, format_csv(rows, COLUMNS))


def summarise(rows: Collection[Row]) -> str:
    """Say, as Markdown, how many of the architectures that contain what an operation replaces convert.

    Below the table stands how far outputs moved where the function was not kept and, if there are any, errors.
    """
    lines = [
        '| library | operation | architectures that contain it | convert | exactly | of the ReLU/ReLU6 CNNs exactly '
        '| refused | out of time or memory |',
        '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    notes = []
    for library in LIBRARIES:
        for operation in operations():
            cases = [row for row in rows if (row['library'], row['operation']) == (library, operation)]
            if cases:
                contain = [row for row in cases if row['contains'] != '0']
                lines.append(f'| {library} ' + _summarise_operation(operation, contain))
                notes += [f'- {library}, {note}' for note in _describe_others(operation, contain)]
    return '\n'.join([*lines, *([''] if notes else []), *notes])


def _summarise_operation(operation: str, contain: list[Row]) -> str:
    relu = [row for row in contain if row['relu_cnn'] == '1']
    having = {result: [row for row in contain if row['result'] == result] for result in RESULTS}
    exact = having['exact']
    return '| ' + ' | '.join((
        f'`{operation}`',
        str(len(contain)),
        _share(sum(map(len, (exact, having['approximate'], having['unchecked']))), len(contain), '{}'),
        _share(len(exact), len(contain), '{}'),
        _share(len([row for row in exact if row['relu_cnn'] == '1']), len(relu), '{} of {}'),
        str(len(having['refused'])),
        str(len([row for row in contain if _ran_out(row)])),
    )) + ' |'


def _share(part: int, whole: int, text: str) -> str:
    return text.format(part, whole) + (f' ({part / whole:.1%})' if whole else '')


def _ran_out(row: Row) -> bool:
    """Say whether a case ended for want of time or memory, where Linux kills the process."""
    return row['result'] == 'timeout' or row['reason'] == f'{DIED} (exit code -9)'


def _describe_others(operation: str, contain: list[Row]) -> list[str]:
    moved = [float(row['difference'] or 'nan') for row in contain if row['result'] == 'approximate']
    moved = [value for value in moved if math.isfinite(value)]  # chaotic networks overflow
    errors = [row['architecture'] for row in contain if row['result'] == 'error' and not _ran_out(row)]
    notes = []
    if moved:
        notes.append(f'`{operation}`, where not exact: median difference {statistics.median(moved):.2g} of the '
                     f'largest output')
    if errors:
        notes.append(f'`{operation}`, errors: {len(errors)} ({", ".join(errors[:5])}{", ..." * (len(errors) > 5)})')
    return notes
