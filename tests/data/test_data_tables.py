"""npz, jsc, Fashion-MNIST and CIFAR-10, each from small files in its real format."""

import gzip
import io
import pickle
import struct
import sys

import h5py
import numpy as np
import pytest
import torch

from maseRT.config import DataSection
from maseRT.data.checks import check_data, labels_of
from maseRT.data.files import data_files
from maseRT.data.jsc import CLASSES, FEATURES
from maseRT.data.loading import load_data
from maseRT.errors import MissingError, UsageError


def read(name, path, **options):
    return load_data(DataSection(name=name, path=path, batch_size=4, **options), seed=0)


def inputs_of(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def pairs_of(dataset):
    return inputs_of(dataset), labels_of(dataset)


def sizes(splits):
    return [len(part) for part in splits.parts().values()]


# npz


def save_npz(folder, **arrays):
    path = folder / "set.npz"
    np.savez(path, **arrays)
    return path


def made(count, *shape, classes=3):
    rng = np.random.default_rng(count)
    return rng.normal(size=(count, *shape)).astype(np.float32), np.arange(count) % classes


def test_npz_of_x_and_y(tmp_path):
    x, y = made(40, 2, 6)
    splits = read("npz", save_npz(tmp_path, x=x, y=y))
    assert (splits.input_shape, splits.num_classes, sizes(splits)) == ((2, 6), 3, [29, 5, 6])
    found = {
        image.numpy().tobytes(): int(label)
        for part in splits.parts().values()
        for image, label in zip(*pairs_of(part), strict=True)
    }
    assert found == {row.tobytes(): label for row, label in zip(x, y.tolist(), strict=True)}


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_npz_of_parts(tmp_path, word):
    arrays = {}
    for count, part in ((20, "train"), (6, word), (5, "test")):
        arrays[f"X_{part}"], arrays[f"y_{part}"] = made(count, 4)
    splits = read("npz", save_npz(tmp_path, **arrays))
    assert sizes(splits) == [20, 6, 5]
    assert torch.equal(inputs_of(splits.validation), torch.from_numpy(arrays[f"X_{word}"]))
    assert labels_of(splits.test).tolist() == [0, 1, 2, 0, 1]


def test_npz_counts_the_classes_of_every_part(tmp_path):
    (x, y), (x_test, y_test) = made(20, 4), made(9, 4, classes=7)
    assert read("npz", save_npz(tmp_path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)).num_classes == 7


@pytest.mark.parametrize(
    ("targets", "outputs", "dtype"),
    [
        (np.linspace(-1, 1, 20), 1, torch.float32),
        (np.ones((20, 3), dtype=np.float16), 3, torch.float32),
        (np.ones((20, 3), dtype=np.int8), None, torch.int64),
    ],
)
def test_npz_of_other_targets(tmp_path, targets, outputs, dtype):
    splits = read("npz", save_npz(tmp_path, x=made(20, 4)[0], y=targets))
    assert splits.num_classes == outputs
    target = splits.train[0][1]
    assert (target.dtype, target.shape) == (dtype, targets.shape[1:])
    with pytest.raises(UsageError, match=r'\[model\] task = "classification" needs class numbers'):
        check_data(splits, outputs=3)


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("int64", torch.int64),
        (">i8", torch.int64),
        ("int32", torch.int32),
        ("uint8", torch.float32),
        ("int16", torch.float32),
        ("uint32", torch.float32),
        ("float64", torch.float32),
    ],
)
def test_npz_keeps_ids_and_turns_other_numbers_to_floats(tmp_path, stored, given):
    x = (np.arange(80).reshape(20, 4) * 3).astype(stored)
    splits = read("npz", save_npz(tmp_path, x=x, y=np.arange(20) % 3))
    parts = [inputs_of(part) for part in splits.parts().values()]
    assert {part.dtype for part in parts} == {given}
    assert sorted(torch.cat(parts).flatten().tolist()) == sorted(x.astype("int64").flatten().tolist())


