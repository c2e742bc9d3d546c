import hashlib
import io
import random
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_learning.training.data import Corpus, Document, download, load_corpus
from nested_learning.training.data.sources import split_documents
from nested_learning.training.data.stdlib import stdlib_documents


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus("stdlib")


# stdlib


def test_stdlib_is_english_and_code_of_several_megabytes(stdlib):
    names = [d.name for d in stdlib.train + stdlib.validation]
    size = sum(len(d.text.encode()) for d in stdlib.train + stdlib.validation)
    held_out = sum(len(d.text.encode()) for d in stdlib.validation)
    assert 4e6 < size < 4e7
    assert 0.04 < held_out / size < 0.16
    assert "argparse.py" in names
    assert sum(name.startswith("pydoc_data/topics.py#") for name in names) > 20
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}


def test_stdlib_is_deterministic_and_imports_nothing(stdlib):
    before = set(sys.modules)
    again = load_corpus("stdlib")
    assert set(sys.modules) == before
    assert again == stdlib
    assert again.fingerprint() == stdlib.fingerprint()
    assert Corpus(stdlib.train[1:], stdlib.validation).fingerprint() != stdlib.fingerprint()


def paragraphs(documents):
    return {p.strip() for d in documents for p in d.text.split("\n\n") if len(p.strip()) >= 200}


def test_stdlib_validation_is_new_text(stdlib):
    assert not {d.name for d in stdlib.train} & {d.name for d in stdlib.validation}
    known = paragraphs(stdlib.train)
    held_out = paragraphs(stdlib.validation)
    assert len(held_out & known) < 0.03 * len(held_out)  # the library repeats some of its own code
    for document in stdlib.validation:
        own = paragraphs([document])
        assert len(own & known) <= 0.5 * len(own), document.name


@pytest.fixture
def small_python(tmp_path):
    """A Python installation with few, odd and broken files."""
    files = {
        "alpha.py": '"""Docstring."""\r\nx = 1\r\n',
        "package/beta.py": "raise SystemExit('imported')\n",
        "package/empty.py": "",
        "package/latin.py": "# caf\xe9".encode("latin-1"),
        "broken.py": "def f(:\n",
        "test/test_alpha.py": "skipped",
        "site-packages/other.py": "skipped",
        "_sysconfigdata_linux.py": "skipped",
        "notes.txt": "skipped",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_stdlib_of_an_odd_installation(small_python):
    assert dict(stdlib_documents(small_python)) == {
        "alpha.py": '"""Docstring."""\nx = 1\n',
        "package/beta.py": "raise SystemExit('imported')\n",
        "broken.py": "def f(:\n",
    }


def test_topics_that_a_longer_one_contains_are_left_out(small_python):
    first, second, third = ("".join(f"{word} {i} " for i in range(30)) for word in ("one", "two", "three"))
    topics = {"all": f"{first}\n\n{second}", "part": second, "other": third}
    (small_python / "pydoc_data").mkdir()
    (small_python / "pydoc_data/topics.py").write_text(f"# generated\ntopics = {topics!r}\n")
    found = {name: text for name, text in stdlib_documents(small_python) if "#" in name}
    assert found == {"pydoc_data/topics.py#all": topics["all"], "pydoc_data/topics.py#other": third}


@pytest.mark.parametrize("content", ["topics = make()\n", "topics = {", "other = 1\n", "topics = [1]\n"])
def test_unexpected_topics_are_left_out(small_python, content):
    (small_python / "pydoc_data").mkdir()
    (small_python / "pydoc_data/topics.py").write_text(content)
    assert len(list(stdlib_documents(small_python))) == 3


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--data PATH"):
        list(stdlib_documents(tmp_path))


def test_max_bytes_caps_the_whole(stdlib):
    capped = load_corpus("stdlib", max_bytes=300_000)
    documents = capped.train + capped.validation
    assert sum(len(d.text.encode()) for d in documents) == pytest.approx(300_000, abs=3)
    everything = {d.name: d.text for d in stdlib.train + stdlib.validation}
    assert all(everything[d.name.removesuffix(" (tail)")].find(d.text) >= 0 for d in documents)


# tinyshakespeare


def test_tinyshakespeare_is_split_at_nine_tenths(shakespeare_path, monkeypatch):
    monkeypatch.setenv("NESTED_LEARNING_DATA", str(shakespeare_path.parent))
    corpus = load_corpus("tinyshakespeare")
    text = shakespeare_path.read_bytes().decode()
    assert corpus.train[0].text == text[:1_003_854]
    assert corpus.validation[0].text == text[1_003_854:]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv("NESTED_LEARNING_DATA", raising=False)
    monkeypatch.setenv("NESTED_LEARNING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_play(monkeypatch):
    """Stands in for the real file, of which the tests must not depend on having a copy."""
    content = b"To be, or not to be.\n" * 50
    monkeypatch.setattr(download, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_tinyshakespeare_is_downloaded_once(cache, small_play, monkeypatch):
    asked = []

    def answer(request, timeout):
        asked.append(request.full_url)
        return io.BytesIO(small_play)

    monkeypatch.setattr(download, "urlopen", answer)
    for _ in range(2):
        corpus = load_corpus("tinyshakespeare")
        assert (corpus.train[0].text + corpus.validation[0].text).encode() == small_play
    assert len(asked) == 1
    assert asked[0].startswith("https://")
    assert [p.name for p in cache.iterdir()] == ["tinyshakespeare.txt"]  # no temporary file left


def test_no_network_names_the_way_out(cache, monkeypatch):
    def refuse(request, timeout):
        raise URLError("no route to host")

    monkeypatch.setattr(download, "urlopen", refuse)
    with pytest.raises(download.DownloadError, match=r"no route to host.*--data PATH"):
        load_corpus("tinyshakespeare")
    assert not cache.exists()


def test_a_wrong_download_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(download, "urlopen", lambda request, timeout: io.BytesIO(b"<html>sign in</html>"))
    with pytest.raises(ValueError, match=r"sha256 \w+, expected 86c4e6aa"):
        load_corpus("tinyshakespeare")
    assert not cache.exists()


def test_a_changed_file_is_refused(cache):
    cache.mkdir()
    (cache / "tinyshakespeare.txt").write_text("Enter a clown.")
    with pytest.raises(ValueError, match=r"tinyshakespeare\.txt is not Tiny Shakespeare"):
        load_corpus("tinyshakespeare")


def test_a_cache_that_cannot_be_written(cache, small_play, monkeypatch):
    monkeypatch.setattr(download, "urlopen", lambda request, timeout: io.BytesIO(small_play))
    cache.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="NESTED_LEARNING_CACHE"):
        load_corpus("tinyshakespeare")


# files, folders, globs


def write_files(folder: Path, count: int) -> dict[str, str]:
    draw = random.Random(count)
    texts = {f"part/{i:02}.txt": f"file {i} " * draw.randint(5, 50) for i in range(count)}
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return texts


def test_one_file_gives_its_tail(tmp_path):
    text = "".join(random.Random(0).choices("aé学🧠\r\n ", k=1000))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    corpus = load_corpus(str(tmp_path / "a.txt"), validation_fraction=0.2)
    assert corpus == Corpus([Document("a.txt", text[:800])], [Document("a.txt (tail)", text[800:])])


def test_many_files_are_split_whole(tmp_path):
    texts = write_files(tmp_path, 30)
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "part" / "empty.txt").write_text("")
    corpus = load_corpus(str(tmp_path))
    assert dict(corpus.train) | dict(corpus.validation) == texts
    assert (len(corpus.train), len(corpus.validation)) == (27, 3)
    names = [d.name for d in corpus.train]
    assert names == sorted(names)


def test_few_files_give_their_tails(tmp_path):
    texts = write_files(tmp_path, 9)
    corpus = load_corpus(str(tmp_path))
    assert {h.name: h.text + t.text for h, t in zip(corpus.train, corpus.validation, strict=True)} == texts


def test_a_glob_chooses(tmp_path):
    texts = write_files(tmp_path, 12)
    (tmp_path / "part" / "image.png").write_bytes(b"\x89PNG\0\xff")
    corpus = load_corpus(str(tmp_path / "**" / "*.txt"))
    assert sorted(d.text for d in corpus.train + corpus.validation) == sorted(texts.values())
    with pytest.raises(ValueError, match=r"no file matches .*\*\.md"):
        load_corpus(str(tmp_path / "*.md"))


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9), st.floats(0.01, 0.5))
def test_heads_and_tails_are_the_text(texts, fraction):
    corpus = split_documents([Document(str(i), text) for i, text in enumerate(texts)], fraction)
    heads, tails = dict(corpus.train), dict(corpus.validation)
    assert [heads.get(str(i), "") + tails.get(f"{i} (tail)", "") for i in range(len(texts))] == texts


