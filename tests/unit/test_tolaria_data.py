"""Data sets: the restricted reader, files that are missing or damaged, splits, batches."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.chassis.config.schema import DataConfig
from services.tolaria.data import cifar, digits, restricted_pickle, splits
from services.tolaria.data.batches import Batches
from services.tolaria.data.cifar import CIFAR10, CifarLayout
from services.tolaria.data.splits import Normalization, Split
from services.tolaria.errors import (
    DataCorruptError,
    DataError,
    DataMissingError,
    FactoryError,
    TestSetTouchedError,
)
from services.tolaria.seeds import derive


def as_python2(images: np.ndarray[Any, Any], labels: list[int], label_key: bytes) -> bytes:
    """A batch in the opcodes of the official files, which Python 2's cPickle wrote."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    content = images.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R("
        b"K\x01" + number(images.shape[0]) + number(images.shape[1]) + b"\x86"
        b"cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(content).to_bytes(4, "little") + content + b"tb"
    )
    items = b"".join(b"K" + bytes([label]) for label in labels)
    body = short(b"data") + array + short(label_key) + b"](" + items + b"e" + short(b"batch_label") + short(b"x")
    return b"\x80\x02}(" + body + b"u."


def write_cifar(folder: Path, layout: CifarLayout = CIFAR10, count: int = 6) -> CifarLayout:
    """A small data set with the shape of ``layout`` below ``folder``; returns the layout with its MD5 sums."""
    generator = np.random.default_rng(0)
    (folder / layout.folder).mkdir(parents=True)
    sums = {}
    for name in layout.files:
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        data = as_python2(images, [int(label) for label in generator.integers(0, 10, count)], layout.label_key)
        (folder / layout.folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()  # noqa: S324 - what the publisher uses
    return replace(layout, files=sums)


# ---- the restricted reader ---------------------------------------------------------------------------------------


def test_restricted_reader_agrees_with_pickle_on_the_official_opcodes() -> None:
    images = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    data = as_python2(images, [3, 7], b"labels")
    found = restricted_pickle.read(data)
    expected = pickle.loads(data, encoding="bytes")  # noqa: S301 - made above
    assert found.keys() == expected.keys()
    assert np.array_equal(found[b"data"], expected[b"data"])
    assert found[b"labels"] == [3, 7]


def test_restricted_reader_keeps_fortran_order_and_single_items() -> None:
    content = {"a": 1, "b": True, "c": None, "d": [5], "e": 300}
    found = restricted_pickle.read(_python2_like(content))
    assert found == {b"a": 1, b"b": True, b"c": None, b"d": [5], b"e": 300}


def _python2_like(content: dict[str, Any]) -> bytes:
    out = b"\x80\x02}q\x00h\x00"  # the dictionary, memoized and fetched again
    out = b"\x80\x02}q\x00"
    for key, value in content.items():
        out += b"U\x01" + key.encode()
        if value is None:
            out += b"N"
        elif value is True:
            out += b"\x88"
        elif isinstance(value, list):
            out += b"]r\x01\x00\x00\x00K" + bytes([value[0]]) + b"aj\x01\x00\x00\x00"
            out = out.removesuffix(b"j\x01\x00\x00\x00")
        else:
            out += b"M" + value.to_bytes(2, "little")
        out += b"s"
    return out + b"."


class _Innocent:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled!')",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(_Innocent(), protocol=2), "the name"),
        (pickle.dumps(_Innocent(), protocol=4), "opcode"),
        (b"\x80\x02cos\nsystem\nU\x02ls\x85R.", "the name 'os system'"),
        (b"\x80\x02K\x01K\x02\x85R.", "a call of something that is no name"),
        (b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "a call of 'numpy dtype'"),
        (b"\x80\x02}K\x01b.", "state for something that is no array"),
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
            "opcode",
        ),
        (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nK\x00\x85R(K\x01K\x01\x85K\x00\x89U\x01xtb.",
            "unsigned bytes",
        ),
        (b"\x80\x02}(U\x04dataK\x01", "truncated or damaged"),
        (b"", "truncated or damaged"),
        (b"\x80\x02K\x01.", "instead of a dictionary"),
        (b"\x80\x02h\x07.", "truncated or damaged"),
        (b"\x80\x02t.", "truncated or damaged"),
    ],
)
def test_restricted_reader_refuses(data: bytes, message: str) -> None:
    with pytest.raises(DataCorruptError, match=message):
        restricted_pickle.read(data)


# ---- cifar -------------------------------------------------------------------------------------------------------


def test_cifar_reads_training_and_test(tmp_path: Path) -> None:
    layout = write_cifar(tmp_path)
    images, labels = cifar.read_training(layout, tmp_path)
    assert images.shape == (30, 3, 32, 32)
    assert images.dtype == np.uint8
    assert labels.shape == (30,)
    # The official folder itself is accepted too.
    again, _ = cifar.read_test(layout, tmp_path / layout.folder)
    assert again.shape == (6, 3, 32, 32)