def test_npz_parts_of_several_types(tmp_path):
    x, y = np.arange(80).reshape(20, 4), np.arange(20) % 3
    with pytest.raises(UsageError, match="test samples are float32, train samples int64"):
        read("npz", save_npz(tmp_path, x_train=x, y_train=y, x_test=x.astype("uint8"), y_test=y))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["images", "labels"], "holds images, labels; looked for x and y, or x_train and y_train"),
        (["x"], "holds x; looked for x and y"),
        (["x", "y", "x_test"], "left over: x_test; looked for"),
        (["x", "y", "extra"], "left over: extra"),
        (["x_val", "y_val"], "holds x_val, y_val; looked for"),
        ([], "holds no arrays"),
    ],
)
def test_npz_without_the_arrays(tmp_path, names, message):
    path = save_npz(tmp_path, **{name: np.zeros((5, 2)) for name in names})
    with pytest.raises(UsageError, match=message):
        read("npz", path)


def test_npz_with_values_that_cannot_be_used(tmp_path):
    x, y = made(20, 4)
    x[3, 1] = np.nan
    with pytest.raises(UsageError, match=r"set\.npz \(train\): sample 3 holds NaN"):
        read("npz", save_npz(tmp_path, x=x, y=y))
    x[3, 1] = 0
    with pytest.raises(UsageError, match=r"targets are neither integers nor floats: .*bool"):
        read("npz", save_npz(tmp_path, x=x, y=y > 0))
    with pytest.raises(UsageError, match=r"set\.npz \(train\): sample 2 holds NaN or infinite values in its target"):
        read("npz", save_npz(tmp_path, x=x, y=np.where(y == 2, np.inf, 0.5)))
    with pytest.raises(UsageError, match=r"test targets are float32 of shape \[\], train targets int64 of shape \[\]"):
        read("npz", save_npz(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y.astype(float)))
    with pytest.raises(UsageError, match=r"test samples have shape \[3\], train samples \[4\]"):
        read("npz", save_npz(tmp_path, x_train=x, y_train=y, x_test=x[:, :3], y_test=y))


def test_npz_that_cannot_be_read(tmp_path):
    x, y = made(20, 4)
    path = save_npz(tmp_path, x=x, y=np.array([{"a": 1}] * 20, dtype=object))
    with pytest.raises(UsageError, match="cannot be read: Object arrays"):
        read("npz", path)
    whole = save_npz(tmp_path, x=x, y=y).read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2], whole[:60] + b"\xff" * 40 + whole[100:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"set\.npz: cannot be read"):
            read("npz", path)
    with open(path, "wb") as file:
        np.save(file, x)
    with pytest.raises(UsageError, match="cannot be read"):
        read("npz", path)


# jsc


def jets(count=60):
    """Columns on scales as different as the real ones, classes in turn."""
    rng = np.random.default_rng(5)
    scales = np.logspace(-3, 3, len(FEATURES))
    return (rng.normal(size=(count, len(FEATURES))) * scales + scales).astype(np.float32), np.arange(count) % 5


def write_arff(path, inputs, labels, *, target="{g, q, t, w, z}", columns=FEATURES):
    lines = ["% OpenML", "@RELATION hls4ml_lhc_jets_hlf", ""]
    lines += [f"@ATTRIBUTE {name} REAL" for name in columns] + [f"@ATTRIBUTE class {target}", "", "@DATA"]
    lines += [",".join([*(repr(float(v)) for v in row), CLASSES[c]]) for row, c in zip(inputs, labels, strict=True)]
    path.write_text("\n".join(lines) + "\n")


