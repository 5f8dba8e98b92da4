"""Text is read in a fixed order, and every failure has its message."""

from __future__ import annotations

import errno
import gzip
import os
import pydoc_data.topics
import shutil
import subprocess
import sysconfig
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_core.config import DataConfig
from glm_core.data import cache, corpus, documentation, tokenizer
from glm_core.data.open import open_sampler
from glm_core.errors import DataError

WORDS = "one two three four five six seven eight nine ten.\n" * 40


def load(path: Path, **fields: Any) -> corpus.Corpus:
    return corpus.load(DataConfig(path=str(path), **fields), path.parent)


def refused(path: Path, **fields: Any) -> str:
    """The one line that `load` raises, without the folder."""
    with pytest.raises(DataError) as error:
        load(path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


def test_text_file_is_kept_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff猫\r\n\tx ".encode())
    got = load(tmp_path / "a.txt")
    assert got.documents == ["\ufeff猫\r\n\tx "]
    assert got.parts == {"a.txt": 7}


def test_folder_is_read_in_order_and_to_its_depth(tmp_path: Path) -> None:
    for name, text in [("b/c.txt", "two"), ("a.txt", "one"), ("z.jsonl", '{"text": "three"}\n')]:
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(text)
    (tmp_path / "top/.hidden").write_bytes(b"\0")
    (tmp_path / "top/empty.txt").touch()
    got = load(tmp_path / "top")
    assert got.documents == ["one", "two", "three"]
    (tmp_path / "top/a.txt").write_text("on")
    (tmp_path / "top/b/c.txt").write_text("etwo")
    assert load(tmp_path / "top").sha256 != got.sha256, "the hash sees where documents end"


def test_jsonl_takes_the_named_field_of_every_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x\\ny"}\n\n{"body": "", "other": 1}\n{"body": "z"}')
    assert load(path, text_key="body").documents == ["x\ny", "z"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"t": 1}', "a.jsonl:2: no field 'text', the fields are t; set data.text_key"),
        ("{}", "a.jsonl:2: no field 'text', the fields are none; set data.text_key"),
        ('{"text": 3}', "a.jsonl:2: field 'text' is int, not text; set data.text_key"),
        ("[1]", "a.jsonl:2: expected an object, received list; write {...}"),
        (
            '{"text": "\\ud800"}',
            "a.jsonl:2: half a surrogate pair in 'text'; write the character itself",
        ),
        (
            '{"text": ',
            "a.jsonl:2: not JSON (Expecting value: line 1 column 10 (char 9)); "
            "every line must be one JSON object",
        ),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    assert refused(tmp_path / "a.jsonl") == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a: holds no text; give a file, a JSONL file or a folder with text in it"),
        (b" \n\t", "a: holds no text; give a file, a JSONL file or a folder with text in it"),
        (b"abc\0\xff", "a: binary, NUL at byte 3; give plain text in UTF-8"),
        (
            b"abc\xe4\xbdz",
            "a: not UTF-8 at byte 3 (invalid continuation byte); "
            "convert it, for example with iconv",
        ),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    assert refused(tmp_path / "a") == message


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    nothing = "holds no text; give a file, a JSONL file or a folder with text in it"
    advice = "no such file or folder; pass text, JSONL or a folder of them"
    assert refused(tmp_path / "nowhere") == f"nowhere: {advice}"
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path / "folder") == f"folder: {nothing}"


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("text")

    def refuse(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refused(tmp_path / "a") == "a: cannot be read (Permission denied); check the path"


def test_too_small_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1 2")
    with pytest.raises(DataError) as error:
        open_sampler(DataConfig(path=str(tmp_path / "a")), 0, tmp_path)
    assert str(error.value) == (
        "corpus: 3 tokens, data.length=128 needs at least as many; "
        "give more text or a smaller data.length"
    )


def test_second_opening_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text(WORDS)
    config = DataConfig(path=str(tmp_path / "a"), length=32, vocab=320)
    first = open_sampler(config, 1, tmp_path / "cache").next(4)
    monkeypatch.setattr(tokenizer, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(tokenizer.Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    sampler = open_sampler(config, 1, tmp_path / "cache")
    assert sampler.next(4).tokens.tolist() == first.tokens.tolist()
    assert isinstance(sampler._tokens, np.memmap)
    assert sampler.corpus["parts"] == {"a": len(WORDS)}
    assert sampler.corpus["documents"] == 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_positions_follow_the_model(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(WORDS)
    config = DataConfig(path=str(tmp_path / "a"), length=32, vocab=320, gmask_prob=1)
    one, two = (open_sampler(config, 1, tmp_path, positions=p).next(1) for p in ("rope", "rope_2d"))
    assert one.tokens.tolist() == two.tokens.tolist()
    targets = one.loss_weight[0].bool()
    assert (one.positions[0, 0, targets].diff() == 1).all()
    assert (two.positions[0, 0, targets].diff() == 0).all()
    assert (two.positions[0, 1, targets].diff() == 1).all()


def test_a_damaged_cache_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(WORDS)
    config = DataConfig(path=str(tmp_path / "a"), length=32, vocab=320)
    open_sampler(config, 1, tmp_path)
    (path,) = tmp_path.glob("tokens-*.npy")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=rf"^{path}: cannot be read \(.*\); delete it$"):
        open_sampler(config, 1, tmp_path)


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError) as error:
        cache.once(tmp_path / "x", lambda: b"content")
    advice = "free space or choose another cache folder"
    assert str(error.value) == (
        f"{tmp_path}/x: cannot be written (No space left on device); {advice}"
    )
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_of_several_at_once_one_makes_the_file(tmp_path: Path) -> None:
    made: list[int] = []
    both = threading.Barrier(2)

    def make() -> bytes:
        made.append(1)
        return bytes(made)

    def build() -> None:
        both.wait(timeout=60)
        cache.once(tmp_path / "x", make)

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x").read_bytes() == b"\1"
    assert made == [1]


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two modules, and a PATH with no program on it."""
    library = tmp_path / "lib"
    (library / "pack/test").mkdir(parents=True)
    (library / "pack/__init__.py").write_text(
        '"""The pack."""\nclass A:\n    def b(self, x=1):\n        """Does \\d b."""\n'
    )
    (library / "pack/test/t.py").write_text('"""Not this."""\n')
    (library / "bare.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def test_without_apt_python_alone_is_read_and_it_is_said(
    small_library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = corpus.load(DataConfig(), small_library / "cache")
    assert set(got.parts) == {"python topics", "python docstrings"}
    assert got.documents[-1] == "pack\nThe pack.\n\npack.A.b(self, x=1)\nDoes \\d b.\n"
    assert got.missing == dict.fromkeys(documentation.PACKAGES, "apt-get is not installed")
    (line,) = capsys.readouterr().err.splitlines()
    (path,) = (small_library / "cache").glob("documentation-*.json")
    assert line.startswith("data: corpus without manpages-zh: apt-get is not installed; fortunes")
    assert line.endswith(f"; delete {path} to try again")
    assert corpus.load(DataConfig(), small_library / "cache") == got


def test_a_failing_apt_gives_its_last_line(small_library: Path) -> None:
    apt = small_library / "bin/apt-get"
    apt.write_text("#!/bin/sh\necho first >&2\necho 'E: Unable to locate package' >&2\nexit 100\n")
    apt.chmod(0o755)
    missing = corpus.load(DataConfig(), small_library / "cache").missing
    assert missing["fortunes-zh"] == "apt-get failed (E: Unable to locate package)"


def test_an_apt_that_hangs_is_given_up(
    small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt = small_library / "bin/apt-get"
    apt.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    apt.chmod(0o755)
    monkeypatch.setattr(documentation, "APT_TIMEOUT_S", 0.1)
    missing = corpus.load(DataConfig(), small_library / "cache").missing
    assert "timed out after 0.1 seconds" in missing["manpages-zh"]


PAGE = r""".\" a comment
.de XX
\\$1 macro body
..
.TH LS 1 "2022年"
.SH 名称
ls \- 列出\fB目录\fP内容
.PP
.B \-\-all
.TP 4
.IP "a b" 2
"""


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="needs dpkg-deb to build a package")
def test_debian_packages_are_fetched_and_unpacked(
    small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = small_library / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: all-zh\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\n"
        "Description: x\n"
    )
    share = tree / "usr/share"
    for folder in ("man/zh_CN/man1", "man/zh_TW/man1", "games/fortunes", "debian-reference"):
        (share / folder).mkdir(parents=True)
    (share / "man/zh_CN/man1/ls.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    (share / "man/zh_TW/man1/ls.1.gz").write_bytes(gzip.compress(b"converted"))
    (share / "games/fortunes/tang300").write_text("\x1b[32m《诗》\x1b[m\n床前\n%\n明月\n")
    (share / "games/fortunes/tang300.dat").write_bytes(b"\0")
    book = gzip.compress("前言\n1.1. 甲\n一\n1.2. 乙\n二".encode())
    (share / "debian-reference/debian-reference.zh-cn.txt.gz").write_bytes(book)
    monkeypatch.setenv("PATH", f"{small_library}/bin:/usr/bin:/bin")
    deb = small_library / "one.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    apt = small_library / "bin/apt-get"
    apt.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {deb} "$last.deb"\n')
    apt.chmod(0o755)
    texts, missing = documentation.read(small_library / "cache")
    assert missing == {}
    assert texts["manpages-zh"] == ["LS 1 2022年\n\n名称\nls - 列出目录内容\n--all\na b 2\n"]
    assert texts["fortunes-zh"] == ["《诗》\n床前", "明月\n"]
    assert texts["debian-reference-zh-cn"] == ["前言", "1.1. 甲\n一", "1.2. 乙\n二"]
    unpacked = [p for p in (small_library / "cache").iterdir() if p.is_dir()]
    assert not unpacked, "nothing unpacked is left behind"


def test_real_text_from_python_topics(tmp_path: Path) -> None:
    """The language reference is tokenized, sampled, and read back from the sampled text."""
    topics = pydoc_data.topics.topics
    (tmp_path / "topics").mkdir()
    for name, text in topics.items():
        (tmp_path / "topics" / name).write_text(text, encoding="utf-8")
    config = DataConfig(path=str(tmp_path / "topics"), vocab=1000)
    sampler = open_sampler(config, 0, tmp_path / "cache")
    assert sampler.corpus["documents"] == len(topics)
    assert sampler.tokenizer.vocab == 1000
    whole = "\n".join(topics.values())
    assert sampler.corpus["tokens"] < len(whole) / 2, "the tokenizer has learned words"
    batch = sampler.next(8)
    first = batch.tokens[batch.positions[:, 1] > 0].tolist()
    words = sampler.tokenizer.decode(first).split()
    assert sum(word in whole for word in words) > len(words) / 2