def test_cifar_names_what_is_missing_and_the_command(tmp_path: Path) -> None:
    layout = write_cifar(tmp_path)
    (tmp_path / layout.folder / "data_batch_3").unlink()
    with pytest.raises(DataMissingError) as caught:
        cifar.read_training(layout, tmp_path)
    assert "data_batch_3 not found" in str(caught.value)
    assert f"python -m services.tolaria.data.download cifar10 --data-dir {tmp_path}" in str(caught.value)


def test_cifar_refuses_a_truncated_file(tmp_path: Path) -> None:
    layout = write_cifar(tmp_path)
    path = tmp_path / layout.folder / "test_batch"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataCorruptError, match=r"test_batch is damaged or truncated: \d+ bytes with MD5"):
        cifar.read_test(layout, tmp_path)


def test_cifar_names_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="cannot be read"):
        cifar.check_file(tmp_path, "0" * 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02cos\nsystem\n.", "test_batch holds the name"),
        (b"\x80\x02}.", "is no batch of cifar10"),
        (as_python2(np.zeros((2, 3072), np.uint8), [1], b"labels"), "2 images and 1 labels"),
        (as_python2(np.zeros((2, 100), np.uint8), [1, 2], b"labels"), "is no batch"),
    ],
)
def test_cifar_refuses_a_file_that_is_no_batch(tmp_path: Path, content: bytes, message: str) -> None:
    layout = write_cifar(tmp_path)
    (tmp_path / layout.folder / "test_batch").write_bytes(content)
    sums = {**layout.files, "test_batch": hashlib.md5(content).hexdigest()}  # noqa: S324 - what the publisher uses
    with pytest.raises(DataCorruptError, match=message):
        cifar.read_test(replace(layout, files=sums), tmp_path)


def test_cifar_through_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_cifar(tmp_path, count=20)
    monkeypatch.setitem(cifar.LAYOUTS, "cifar10", layout)
    data = splits.load(DataConfig(name="cifar10", data_dir=tmp_path), seed=0)
    assert len(data.training) == 90
    assert len(data.validation) == 10
    assert data.input_shape == (3, 32, 32)
    test = data.locked_test_set()
    test.unlock()
    assert len(test.take()) == 20


# ---- digits ------------------------------------------------------------------------------------------------------


def test_digits_are_the_bundled_images() -> None:
    images, labels = digits.read(digits.find_file())
    assert images.shape == (1797, 1, 8, 8)
    assert int(images.max()) == 16
    assert list(labels[:5]) == [0, 1, 2, 3, 4]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]  # the module's own import
    with pytest.raises(DataMissingError, match="scikit-learn, which bundles the images, is not installed"):
        digits.find_file()


def test_digits_name_a_missing_or_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="cannot be read"):
        digits.read(tmp_path / "none.csv.gz")
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(digits.find_file().read_bytes()[:2000])
    with pytest.raises(DataCorruptError, match="truncated or damaged"):
        digits.read(path)
    with gzip.open(path, "wt") as file:
        file.write("1,2\n3,4\n")
    with pytest.raises(DataCorruptError, match=r"has shape \(2, 2\)"):
        digits.read(path)


# ---- splits ------------------------------------------------------------------------------------------------------


