"""checkpoint/hub.py：下载记录里的 SHA-256 什么时候算数，与 huggingface_hub 自己的规则相同。"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import _local_folder

from deepseek_export.checkpoint.hub import published_sha256

pytestmark = pytest.mark.unit

SHA256, SHA1 = "0123456789abcdef" * 4, "0123456789" * 4
XET = "fedcba9876543210" * 4
NAME = "model-00001-of-00002.safetensors"


def downloaded(folder: Path, name: str = NAME, etag: str = SHA256) -> Path:
    """下载到 ``folder`` 的一个文件，连同 huggingface_hub 自己写的记录。"""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"weights")
    _local_folder.write_download_metadata(folder, name, SHA1, etag)
    return file


def record_of(file: Path) -> Path:
    return file.parent / f".cache/huggingface/download/{file.name}.metadata"


def snapshot(root: Path, blob: str, repository: str = "models--x--y", shared: bool = False) -> Path:
    """缓存里的一个文件；``shared`` 的 blob 又指向各仓库共用的一份。"""
    file, stored = root / repository / "snapshots/main" / NAME, root / repository / "blobs" / blob
    file.parent.mkdir(parents=True)
    stored.parent.mkdir()
    if shared:
        common = root / "blobs" / XET[:2] / XET
        common.parent.mkdir(parents=True)
        common.write_bytes(b"weights")
        stored.symlink_to(Path("../../blobs") / XET[:2] / XET)
    else:
        stored.write_bytes(b"weights")
    file.symlink_to(Path("../../blobs") / blob)
    return file


class TestCache:
    """缓存里的快照。"""

    def test_the_blob_is_named_after_its_content(self, tmp_path):
        assert published_sha256(snapshot(tmp_path, SHA256)) == SHA256

    def test_a_shared_blob_has_the_name_of_the_repositorys_own_link(self, tmp_path):
        """共用的那一份以 Xet 的哈希为名，也是 64 位：不能当作 SHA-256。"""
        assert published_sha256(snapshot(tmp_path, SHA256, shared=True)) == SHA256

    def test_the_folder_itself_may_be_a_link(self, tmp_path):
        link = tmp_path / "ckpt"
        link.symlink_to(snapshot(tmp_path / "cache", SHA256).parent)
        assert published_sha256(link / NAME) == SHA256

    def test_a_git_hash_is_of_no_use(self, tmp_path):
        assert published_sha256(snapshot(tmp_path, SHA1)) is None

    @pytest.mark.parametrize("blob", [SHA256.upper(), f"{SHA256}.incomplete"])
    def test_other_names_are_of_no_use(self, tmp_path, blob):
        assert published_sha256(snapshot(tmp_path, blob)) is None

    def test_a_folder_that_only_looks_like_a_cache(self, tmp_path):
        assert published_sha256(snapshot(tmp_path, SHA256, repository="mine")) is None

    def test_links_that_go_in_circles(self, tmp_path):
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        assert published_sha256(tmp_path / "a") is None


class TestRecord:
    """下载到目录的记录。"""

    @pytest.mark.parametrize("name", [NAME, f"fp8/{NAME}"])
    def test_a_fresh_download(self, tmp_path, name):
        assert published_sha256(downloaded(tmp_path, name)) == SHA256

    @pytest.mark.parametrize("later", [-3600.0, 0.0, 0.5, 1.5, 3600.0])
    def test_a_later_change_ends_it_as_for_the_hub_itself(self, tmp_path, later):
        """mtime 晚于记录一秒以上就不算数；与 huggingface_hub 的判断逐个相同。"""
        file = downloaded(tmp_path)
        moment = float(record_of(file).read_text().splitlines()[2]) + later
        os.utime(file, (moment, moment))
        found = _local_folder.read_download_metadata(tmp_path, NAME)
        assert published_sha256(file) == (found and found.etag)
        assert (found is None) == (later > 1)

    def test_a_git_hash_is_of_no_use(self, tmp_path):
        assert published_sha256(downloaded(tmp_path, etag=SHA1)) is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            f"{SHA1}\n{SHA256}",
            f"{SHA1}\n{SHA256}\nsoon\n",
            f"{SHA1}\n{SHA256}\ninf\n",
            f"{SHA1}\n{SHA256}\nnan\n",
        ],
    )
    def test_a_broken_record_is_none(self, tmp_path, text):
        file = downloaded(tmp_path)
        record_of(file).write_text(text)
        assert published_sha256(file) is None

    @pytest.mark.parametrize("odd", ["folder", "binary", "pipe"])
    def test_an_odd_record_is_none(self, tmp_path, odd):
        file = downloaded(tmp_path)
        record = record_of(file)
        record.unlink()
        if odd == "folder":
            record.mkdir()
        elif odd == "pipe":
            os.mkfifo(record)
        else:
            record.write_bytes(b"\xff\xfe\n" * 3)
        assert published_sha256(file) is None

    def test_no_record(self, tmp_path):
        (tmp_path / NAME).write_bytes(b"weights")
        assert published_sha256(tmp_path / NAME) is None
