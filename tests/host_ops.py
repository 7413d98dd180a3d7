"""csrc/torch's CUDA ops on a host, as torch.ops.pycnf_cuda_host: for tensors on a device of torch's
whose memory is the host's (see tests/cuda_host/ops/device.cpp). There are no gradients.

Every csrc/torch/*_cuda.cpp is in it by its name alone. Its op is compared with the CPU's, or with
pycnf.reference, in a test that takes conftest.py's fixture `cuda_host_ops`.
"""

import ctypes
import types

import torch

DEVICE = torch.device("privateuseone", 0)


class HostOps:
    """The ops by their names, and what the tests say to the device and ask it."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_host_seed.argtypes = [ctypes.c_uint64]
        for name in ("cuda_host_broken_guards", "cuda_host_waits"):
            getattr(self._library, name).restype = ctypes.c_int64
        # torch asks the module of a device before it makes a tensor there, and to set its seed.
        module = types.ModuleType("torch.privateuseone")
        module._lazy_init, module._is_in_bad_fork = lambda: None, lambda: False
        module.manual_seed_all = lambda seed: None
        # Nor is it one to spread modules over.
        module.is_available = lambda: False
        torch._register_device_module(DEVICE.type, module)

    def __getattr__(self, name):
        return getattr(torch.ops.pycnf_cuda_host, name)

    def seed(self, seed):
        """Draws the order of threads and blocks from this seed, from now on."""
        self._library.cuda_host_seed(seed)

    def multiprocessors(self, count):
        """How many the device has, from now on."""
        self._library.cuda_host_multiprocessors(count)

    def broken_guards(self):
        """How many allocations so far somebody has written outside of."""
        return self._library.cuda_host_broken_guards()

    def waits(self):
        """How often so far a host would have waited for a GPU, or a GPU had no kernel."""
        return self._library.cuda_host_waits()
