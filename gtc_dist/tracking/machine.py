"""Memory of a rank's process and its GPU, and how busy the GPU is. No call waits for the device."""

import ctypes
import math
import os

import psutil
import torch

from gtc_dist.distributed.collectives import Communicator

NVML = "libnvidia-ml.so.1"  # comes with NVIDIA's driver


class MachineMonitor:
    """Reads the numbers of one rank. Methods are local.

    Args:
        device: of the rank; a GPU's peak is counted from one reading to the next.
    """

    def __init__(self, device: torch.device):
        self.device, self.process = device, psutil.Process(os.getpid())
        self._gpu = _gpu_handle(device) if device.type == "cuda" else None

    def readings(self, comm: Communicator) -> torch.Tensor:
        """This rank's numbers in its own place, 0 in those of the others, so that a sum over the ranks gathers all:
        float32 [3 * ranks] on the device."""
        own = [0.0] * 3 * comm.size
        own[3 * comm.rank : 3 * comm.rank + 3] = self._read()
        return torch.tensor(own, dtype=torch.float32, device=self.device)

    def _read(self) -> list[float]:
        """Host memory in GiB, peak of the GPU's memory in GiB, share of the last moments in which the GPU was busy; nan
        where there is none."""
        host = self.process.memory_info().rss / 2**30
        if self.device.type != "cuda":
            return [host, math.nan, math.nan]
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        torch.cuda.reset_peak_memory_stats(self.device)
        return [host, peak, self._busy()]

    def _busy(self) -> float:
        class Utilization(ctypes.Structure):
            _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))

        if self._gpu is None:
            return math.nan
        library, handle = self._gpu
        found = Utilization()
        failed = library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(found))  # a part of a GPU (MIG) has none
        return math.nan if failed else found.gpu / 100


def _gpu_handle(device: torch.device) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVIDIA's management library and its handle of a GPU; None without it, as with another maker's GPU."""
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    return library, handle


def over_ranks(readings: torch.Tensor) -> dict[str, float]:
    """Numbers for the charts, of the summed `readings` of all ranks: the largest memory, the mean share; nan ones are
    left out."""
    host, gpu, busy = (
        [value for value in column if not math.isnan(value)] for column in readings.view(-1, 3).T.tolist()
    )
    found = {"memory/host_gib": max(host)}
    if gpu:
        found["memory/gpu_gib"] = max(gpu)
    if busy:
        found["gpu_busy"] = sum(busy) / len(busy)
    return found
