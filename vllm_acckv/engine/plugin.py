# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: makes models and the KV policy flags known to vLLM.

It runs in every vLLM process, so of models it imports configurations only, and it changes nothing
but the command line. A policy is switched on by :mod:`vllm_acckv.engine.startup` when somebody asks
for one.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Register the models and install the flags. Safe to call more than once; never raises.

    vLLM itself must keep working after an upgrade, so what no longer fits is left out.
    """
    from vllm_acckv.engine.compat import IncompatibleVLLMError

    logger = logging.getLogger("vllm.acckv")
    try:
        from vllm_acckv import models

        models.register_with_vllm()
    except Exception as error:
        logger.warning(
            "VideoLLaMA2 and AVicuna are not available: %s: %s", type(error).__name__, error
        )
    try:
        from vllm_acckv.engine import flags

        flags.install()
    except IncompatibleVLLMError as error:
        logger.warning("KV policies are not available: %s", error)
