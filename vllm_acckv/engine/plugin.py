# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: makes the KV policy flags known to vLLM.

It runs in every vLLM process, so it imports nothing heavy and changes nothing but the command
line. A policy is switched on by :mod:`vllm_acckv.engine.startup` when somebody asks for one.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Install the flags. Safe to call more than once; never raises."""
    from vllm_acckv.engine.compat import IncompatibleVLLMError

    try:
        from vllm_acckv.engine import flags

        flags.install()
    except IncompatibleVLLMError as error:
        # vLLM itself must keep working after an upgrade.
        logging.getLogger("vllm.acckv").warning("KV policies are not available: %s", error)