@given(st.sets(st.text(min_size=1), min_size=10, max_size=40), st.floats(0.01, 0.5), st.randoms())
def test_the_split_depends_on_names_alone(names, fraction, random):
    documents = [Document(name, "text") for name in sorted(names)]
    corpus = split_documents(documents, fraction)
    assert len(corpus.validation) == max(1, round(fraction * len(names)))
    assert sorted(corpus.train + corpus.validation) == documents
    random.shuffle(documents)
    assert sorted(split_documents(documents, fraction).validation) == corpus.validation


@pytest.mark.parametrize("max_bytes", range(1, 12))
def test_max_bytes_cuts_between_characters(tmp_path, max_bytes):
    text = "é学🧠ab"  # 2 + 3 + 4 + 1 + 1 bytes
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    expected = text.encode()[:max_bytes].decode(errors="ignore")
    if not expected:
        with pytest.raises(ValueError, match="empty"):
            load_corpus(str(tmp_path / "a.txt"), max_bytes=max_bytes)
        return
    corpus = load_corpus(str(tmp_path / "a.txt"), max_bytes=max_bytes)
    assert "".join(d.text for d in corpus.train + corpus.validation) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ab\xffcd", "byte 2 is not UTF-8"),
        (b"ab\xe5\xad", "byte 2 is not UTF-8"),
        (b"ab\0cd", "character 2 is NUL"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "odd.bin").write_bytes(content)
    for source in (tmp_path / "odd.bin", tmp_path):
        with pytest.raises(ValueError, match=message) as error:
            load_corpus(str(source))
        assert str(tmp_path) in str(error.value)


def test_unknown_and_empty_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'tinyshakespeare'"):
        load_corpus("tinyshakspeare")
    with pytest.raises(ValueError, match="no file or folder"):
        load_corpus(str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="holds no files"):
        load_corpus(str(tmp_path))
