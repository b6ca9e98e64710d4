"""Images in class folders."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maseRT.config import DataSection
from maseRT.data.checks import check_data, labels_of
from maseRT.data.loading import calibration_subset, load_data, loader
from maseRT.errors import UsageError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def plain(colour, size=(20, 12), mode="RGB"):
    return Image.new(mode, size, colour)


def read(path, **options):
    section = DataSection(**{"name": "image-folder", "path": path, "batch_size": 2, "image_size": 8, **options})
    return load_data(section, seed=0)


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("b_green", GREEN), ("a_red", RED), ("c_blue", BLUE)):
        for index in range(8):
            save(tmp_path / name / f"{index}.png", plain(colour))
    return tmp_path


def test_class_folders_are_classes_in_the_order_of_their_names(folder):
    splits = read(folder)
    assert (splits.input_shape, splits.num_classes) == ((3, 8, 8), 3)
    assert [len(part) for part in splits.parts().values()] == [17, 3, 4]
    for part in splits.parts().values():
        for image, label in part:
            assert image.dtype == torch.float32
            assert image.shape == (3, 8, 8)
            assert image.argmax(0).unique().tolist() == [label]
            assert image.max() == 1
    check_data(splits, outputs=3)


def test_images_are_read_when_they_are_asked_for(folder):
    splits = read(folder)
    shutil.rmtree(folder)
    assert sorted(labels_of_unread(splits)) == [0] * 8 + [1] * 8 + [2] * 8
    with pytest.raises(UsageError, match=r"\d\.png: not a readable image: .*No such file"):
        splits.train[0]


def labels_of_unread(splits):
    from maseRT.data.checks import held_labels

    return [int(label) for part in splits.parts().values() for label in held_labels(part)]


def test_parts_on_top(tmp_path):
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        for index in range(count):
            save(tmp_path / part / "cats" / f"{index}.png", plain(RED))
            save(tmp_path / part / "dogs" / f"{index}.png", plain(BLUE))
    splits = read(tmp_path)
    assert [len(part) for part in splits.parts().values()] == [12, 6, 4]
    assert labels_of(splits.test).tolist() == [0, 0, 1, 1]
    shutil.rmtree(tmp_path / "val")
    assert [len(part) for part in read(tmp_path).parts().values()] == [10, 2, 4]


def test_a_class_that_training_never_sees(tmp_path):
    for name in ("train/cats/0", "train/dogs/0", "train/dogs/1", "val/dog/0"):
        save(tmp_path / f"{name}.png", plain(RED))
    with pytest.raises(UsageError, match=r"validation data have a class 'dog' that .*did you mean 'dogs'"):
        read(tmp_path)


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (16, 16)])
def test_the_central_square_is_taken(tmp_path, size):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for index in range(6):
        save(tmp_path / "only" / f"{index}.png", image)
    pixels, _ = read(tmp_path).train[0]
    width, height = size[0] // 2, size[1] // 2  # the short side of 16 becomes 8
    left, top = (width - 8) // 2, (height - 8) // 2
    expected = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[top : top + 8, left : left + 8]
    assert np.abs(pixels.numpy() * 255 - expected.transpose(2, 0, 1)).max() <= 1


def test_resized_up_too_and_by_default_to_224(tmp_path):
    for index in range(6):
        save(tmp_path / "only" / f"{index}.png", plain(RED, (3, 5)))
    assert read(tmp_path, image_size=None).input_shape == (3, 224, 224)
    assert read(tmp_path, image_size=None).train[0][0].shape == (3, 224, 224)


def test_mean_and_std_per_channel(folder):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    pixels, scaled = read(folder).train[0][0], read(folder, mean=mean, std=std).train[0][0]
    assert torch.allclose(scaled, (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))


def test_one_mean_makes_them_grey(folder):
    splits = read(folder, mean=(0.0,), std=(1.0,))
    assert splits.input_shape == (1, 8, 8)
    image, label = splits.train[0]
    assert image.mean() == pytest.approx((76 / 255, 150 / 255, 29 / 255)[label], abs=0.005)  # ITU-R 601 luma


def test_a_mean_of_two_channels(folder):
    with pytest.raises(UsageError, match=r"need 1 value \(grey\) or 3 \(RGB\), got 2"):
        read(folder, mean=(0.0, 0.0), std=(1.0, 1.0))
    with pytest.raises(UsageError, match="need 3 values each, one per channel, got 0 and 3"):
        read(folder, std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_other_colour_modes_become_rgb(tmp_path, mode, suffix):
    if (mode, suffix) == ("CMYK", "png"):
        suffix = "jpg"
    for index in range(6):
        save(tmp_path / "only" / f"{index}.{suffix}", plain((255, 255, 255)).convert(mode))
    assert read(tmp_path).train[0][0].min() > 0.98


def test_sixteen_bits_are_not_clipped_in_silence(tmp_path):
    for index in range(6):
        save(tmp_path / "only" / f"{index}.png", Image.fromarray(np.full((9, 9), 3000, dtype=np.uint16)))
    with pytest.raises(UsageError, match="do not fit 8 bits"):
        read(tmp_path).train[0]


@pytest.mark.parametrize("content", [b"", b"no image", "half"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(folder, content, workers):
    broken = folder / "b_green" / "3.png"
    broken.write_bytes(broken.read_bytes()[:50] if content == "half" else content)
    splits = read(folder)
    with pytest.raises(UsageError, match="not a readable image") as caught:
        for part in splits.parts().values():
            list(loader(part, batch_size=4, workers=workers))
    assert caught.value.where == str(broken)
    assert "Traceback" not in str(caught.value)


def test_a_truncated_jpeg_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for index in range(6):
        save(tmp_path / "only" / f"{index}.jpg", Image.fromarray(noise))
    for path in (tmp_path / "only").iterdir():
        path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UsageError, match=r"\.jpg: not a readable image: .*truncated"):
        read(tmp_path).train[0]


def test_one_class_folder_only(tmp_path):
    for index in range(8):
        save(tmp_path / "only" / f"{index}.png", plain(RED))
    with pytest.raises(UsageError, match="one class only"):
        check_data(read(tmp_path), outputs=3)


def test_labels_beyond_the_outputs_name_the_image(folder):
    with pytest.raises(UsageError, match=r"label 2 is beyond the model's 2 outputs.*c_blue/\d\.png\)"):
        check_data(read(folder), outputs=2)


def test_the_calibration_subset_is_lazy_and_fixed(folder):
    splits = read(folder)
    first, second = (
        [
            int(label)
            for _, labels in loader(calibration_subset(splits, samples=6, seed=4), batch_size=4)
            for label in labels
        ]
        for _ in range(2)
    )
    assert first == second
    assert len(first) == 6
