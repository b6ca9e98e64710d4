"""The table of data sets, and the files that step keys cover."""

import subprocess
import sys

import pytest

from maseRT.config import DataSection
from maseRT.data.files import SOURCES, data_files
from maseRT.data.loading import load_data
from maseRT.errors import MissingError, UsageError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(section, folder):
    return [path.relative_to(folder).as_posix() for path in data_files(section)]


def test_files_are_found_without_torch_and_numpy(tmp_path):
    touch(tmp_path, "cats/a.png", "dogs/b.png")
    code = (
        "import sys\nfrom maseRT.config import DataSection\nfrom maseRT.data.files import data_files\n"
        f"assert len(data_files(DataSection(name='image-folder', path={str(tmp_path)!r}))) == 2\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_embedded_data_and_factories_have_no_files_unless_a_path_is_given(tmp_path):
    assert data_files(DataSection(name="digits")) == []
    assert data_files(DataSection(name="package.module:make")) == []
    touch(tmp_path, "b.bin", "a/c.bin", ".hidden")
    assert names(DataSection(name="package.module:make", path=tmp_path), tmp_path) == ["a/c.bin", "b.bin"]
    assert data_files(DataSection(name="package.module:make", path=tmp_path / "b.bin")) == [tmp_path / "b.bin"]


@pytest.mark.parametrize("folder", ["", "raw", "FashionMNIST/raw"])
def test_idx_files_gzipped_or_plain(tmp_path, folder):
    touch(tmp_path / folder, f"{IDX[0]}.gz", IDX[1], "t10k-images.idx3-ubyte", f"{IDX[3]}.gz")
    found = [path.name for path in data_files(DataSection(name="fashion-mnist", path=tmp_path))]
    assert found == [f"{IDX[0]}.gz", IDX[1], "t10k-images.idx3-ubyte", f"{IDX[3]}.gz"]


def test_cifar10_batches_also_in_the_archives_folder(tmp_path):
    touch(tmp_path / "cifar-10-batches-py", *BATCHES)
    section = DataSection(name="cifar10", path=tmp_path)
    assert names(section, tmp_path) == [f"cifar-10-batches-py/{name}" for name in BATCHES]
    inside = DataSection(name="cifar10", path=tmp_path / "cifar-10-batches-py")
    assert names(inside, tmp_path / "cifar-10-batches-py") == BATCHES


def test_what_is_missing_is_named(tmp_path):
    touch(tmp_path, *BATCHES[:2], *BATCHES[3:5], "readme.html")
    with pytest.raises(MissingError, match=r"data_batch_3, test_batch not found; looked in .*cifar-10-batches-py"):
        data_files(DataSection(name="cifar10", path=tmp_path))
    with pytest.raises(MissingError, match="train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images") as caught:
        data_files(DataSection(name="fashion-mnist", path=tmp_path))
    assert "dataset-fashion-mnist" in caught.value.fix


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "jsc", "npz", "image-folder"])
def test_no_path_a_missing_path_and_an_empty_folder(tmp_path, name):
    for read in (data_files, lambda section: load_data(section, seed=0)):
        with pytest.raises(UsageError, match=f"{name} is read from files, and no path is given") as caught:
            read(DataSection(name=name))
        assert caught.value.where == "[data] path"
        assert caught.value.fix
        with pytest.raises(MissingError, match=r"nowhere: no such file or folder\nfix: ") as caught:
            read(DataSection(name=name, path=tmp_path / "nowhere"))
        with pytest.raises(MissingError, match=r"the folder is empty\nfix: ") as caught:
            read(DataSection(name=name, path=tmp_path))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "image-folder"])
def test_a_file_where_a_folder_belongs(tmp_path, name):
    touch(tmp_path, "cifar-10-python.tar.gz")
    with pytest.raises(MissingError, match="not a folder"):
        data_files(DataSection(name=name, path=tmp_path / "cifar-10-python.tar.gz"))


