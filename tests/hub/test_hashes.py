"""Hashes, against what git and the standard say of known contents."""
import hashlib

from timm_dyacts.hub.hashes import git_sha1, sha256


def test_of_nothing(tmp_path):
    (tmp_path / 'empty').touch()
    assert sha256(tmp_path / 'empty') == 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    assert git_sha1(tmp_path / 'empty') == 'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'


def test_as_git_hash_object_has_it(tmp_path):
    (tmp_path / 'text').write_bytes(b'test content\n')
    assert git_sha1(str(tmp_path / 'text')) == 'd670460b4b4aece5915caf5c68d12f560a9fe3e4'


def test_of_a_file_in_pieces(tmp_path):
    content = bytes(range(256)) * 2 ** 13 + b'x'
    (tmp_path / 'large').write_bytes(content)
    assert sha256(tmp_path / 'large') == hashlib.sha256(content).hexdigest()
