"""What a device's clock says of inferences queued one behind another, and whether the device waited for the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

_AS_LONG = 0.9
"""Of the device's time: a host that needs this long to queue an inference hides none of it behind the device's work."""

_SOON = 0.25
"""Of the device's time: how long after its last command an inference still takes on a device that waits for commands,
where its last kernel is a large one. A device with work of its own lags by whole inferences, or by the thousand
commands that a driver queues before it lets the host wait."""

_LATENCY_MS = 0.02
"""What a command takes to reach a device that has nothing to do, and what two clocks may be apart."""


@dataclass(frozen=True)
class DeviceTimes:
    """The times of inferences by the device's own clock.

    Attributes:
        ms: of each.
        waited: for how many of them the device waited for the host. Their time is that of the host's launching: the
            device's own is less.
    """

    ms: list[float]
    waited: int = 0

    @classmethod
    def of(cls, ms: Sequence[float], *, done_ms: Sequence[float], queued_ms: Sequence[float]) -> Self:
        """Return the times, and count for how many inferences the device waited.

        It did where the host took (nearly) as long to queue the inference as the device to run it, and the device was
        done with it as soon as it was queued. The first alone proves nothing: a host is held up, too, once it has
        queued as much as the driver takes.

        Args:
            ms: time of each inference by the device's clock.
            done_ms: when the device was done with each, after the moment from which `queued_ms` counts.
            queued_ms: when the host had queued what came before the first inference, and then each of them.
        """
        waited = sum(
            after - before >= _AS_LONG * each and done - after < _SOON * each + _LATENCY_MS
            for each, done, (before, after) in zip(ms, done_ms, pairwise(queued_ms), strict=True)
        )
        return cls(list(ms), waited)