def write_jets(path, kind, inputs, labels):
    letters = np.array([CLASSES[label].encode() for label in labels])
    one_hot = np.eye(5, dtype=np.float32)[labels]
    if kind == "arff":
        write_arff(path, inputs, labels)
    elif kind == "npz":
        np.savez(path, x=inputs, y=labels)
    elif kind == "npz letters":
        np.savez(path, x=inputs, y=letters.astype(str))
    elif kind == "npz one-hot":
        np.savez(path, x=inputs, y=one_hot)
    else:
        write_hdf5(path, kind, inputs, labels, letters, one_hot)


def write_hdf5(path, kind, inputs, labels, letters, one_hot):
    j_names = [f"j_{name}" for name in (*FEATURES, *CLASSES)]
    both = np.concatenate([inputs, one_hot], axis=1)
    with h5py.File(path, "w") as file:
        if kind == "h5 table":
            table = np.zeros(len(inputs), dtype=[("j_pt", "f4"), *((name, "f4") for name in reversed(j_names))])
            for index, name in enumerate(j_names):
                table[name] = both[:, index]
            file["t_allpar_new"] = table
        elif kind == "h5 matrix":
            file["jets"] = np.concatenate([np.zeros((len(inputs), 2), np.float32), both], axis=1)
            file["jetFeatureNames"] = np.array([b"j_pt", b"j_eta", *(name.encode() for name in j_names)])
        elif kind == "h5 columns":
            for index, name in enumerate(FEATURES):
                file[name] = inputs[:, index]
            file["class"] = letters
        else:
            file["x"], file["y"] = inputs, labels


KINDS = [
    ("arff", "a.arff"),
    ("npz", "a.npz"),
    ("npz letters", "a.npz"),
    ("npz one-hot", "a.npz"),
    ("h5 table", "a.h5"),
    ("h5 table", "a.z"),
    ("h5 matrix", "a.hdf5"),
    ("h5 columns", "a.h5"),
    ("h5 arrays", "a.h5"),
]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_jsc_reads_every_format_alike(tmp_path, kind, name):
    inputs, labels = jets()
    write_jets(tmp_path / name, kind, inputs, labels)
    splits = read("jsc", tmp_path)
    assert (splits.input_shape, splits.num_classes, sizes(splits)) == ((16,), 5, [43, 8, 9])
    np.savez(tmp_path / "plain.npz", x=inputs, y=labels)
    plain = read("npz", tmp_path / "plain.npz")
    assert labels_of(splits.test).tolist() == labels_of(plain.test).tolist()
    chosen = inputs_of(plain.train).double()
    expected = (inputs_of(plain.test) - chosen.mean(0)) / chosen.std(0, correction=0)
    assert torch.allclose(inputs_of(splits.test).double(), expected, atol=1e-4)
    check_data(splits, outputs=5)


def test_jsc_keeps_repeated_table_rows_once(tmp_path):
    inputs, labels = jets()
    twice = np.concatenate([inputs, inputs[::-1]]), np.concatenate([labels, labels[::-1]])
    write_jets(tmp_path / "a.h5", "h5 table", *twice)
    assert sizes(read("jsc", tmp_path)) == [43, 8, 9]


def test_jsc_keeps_the_parts_of_an_npz(tmp_path):
    inputs, labels = jets()
    np.savez(tmp_path / "a.npz", x_train=inputs[:40], y_train=labels[:40], x_test=inputs[40:], y_test=labels[40:])
    assert sizes(read("jsc", tmp_path)) == [34, 6, 20]


def test_jsc_without_h5py_names_the_extra(tmp_path, monkeypatch):
    write_jets(tmp_path / "a.h5", "h5 arrays", *jets())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingError, match="needs the package h5py") as caught:
        read("jsc", tmp_path)
    assert caught.value.fix == 'pip install "maseRT[h5]"'


