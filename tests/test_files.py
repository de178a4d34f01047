"""Files are replaced whole, by however many writers at once."""
import multiprocessing
import os
import stat
import threading
import time

import pytest

from timm_dyacts.files import format_csv, replace_text, write_durably


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Set the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def write_again_and_again(path, letter, start):
    start.wait()
    for _ in range(50):
        replace_text(path, letter * 100_000)


def test_the_text_is_there_in_utf_8_and_nothing_else(tmp_path):
    replace_text(tmp_path / 'a.txt', 'Größe\n')
    replace_text(str(tmp_path / 'a.txt'), 'größer\n')
    assert (tmp_path / 'a.txt').read_bytes() == 'größer\n'.encode()
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']


def test_the_umask_gives_the_mode(tmp_path, umask):
    replace_text(tmp_path / 'a.txt', 'a')
    assert mode(tmp_path / 'a.txt') == 0o644
    umask(0o077)
    write_durably(tmp_path / 'b.bin', lambda file: file.write(b'b'))
    replace_text(tmp_path / 'a.txt', 'b')
    assert mode(tmp_path / 'a.txt') == mode(tmp_path / 'b.bin') == 0o600


def test_it_is_on_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def note_size(descriptor):
        done.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', note_size)
    monkeypatch.setattr(os, 'replace', lambda *paths: (done.append('replaced'), replace(*paths)))
    write_durably(tmp_path / 'a.bin', lambda file: file.write(b'12345'))
    assert done == [5, 'replaced']


@pytest.mark.parametrize('error', [OSError('No space left on device'), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_content_and_no_trace(tmp_path, error):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')

    def fail(file):
        file.write(b'half')
        raise error

    with pytest.raises(type(error)):
        write_durably(path, fail)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_no_trace(tmp_path):
    (tmp_path / 'folder' / 'inside').mkdir(parents=True)
    with pytest.raises(OSError):
        replace_text(tmp_path / 'folder', 'text')
    assert [path.name for path in tmp_path.iterdir()] == ['folder']


def test_what_a_killed_process_left_is_removed_when_nobody_can_be_writing_it(tmp_path):
    long_ago = time.time() - 2 * 3600
    names = ['a.txt.0123456789abcdef.tmp', 'b.txt.0123456789abcdef.tmp', 'a.txt.mine.tmp', 'a.txt.tmp']
    for name in names:
        (tmp_path / name).write_text('half')
        os.utime(tmp_path / name, (long_ago, long_ago))
    (tmp_path / 'a.txt.fedcba9876543210.tmp').write_text('somebody is writing')
    replace_text(tmp_path / 'a.txt', 'a')
    assert {path.name for path in tmp_path.iterdir()} == {'a.txt', 'a.txt.fedcba9876543210.tmp', *names[1:]}


def test_no_folder_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'):
        replace_text(tmp_path / 'absent' / 'a.txt', 'a')


def test_two_processes_write_the_same_file(tmp_path):
    """Neither takes the other's file away, and whoever reads meanwhile finds one of the two texts."""
    path = tmp_path / 'a.txt'
    replace_text(path, 'a' * 100_000)
    context = multiprocessing.get_context('fork')
    start = context.Barrier(3)
    writers = [context.Process(target=write_again_and_again, args=(path, letter, start)) for letter in 'ab']
    for writer in writers:
        writer.start()
    start.wait()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in ('a' * 100_000, 'b' * 100_000)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_two_threads_write_the_same_file(tmp_path):
    """Both are in the middle of it at the same time."""
    path = tmp_path / 'a.bin'
    meet = threading.Barrier(2, timeout=30)

    def write(letter):
        def content(file):
            file.write(letter * 1000)
            meet.wait()
        write_durably(path, content)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b'a', b'b')]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b'a' * 1000, b'b' * 1000) and list(tmp_path.iterdir()) == [path]


def test_format_csv():
    rows = [dict(model='a, b', top1=1.5), dict(model='c', top1=None)]
    assert format_csv(rows, ['model', 'top1']) == 'model,top1\n"a, b",1.5\nc,\n'
    with pytest.raises(ValueError, match='top1'):
        format_csv(rows, ['model'])
