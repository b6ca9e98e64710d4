"""What the networks ask of the shape of one input."""

from __future__ import annotations

from maseRT.errors import UsageError


def image_shape(input_shape: tuple[int, ...], *, model: str, smallest: int = 1) -> tuple[int, int, int]:
    """Return (channels, height, width).

    Args:
        input_shape: the shape of one input, without the batch.
        model: the zoo name, for the message.
        smallest: the least height and width that the network's strides leave something of.

    Raises:
        UsageError: the input is no image, or a too small one.
    """
    if len(input_shape) != 3:
        raise _misfit(model, "images [C, H, W]", input_shape)
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise _misfit(model, f"images [C, H, W] with sides of {smallest} or more", input_shape)
    return channels, height, width


def sequence_shape(input_shape: tuple[int, ...], *, model: str, channels_first: bool = False) -> tuple[int, int]:
    """Return (steps, features) of a sequence; an image [C, H, W] is H steps of C * W features.

    Args:
        input_shape: the shape of one input, without the batch.
        model: the zoo name, for the message.
        channels_first: sequences are [features, steps].

    Raises:
        UsageError: the input is neither a sequence nor an image.
    """
    if len(input_shape) == 3:
        channels, height, width = input_shape
        return height, channels * width
    if len(input_shape) != 2:
        raise _misfit(model, "sequences [steps, features]", input_shape)
    first, second = input_shape
    return (second, first) if channels_first else (first, second)


def patch_grid(input_shape: tuple[int, ...], patch: int, *, model: str) -> tuple[int, int]:
    """Return how many patches an image holds vertically and horizontally.

    Raises:
        UsageError: the input is no image, or its sides are no multiples of the patch.
    """
    _, height, width = image_shape(input_shape, model=model, smallest=patch)
    if height % patch or width % patch:
        raise _misfit(model, f"images [C, H, W] with sides that are multiples of the patch, {patch}", input_shape)
    return height // patch, width // patch


def _misfit(model: str, expected: str, input_shape: tuple[int, ...]) -> UsageError:
    shape = "x".join(map(str, input_shape))
    return UsageError(
        f"{model} takes {expected}; one input of this data set is {shape}",
        where="[model] name",
        fix="choose a model for this data, data for this model, or other [model] args",
    )
