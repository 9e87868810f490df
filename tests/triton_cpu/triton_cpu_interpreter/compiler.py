# SPDX-License-Identifier: Apache-2.0
"""The compiler half of the backend, which refuses to compile."""

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreter"

    def parse_options(self, options):
        raise RuntimeError("the interpreter backend does not compile")

    def add_stages(self, stages, options, language):
        raise RuntimeError("the interpreter backend does not compile")

    def load_dialects(self, context):
        raise RuntimeError("the interpreter backend does not compile")

    def get_module_map(self):
        return {}
