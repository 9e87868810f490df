# SPDX-License-Identifier: Apache-2.0
"""The driver half of the backend."""

import os

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    @classmethod
    def is_active(cls):
        return os.environ.get("TRITON_INTERPRET") == "1"

    def map_python_to_cpp_type(self, ty):
        raise RuntimeError("the interpreter backend does not compile")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise RuntimeError("the interpreter backend does not benchmark")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0