def test_jsc_tables_that_cannot_be_used(tmp_path):
    inputs, labels = jets()
    write_arff(tmp_path / "a.arff", inputs[:, 2:], labels, columns=FEATURES[2:])
    with pytest.raises(UsageError, match="lacks the columns zlogz, c1_b0_mmdt"):
        read("jsc", tmp_path)
    write_arff(tmp_path / "a.arff", inputs, labels, target="STRING")
    with pytest.raises(UsageError, match="cannot be read as arff: String attributes"):
        read("jsc", tmp_path)
    for text in (
        "",
        "no arff",
        "@RELATION a\n@ATTRIBUTE b REAL\n@DATA\n1,2,3\n",
        "@RELATION a\n@ATTRIBUTE b REAL\n@DATA\nx\n",
    ):
        (tmp_path / "a.arff").write_text(text)
        with pytest.raises(UsageError, match=r"a\.arff: (cannot be read|lacks the columns)"):
            read("jsc", tmp_path)
    (tmp_path / "a.arff").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read("jsc", tmp_path)


def test_jsc_arrays_that_cannot_be_used(tmp_path):
    inputs, labels = jets()
    for arrays, message in [
        ({"x": inputs[:, :15], "y": labels}, r"have shape \[60, 15\], not \[samples, 16\]"),
        ({"x": inputs, "y": np.array(["g"] * 59 + ["b"])}, "'b' is no class of this set"),
        ({"x": inputs, "y": np.zeros((60, 5))}, "sample 0 does not belong to exactly one class"),
        ({"x": inputs, "y": np.zeros((60, 4))}, r"labels need a shape \[samples\]"),
        ({"x": np.where(inputs == inputs[7, 3], np.nan, inputs), "y": labels}, "sample 7 holds NaN"),
    ]:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UsageError, match=message):
            read("jsc", tmp_path)


def test_jsc_hdf5_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.h5"
    path.write_bytes(b"no hdf5")
    with pytest.raises(UsageError, match="cannot be read as HDF5"):
        read("jsc", path)
    with h5py.File(path, "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(UsageError, match="holds other; looked for x and y"):
        read("jsc", path)
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros(3, dtype=[("a", "f4"), ("b", "f4")])
    with pytest.raises(UsageError, match="lacks the columns zlogz"):
        read("jsc", path)
    with h5py.File(path, "w") as file:
        file["table"] = np.zeros(3, dtype=[(name, "f4") for name in FEATURES])
    with pytest.raises(UsageError, match="neither a column class nor the columns g, q, w, z, t"):
        read("jsc", path)


# Fashion-MNIST


def idx(array):
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, *, zipped, train=40, test=12):
    rng = np.random.default_rng(1)
    written = {}
    for stem, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        written[stem] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            path = folder / f"{stem}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return written


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(tmp_path, zipped):
    written = write_fashion(tmp_path, zipped=zipped)
    splits = read("fashion-mnist", tmp_path)
    assert (splits.input_shape, splits.num_classes, sizes(splits)) == ((1, 28, 28), 10, [34, 6, 12])
    images, labels = written["t10k"]
    assert torch.equal(inputs_of(splits.test), torch.from_numpy(images)[:, None].float() / 255)
    assert labels_of(splits.test).tolist() == labels.tolist()


def test_fashion_mnist_normalised(tmp_path):
    write_fashion(tmp_path, zipped=False)
    plain = inputs_of(read("fashion-mnist", tmp_path).test)
    scaled = inputs_of(read("fashion-mnist", tmp_path, mean=(0.25,), std=(0.5,)).test)
    assert torch.allclose(scaled, (plain - 0.25) / 0.5)


