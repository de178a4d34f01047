"""Files are replaced whole, by however many writers at once."""
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from support.small_disk import largest_file

from timm_dyacts.files import check_output, format_csv, lock, replace_text, write_durably, write_output


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


def test_what_is_wrong_is_said_where_the_writer_says_something_else(tmp_path):
    def write(file):
        try:
            file.write(b'a' * 10 ** 6)
        except OSError:
            raise RuntimeError('unexpected position') from None

    with largest_file(1000), pytest.raises(OSError, match=r"File too large: '.*a\.bin'"):
        write_durably(tmp_path / 'a.bin', write)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match='nothing is wrong with the file'):
        write_durably(tmp_path / 'a.bin', raise_runtime_error)


def raise_runtime_error(file):
    file.write(b'a')
    raise RuntimeError('nothing is wrong with the file')


def test_a_lock_is_held_on_a_full_disk(tmp_path):
    with largest_file(0), lock(tmp_path / '.lock'):
        with pytest.raises(BlockingIOError, match='another process'), lock(tmp_path / '.lock'):
            pass


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path):
    pipe, found = tmp_path / 'pipe', []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    check_output(pipe, '--output')
    write_output(pipe, 'größer')
    reader.join()
    assert found == ['größer'] and stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / 'null').symlink_to('/dev/null')
    for path in ('/dev/null', tmp_path / 'null'):
        check_output(path, '--output')
        write_output(path, 'text')
        assert stat.S_ISCHR(os.stat(path).st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['null', 'pipe']


def test_standard_output_is_written_to(tmp_path):
    """A file that it leads to is not replaced: what else the program prints would be lost."""
    script = "from timm_dyacts.files import write_output; print('a', flush=True); write_output('/dev/stdout', 'b')"
    with open(tmp_path / 'out.txt', 'a') as file:
        subprocess.run([sys.executable, '-c', script], stdout=file, check=True)
    assert 'b' in (tmp_path / 'out.txt').read_text() and stat.S_ISLNK(os.lstat('/dev/stdout').st_mode)


def test_a_file_and_bytes_are_written_in_one_piece(tmp_path):
    check_output(tmp_path / 'a.bin', '--output')
    write_output(tmp_path / 'a.bin', b'\0\xff')
    assert (tmp_path / 'a.bin').read_bytes() == b'\0\xff'
    with largest_file(10), pytest.raises(OSError, match='File too large'):
        write_output(tmp_path / 'a.bin', 'a' * 100)
    assert (tmp_path / 'a.bin').read_bytes() == b'\0\xff' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('name, message', [
    ('.', r"^--output must be a file, got the folder '.*'\.$"),
    ('absent/a.csv', r"^--output must be a file in a folder that exists, got '.*absent/a\.csv'\.$"),
])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, message):
    with pytest.raises(OSError, match=message):
        check_output(tmp_path / name, '--output')


def test_format_csv():
    rows = [dict(model='a, b', top1=1.5), dict(model='c', top1=None)]
    assert format_csv(rows, ['model', 'top1']) == 'model,top1\n"a, b",1.5\nc,\n'
    with pytest.raises(ValueError, match='top1'):
        format_csv(rows, ['model'])