def test_validation_split_is_disjoint_and_depends_on_the_seed_alone() -> None:
    first, again, other = (splits.load(DataConfig(), seed=seed) for seed in (1, 1, 2))
    assert len(first.validation) == 120
    assert len(first.training) == 1077
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    both = torch.cat([first.training.images, first.validation.images]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(torch.unique(_all_training().flatten(1), dim=0))


def _all_training() -> torch.Tensor:
    images, _ = digits.read(digits.find_file())
    return torch.from_numpy(images[: -digits.TEST_COUNT])


def test_normalization_is_that_of_the_training_images() -> None:
    data = splits.load(DataConfig(), seed=0)
    normalized = data.normalization(data.training.images)
    assert abs(float(normalized.mean())) < 1e-4
    assert abs(float(normalized.std()) - 1) < 1e-3
    constant = Normalization.of(torch.full((4, 2, 3), 7.0))
    assert torch.equal(constant(torch.full((1, 2, 3), 7.0)), torch.zeros(1, 2, 3))


def test_the_test_set_is_touched_once_and_only_at_the_end() -> None:
    test = splits.load(DataConfig(), seed=0).locked_test_set()
    with pytest.raises(TestSetTouchedError, match="before the end of training"):
        test.take()
    test.unlock()
    assert len(test.take()) == 600
    with pytest.raises(TestSetTouchedError, match="a second time"):
        test.take()


def test_limit_and_impossible_splits() -> None:
    assert len(splits.load(DataConfig(limit=100), seed=0).training) == 90
    with pytest.raises(DataError, match="leaves nothing"):
        splits.load(DataConfig(limit=2, validation_ratio=0.1), seed=0)


FACTORY = """
import numpy as np, torch
def good(data_dir):
    g = np.random.default_rng(0)
    return g.random((20, 5), dtype=np.float32), np.arange(20) % 3, torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
def short(data_dir): return (1, 2)
def doubles(data_dir): return np.zeros((4, 2)), np.zeros(4, np.int64), np.zeros((4, 2)), np.zeros(4, np.int64)
def labels(data_dir): return np.zeros((4, 2), np.float32), np.zeros(3, np.int64), None, None
def fails(data_dir): raise KeyError("nothing at " + str(data_dir))
number = 3
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_data.py").write_text(FACTORY)
    (tmp_path / "my_broken_data.py").write_text("import nothing_like_it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_own_data", raising=False)
    return "my_own_data"


def test_a_users_own_data(factory_module: str) -> None:
    data = splits.load(DataConfig(name="factory", factory=f"{factory_module}:good"), seed=0)
    assert data.input_shape == (5,)
    assert data.classes == 3
    assert len(data.read_test()) == 4


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("my_own_data:short", "must return"),
        ("my_own_data:doubles", "training images must be uint8 or float32"),
        ("my_own_data:labels", r"training labels must be int64 \[4\]"),
        ("my_own_data:fails", "failed: KeyError: 'nothing at None'"),
        ("my_own_data:missing", "no callable 'missing'"),
        ("my_own_data:number", "no callable 'number'"),
        ("my_broken_data:x", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_users_wrong_factory_is_named(factory_module: str, factory: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        splits.load(DataConfig(name="factory", factory=factory), seed=0)


def test_augmentation_is_for_images(factory_module: str) -> None:
    with pytest.raises(DataError, match=r"are for images \[N, C, H, W\]"):
        splits.load(DataConfig(name="factory", factory=f"{factory_module}:good", flip=True), seed=0)


# ---- batches -----------------------------------------------------------------------------------------------------


def _batches(seed: int = 0, **config: Any) -> Batches:
    images = torch.arange(10 * 2 * 4 * 4, dtype=torch.float32).reshape(10, 2, 4, 4)
    split = Split(images, torch.arange(10))
    plain = Normalization(torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    return Batches(split, plain, DataConfig(batch_size=4, **config), seed)


def test_batches_are_a_function_of_seed_epoch_and_step() -> None:
    one, two = _batches(flip=True, translate=1), _batches(flip=True, translate=1)
    two.at(5, 0)  # what was asked before does not matter
    for epoch, step in ((0, 0), (1, 1), (0, 1)):
        assert torch.equal(one.at(epoch, step).images, two.at(epoch, step).images)
    assert not torch.equal(one.at(0, 0).labels, one.at(1, 0).labels)
    assert not torch.equal(one.at(0, 0).labels, _batches(seed=1).at(0, 0).labels)
    assert one.per_epoch == 2


def test_every_image_comes_at_most_once_an_epoch() -> None:
    labels = torch.cat([_batches().at(3, step).labels for step in range(2)])
    assert len(torch.unique(labels)) == 8


def test_a_small_training_set_is_one_batch() -> None:
    images = torch.zeros(3, 1, 2, 2)
    batches = Batches(Split(images, torch.arange(3)), Normalization.of(images), DataConfig(batch_size=64), 0)
    assert batches.per_epoch == 1
    assert len(batches.at(0, 0).labels) == 3


def test_the_mirror_alternates() -> None:
    plain, mirrored = _batches(), _batches(flip=True)
    seen: dict[int, list[bool]] = {}
    for epoch in range(4):
        for step in range(2):
            straight, batch = plain.at(epoch, step), mirrored.at(epoch, step)
            for index, label in enumerate(batch.labels.tolist()):
                is_mirrored = not torch.equal(straight.images[index], batch.images[index])
                assert torch.equal(
                    batch.images[index], straight.images[index].flip(-1) if is_mirrored else straight.images[index]
                )
                seen.setdefault(label, []).append(is_mirrored ^ bool(epoch % 2))
    # Counted from the coin of its own, each image keeps its rhythm, and not all have the same.
    assert all(len(set(rhythm)) == 1 for rhythm in seen.values())
    assert len({rhythm[0] for rhythm in seen.values()}) == 2


def test_translation_moves_by_whole_pixels_and_fills_with_the_mean() -> None:
    plain, moved = _batches().at(0, 0), _batches(translate=2).at(0, 0)
    assert torch.equal(plain.labels, moved.labels)
    padded = torch.nn.functional.pad(plain.images, (2, 2, 2, 2))
    for index in range(4):
        windows = [padded[index, :, y : y + 4, x : x + 4] for y in range(5) for x in range(5)]
        assert any(torch.equal(moved.images[index], window) for window in windows)
    assert not torch.equal(plain.images, moved.images)


def test_seed_streams_do_not_meet() -> None:
    assert derive(0, "order", 1) == derive(0, "order", 1)
    assert len({derive(0, "order", 1), derive(1, "order", 1), derive(0, "order", 2), derive(0, "mirror")}) == 4
    assert 0 <= derive(7, "x") < 2**63
