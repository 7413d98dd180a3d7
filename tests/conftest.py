"""What holds for every test."""

import sys
from pathlib import Path

import host_build
import pytest
import torch
from host_ops import HostOps

# `bench` has what torchdiffeq's main branch has and its release lacks.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The states of the tests are small, and on a busy machine a second thread costs far more than
    it brings; tests of threading choose their own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cuda_host_folder(request, tmp_path_factory):
    """Where what runs CUDA's sources on a host is built, once for all processes and sessions."""
    if not host_build.CSRC.is_dir():
        pytest.skip("needs pycnf's sources")
    if host_build.find_compiler() is None:
        pytest.skip("needs g++")
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("cuda_host") if cache is None else cache.mkdir("cuda_host")


@pytest.fixture(scope="session")
def _cuda_host_ops(cuda_host_folder):
    return HostOps(host_build.build_ops(cuda_host_folder))


@pytest.fixture
def cuda_host_ops(_cuda_host_ops):
    """csrc/torch's CUDA ops on a host (see host_ops.py)."""
    _cuda_host_ops.seed(1)
    _cuda_host_ops.multiprocessors(4)
    broken = _cuda_host_ops.broken_guards()
    yield _cuda_host_ops
    assert _cuda_host_ops.broken_guards() == broken, "written outside of a tensor"