@pytest.mark.parametrize(("name", "suffix"), [("jsc", ".arff"), ("jsc", ".H5"), ("jsc", ".npz"), ("npz", ".npz")])
def test_one_table_file_given_or_found(tmp_path, name, suffix):
    touch(tmp_path, f"table{suffix}", "notes.txt")
    for path in (tmp_path, tmp_path / f"table{suffix}"):
        assert data_files(DataSection(name=name, path=path)) == [tmp_path / f"table{suffix}"]
    with pytest.raises(UsageError, match=r"'\.txt' is not one of"):
        data_files(DataSection(name=name, path=tmp_path / "notes.txt"))
    touch(tmp_path, f"another{suffix}")
    with pytest.raises(UsageError, match=f"several files: another{suffix}, table{suffix}"):
        data_files(DataSection(name=name, path=tmp_path))
    for file in tmp_path.glob(f"*{suffix}"):
        file.unlink()
    with pytest.raises(MissingError, match=r"holds no file named .*\*\.npz"):
        data_files(DataSection(name=name, path=tmp_path))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "set.npz")
    assert data_files(DataSection(name="npz", path="~/set.npz")) == [tmp_path / "set.npz"]


def test_images_of_all_parts_and_nested_folders_but_nothing_hidden(tmp_path):
    touch(tmp_path, "train/cats/deep/a.PNG", "train/dogs/b.jpeg", "val/cats/c.webp", "test/dogs/d.bmp")
    touch(tmp_path, "train/.cache/e.png", "train/cats/.f.png", "train/cats/notes.txt")
    found = names(DataSection(name="image-folder", path=tmp_path), tmp_path)
    assert found == ["train/cats/deep/a.PNG", "train/dogs/b.jpeg", "val/cats/c.webp", "test/dogs/d.bmp"]


def test_image_folders_that_are_not_laid_out_right(tmp_path):
    section = DataSection(name="image-folder", path=tmp_path)
    touch(tmp_path, "a.png")
    with pytest.raises(MissingError, match="holds no class folders"):
        data_files(section)
    touch(tmp_path, "val/cats/a.png")
    with pytest.raises(UsageError, match="has val but no train folder"):
        data_files(section)
    touch(tmp_path, "train/cats/a.png", "train/dogs/notes.txt", "train/eels/x")
    with pytest.raises(MissingError, match=r"no image in dogs, eels; looked for \.bmp"):
        data_files(section)


def test_unknown_names_and_options_that_would_be_ignored(tmp_path):
    with pytest.raises(UsageError, match="no data set 'fashion_mnist'; did you mean 'fashion-mnist'"):
        data_files(DataSection(name="fashion_mnist"))
    with pytest.raises(UsageError, match="digits does not use image_size") as caught:
        load_data(DataSection(name="digits", image_size=32), seed=0)
    assert caught.value.fix == "remove it; it is for image-folder"
    with pytest.raises(UsageError, match="digits does not use path"):
        data_files(DataSection(name="digits", path=tmp_path))
    with pytest.raises(UsageError, match="npz does not use mean"):
        data_files(DataSection(name="npz", mean=(0.5,), path=tmp_path))
    with pytest.raises(UsageError, match="my:make does not use std"):
        data_files(DataSection(name="my:make", std=(0.5,)))


def test_every_reader_of_the_table_exists(tmp_path):
    touch(tmp_path, "x")
    for name, source in SOURCES.items():
        with pytest.raises((UsageError, MissingError)):  # each gets as far as its files, or the batch size
            load_data(
                DataSection(name=name, path=None if source.locate is None else tmp_path, batch_size=10**6), seed=0
            )


def test_a_path_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        data_files(DataSection(name="npz", path=tmp_path / ("x" * 300)))


def test_a_link_that_would_count_images_twice(tmp_path):
    touch(tmp_path, "cats/a.png", "dogs/b.png")
    (tmp_path / "eels").symlink_to(tmp_path / "cats")
    section = DataSection(name="image-folder", path=tmp_path)
    assert names(section, tmp_path) == ["cats/a.png", "dogs/b.png", "eels/a.png"]
    (tmp_path / "dogs" / "again").symlink_to(tmp_path / "dogs")
    with pytest.raises(UsageError, match=r"a link leads to .*dogs a second time") as caught:
        data_files(section)
    assert caught.value.where == str(tmp_path / "dogs" / "again")
