"""The CUDA kernels on a host: csrc/cuda compiled as plain C++ (see tests/cuda_host/cuda_runtime.h),
under the names and arguments of `torch.ops.pycnf`.
"""

import ctypes

import torch

Pointer, Int64, Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Terms(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.POINTER(Pointer)),
        ("weights", ctypes.POINTER(Double)),
        ("count", ctypes.c_int),
        ("ordered", ctypes.c_bool),
    )


class Segments(ctypes.Structure):
    _fields_ = (("borders", ctypes.POINTER(Int64)), ("count", Int64), ("chunk", Int64))


class Tolerance(ctypes.Structure):
    """csrc/core/params.h's, for f64."""

    _fields_ = (
        *((name, Double) for name in ("rtol", "atol")),
        *((name, Pointer) for name in ("rtol_each", "atol_each", "rtol_device", "atol_device")),
    )


class Plan(ctypes.Structure):
    """tests/cuda_host/entry.cpp's."""

    _fields_ = (
        *((name, Pointer) for name in ("attempt", "times", "h", "outputs", "stops", "report")),
        *((name, Int64) for name in ("output_count", "stop_count", "report_count")),
    )


class FlowTensors(ctypes.Structure):
    """tests/cuda_host/entry.cpp's."""

    _fields_ = (
        *((name, Pointer) for name in ("attempt", "times", "h", "tape", "report")),
        ("capacity", Int64),
    )


# entry.cpp's numbers for what a state is stored in.
STORAGE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

SIGNATURES = {
    "stage": [ctypes.c_int, Pointer, Terms, *[Pointer] * 3, Double, Int64],
    "finish": [
        ctypes.c_int, Pointer, Terms, Terms, *[Pointer] * 4, Double, Tolerance, Segments,
        Pointer, Int64,
    ],
    "initial": [ctypes.c_int, *[Pointer] * 3, Tolerance, Segments, Pointer, Int64],
    "attempt_stage": [ctypes.c_bool, Pointer, Terms, *[Pointer] * 4, Int64],
    "attempt_finish": [
        ctypes.c_bool, Pointer, Terms, Terms, *[Pointer] * 4, Tolerance, Segments, Pointer, Int64,
    ],
    "control": [
        ctypes.c_bool, ctypes.c_bool, ctypes.c_int, Plan, *[ctypes.POINTER(Double)] * 2,
        ctypes.c_int, Pointer,
    ],
    "advance": [
        ctypes.c_bool, ctypes.c_bool, Plan, *[Pointer] * 4, Terms, Pointer, Int64,
    ],
    "flow_control": [
        ctypes.c_bool, ctypes.c_int, FlowTensors, *[ctypes.POINTER(Double)] * 2, ctypes.c_int,
        Pointer,
    ],
    "flow_advance": [ctypes.c_bool, FlowTensors, *[Pointer] * 5, Int64, Int64],
    "interpolate": [
        ctypes.c_int, *[Pointer] * 4, Terms, Double, ctypes.POINTER(Double), Int64, Pointer, Int64,
    ],
    "store_values": [ctypes.c_bool, ctypes.POINTER(Double), Int64, Pointer],
    "store_pieces": [Pointer, ctypes.c_int32, Pointer],
    "hash_keys": [ctypes.c_bool, Pointer, Int64, Int64, Pointer],
    "sample_probes": [
        ctypes.c_bool, Pointer, ctypes.c_uint64, Int64, Int64, Int64, ctypes.c_bool, Pointer,
    ],
    "check_next_thread": [ctypes.c_int, Pointer],
    "check_order": [Pointer, Pointer],
    "check_exchanges": [Pointer],
    "check_grid": [ctypes.c_int, ctypes.c_int, Pointer, Pointer, Pointer],
    "check_tiles": [*[ctypes.c_int] * 3, Int64, *[Pointer] * 5],
    "check_attribute": [ctypes.c_int, ctypes.c_int, Pointer],
    "check_product": [*[ctypes.c_int] * 6, *[Pointer] * 3],
    "check_launch": [Int64, ctypes.c_int, ctypes.c_size_t],
}  # fmt: skip