def test_idx_files_that_cannot_be_used(tmp_path):
    write_fashion(tmp_path, zipped=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    for content, message in [
        (b"no gzip", "cannot be read: Not a gzipped file"),
        (path.read_bytes()[:-400], "cannot be read"),
        (path.read_bytes()[:30] + b"\0" * 50 + path.read_bytes()[80:], "cannot be read"),
        (gzip.compress(b""), "it begins with "),
        (gzip.compress(good[:10]), "not an idx file"),
        (gzip.compress(idx(np.zeros(40, dtype=np.uint8))), "in 3 dimensions: it begins with 00 00 08 01"),
        (gzip.compress(good[:-5]), r"holds 31355 bytes after its header, which announces \[40, 28, 28\]"),
        (gzip.compress(idx(np.zeros((39, 28, 28), dtype=np.uint8))), "39 inputs but 40 labels"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            read("fashion-mnist", tmp_path)
        assert caught.value.where == str(path)


# CIFAR-10


def write_cifar10(folder, *, count=10, dump=lambda batch: pickle.dumps(batch, protocol=2)):
    rng = np.random.default_rng(2)
    written = {}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [int(label) for label in np.arange(count) % 10]
        batch = {
            b"batch_label": b"testing batch 1 of 1",
            b"labels": labels,
            b"data": data,
            b"filenames": [b"a.png"] * count,
        }
        (folder / name).write_bytes(dump(batch))
        written[name] = data
    return written


class Python2Pickler(pickle._Pickler):
    """Writes every string as Python 2 did."""

    def save_string(self, value):
        content = value if isinstance(value, bytes) else value.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}  # noqa: RUF012


def as_python_2(batch):
    """As the original files: Python 2's strings, and the place of NumPy's functions before NumPy 2."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(batch)
    assert b"numpy._core.multiarray" in file.getvalue()
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def as_text_keys(batch):
    return pickle.dumps({key.decode(): value for key, value in batch.items()}, protocol=pickle.HIGHEST_PROTOCOL)


@pytest.mark.parametrize("dump", [as_python_2, as_text_keys, pickle.dumps])
@pytest.mark.filterwarnings("error")
def test_cifar10(tmp_path, dump):
    written = write_cifar10(tmp_path, dump=dump)
    splits = read("cifar10", tmp_path)
    assert (splits.input_shape, splits.num_classes, sizes(splits)) == ((3, 32, 32), 10, [42, 8, 10])
    expected = torch.from_numpy(written["test_batch"].reshape(-1, 3, 32, 32)).float() / 255
    assert torch.equal(inputs_of(splits.test), expected)
    assert labels_of(splits.test).tolist() == list(range(10))
    assert len(data_files(DataSection(name="cifar10", path=tmp_path))) == 6


def test_cifar10_normalised_per_channel(tmp_path):
    write_cifar10(tmp_path)
    plain = inputs_of(read("cifar10", tmp_path).test)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    scaled = inputs_of(read("cifar10", tmp_path, mean=mean, std=std).test)
    assert torch.allclose(
        scaled, (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), atol=1e-6
    )


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('evil').touch()",))


def test_cifar10_never_runs_what_a_pickle_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(UsageError, match=r"data_batch_2: the pickle asks for builtins\.eval.* it was not loaded"):
        read("cifar10", tmp_path)
    assert not (tmp_path / "evil").exists()


def test_cifar10_files_that_cannot_be_used(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "data_batch_4"
    good = path.read_bytes()
    pixels = np.zeros((2, 3072), dtype=np.uint8)
    for content, message in [
        (b"", "cannot be read: EOFError"),
        (good[: len(good) // 2], "cannot be read"),
        (b"<html>not found</html>", "cannot be read"),
        (pickle.dumps([1, 2]), "not a CIFAR-10 batch: no data and labels, but list"),
        (pickle.dumps({b"fine_labels": [1], b"data": pixels}), "no data and labels, but fine_labels, data"),
        (pickle.dumps({b"labels": ["a", "b"], b"data": pixels}), "not a CIFAR-10 batch"),
        (pickle.dumps({b"labels": [1], b"data": pixels}), r"holds data \[2, 3072\] of uint8 and labels \[1\]"),
        (pickle.dumps({b"labels": [1, 2], b"data": pixels[:, :9]}), r"holds data \[2, 9\]"),
        (pickle.dumps({b"labels": [1, 2], b"data": pixels.astype(float)}), "of float64"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            read("cifar10", tmp_path)
        assert caught.value.where == str(path)
