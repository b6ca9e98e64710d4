"""An NVML that is an object: one GPU whose answers tests choose."""
# ruff: noqa: N802  (the names are NVML's)

from types import SimpleNamespace


class NVMLError(Exception):
    pass


class Nvml:
    """The module pynvml; a value of None is what this GPU does not support."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "core"

    def __init__(self, **values):
        self.values = {
            "energy": 5_000,
            "power": 350_000,
            "reasons": 0x1 | 0x4,
            "sm": 1980,
            "memory": 3201,
            "core": 41,
            "limit": 700_000,
            "used": 3 * 2**30,
        } | values
        self.starts = True
        self.running = 0

    def _say(self, handle, what):
        assert handle == "handle of GPU-1"
        if self.values[what] is None:
            raise NVMLError("Not Supported")
        return self.values[what]

    def nvmlInit(self):
        if not self.starts:
            raise NVMLError("Driver Not Loaded")
        self.running += 1

    def nvmlShutdown(self):
        self.running -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1":
            raise NVMLError("Not Found")
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._say(handle, "energy")

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._say(handle, "power")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._say(handle, "limit")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self._say(handle, "used"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._say(handle, "reasons")

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._say(handle, kind)

    def nvmlDeviceGetTemperature(self, handle, kind):
        return self._say(handle, kind)