def doubles(values):
    return (Double * max(1, len(values)))(*values)


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def joined(fresh):
    """What the field returned, maybe in parts, as one row."""
    return torch.cat([part.reshape(-1) for part in fresh]) if fresh else None


def terms(rows, weights, ordered=False):
    pointers = (Pointer * max(1, len(rows)))(*(row.data_ptr() for row in rows))
    return Terms(pointers, doubles(weights), len(weights), ordered)


def tolerance(rtol, atol, rtol_on_device=False, atol_on_device=False):
    numbers, each, on_device = [], [], []
    for x, device in ((rtol, rtol_on_device), (atol, atol_on_device)):
        number = x.dim() == 0
        numbers.append(x.item() if number and not device else float("nan"))
        each.append(None if number else x.data_ptr())
        on_device.append(x.data_ptr() if number and device else None)
    return Tolerance(*numbers, *each, *on_device)


class HostKernels:
    """Tensors are contiguous and on the CPU; what they share with CPU ops, they share by bits."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_host_error.restype = ctypes.c_char_p
        self._library.cuda_host_seed.argtypes = [ctypes.c_uint64]
        for name, arguments in SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        # Whether numbers of tolerances are "in device memory"; elements of a range of a norm.
        self.tolerances_on_device = False
        self.chunk = 0

    def seed(self, seed):
        """Draws the order of threads and blocks from this seed, from now on."""
        self._library.cuda_host_seed(seed)

    def multiprocessors(self, count):
        """How many the device has, from now on."""
        self._library.cuda_host_multiprocessors(count)

    def call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            why = self._library.cuda_host_error().decode()
            raise RuntimeError(f"{name}: CUDA error {code}: {why}")

    def _tolerance(self, rtol, atol):
        return tolerance(rtol, atol, self.tolerances_on_device, self.tolerances_on_device)

    def _segments(self, segments):
        return Segments((Int64 * max(1, len(segments)))(*segments), len(segments), self.chunk)

    @staticmethod
    def _rows(k, flip):
        rows = list(k.unbind())
        if flip:
            rows[0], rows[-1] = rows[-1], rows[0]
        return rows

    def rk_stage(self, y0, k, flip, fresh, weights, h):
        rows = self._rows(k, flip)[: len(weights)]
        out = torch.full_like(y0, float("nan"))
        self.call(
            "stage", STORAGE[y0.dtype], address(y0), terms(rows, weights),
            address(*fresh or [None]), address(rows[-1]), address(out), h, y0.numel(),
        )  # fmt: skip
        return out

    def rk_combine(self, y, k, weights, h, h_graph=None, ordered=False):
        out = torch.full_like(y, float("nan"))
        self.call(
            "stage", STORAGE[y.dtype], address(y), terms(k, weights, ordered), None, None,
            address(out), h, y.numel(),
        )  # fmt: skip
        return out

    def rk_finish(
        self, y0, k, flip, fresh, y1, solution, error, h, rtol, atol, segments, ratio=None
    ):
        rows = self._rows(k, flip)
        result = torch.full((2,), float("nan"), dtype=torch.float64)
        self.call(
            "finish", STORAGE[y0.dtype], address(y0), terms(rows, solution),
            terms(rows, error), address(*fresh or [None]), address(rows[-1]), address(y1),
            address(ratio), h, self._tolerance(rtol, atol), self._segments(segments),
            address(result), y0.numel(),
        )  # fmt: skip
        return result

    # ---- steps that the device chooses -----------------------------------------------------------

    def attempt_stage(self, y0, k, fresh, weights, h):
        fresh = joined(fresh)
        rows = self._rows(k, False)[: len(weights)]
        out = torch.full_like(y0, float("nan"))
        self.call(
            "attempt_stage", y0.dtype == torch.float64, address(y0), terms(rows, weights),
            address(fresh), address(rows[-1]), address(out), address(h), y0.numel(),
        )  # fmt: skip
        return out

    def attempt_finish(self, y0, k, fresh, y1, solution, error, h, rtol, atol, segments):
        fresh = joined(fresh)
        rows = self._rows(k, False)
        result = torch.full((2,), float("nan"), dtype=torch.float64)
        self.call(
            "attempt_finish", y0.dtype == torch.float64, address(y0), terms(rows, solution),
            terms(rows, error), address(fresh), address(rows[-1]), address(y1),
            address(h), self._tolerance(rtol, atol), self._segments(segments), address(result),
            y0.numel(),
        )  # fmt: skip
        return result

    @staticmethod
    def _plan(plan):
        counts = [plan[i].numel() for i in (3, 4, 5)]
        return Plan(*map(address, plan), *counts)

    def attempt_control(self, plan, norms, moment, rule, nodes, time_dtype):
        number = ("begin", "first_step", "decide").index(moment)
        self.call(
            "control", time_dtype == torch.float64, plan[1].dtype == torch.float64, number,
            self._plan(plan), doubles(rule), doubles(nodes), len(nodes), address(norms),
        )  # fmt: skip

    def attempt_advance(self, plan, y, y1, k, middle, solution, time_dtype):
        rows = self._rows(k, False)
        self.call(
            "advance", time_dtype == torch.float64, y.dtype == torch.float64, self._plan(plan),
            address(y), address(y1), address(rows[0]), address(rows[-1]), terms(rows, middle),
            address(solution), y.numel(),
        )  # fmt: skip

    @staticmethod
    def _flow_tensors(plan):
        return FlowTensors(*map(address, plan), len(plan[3]))

    def flow_control(self, plan, norms, moment, rule, nodes):
        number = ("begin", "first_step", "decide", "recall").index(moment)
        self.call(
            "flow_control", plan[1].dtype == torch.float64, number, self._flow_tensors(plan),
            doubles(rule), doubles(nodes), len(nodes), address(norms),
        )  # fmt: skip

    def flow_advance(self, plan, y, y1, k, tape):
        rows = self._rows(k, False)
        self.call(
            "flow_advance", y.dtype == torch.float64, self._flow_tensors(plan), address(y),
            address(y1), address(rows[0]), address(rows[-1]), address(tape), tape.shape[1],
            y.numel(),
        )  # fmt: skip

    def attempt_combine(self, y, k, weights, h):
        # The kernel of a stage, with nothing to store.
        out = torch.full_like(y, float("nan"))
        self.call(
            "attempt_stage", y.dtype == torch.float64, address(y),
            terms([row.contiguous() for row in k], weights), None, None, address(out), address(h),
            y.numel(),
        )  # fmt: skip
        return out

    def rk_initial_norms(self, y0, f0, f1, rtol, atol, segments):
        result = torch.full((2,), float("nan"), dtype=torch.float64)
        self.call(
            "initial", STORAGE[y0.dtype], address(y0), address(f0), address(f1),
            self._tolerance(rtol, atol), self._segments(segments), address(result), y0.numel(),
        )  # fmt: skip
        return result

    def rk_interpolate(self, y0, y1, k, flip, middle, h, x, out):
        rows = self._rows(k, flip)
        self.call(
            "interpolate", STORAGE[y0.dtype], address(y0), address(y1), address(rows[0]),
            address(rows[-1]), terms(rows, middle), h, doubles(x), len(x), address(out), y0.numel(),
        )  # fmt: skip

    def time_tensors(self, values, dtype):
        out = torch.full((len(values),), float("nan"), dtype=dtype)
        self.call(
            "store_values", dtype == torch.float64, doubles(values), len(values), address(out)
        )
        return list(out.unbind())

    def probe_keys(self, x):
        batch = x.shape[0]
        keys = torch.full((batch,), -1)
        features = x.numel() // batch if batch else 0
        wide = x.dtype == torch.float64
        self.call("hash_keys", wide, address(x), batch, features, address(keys))
        return keys

    def probe_sample(self, keys, seed, probes, features, gaussian, dtype):
        batch = keys.numel()
        out = torch.full((probes, batch, features), float("nan"), dtype=dtype)
        self.call(
            "sample_probes", dtype == torch.float64, address(keys), seed % 2**64, probes, batch,
            features, gaussian, address(out),
        )  # fmt: skip
        return out
