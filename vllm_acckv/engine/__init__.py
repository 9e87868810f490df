# SPDX-License-Identifier: Apache-2.0
"""Everything that knows vLLM's internals; :mod:`.compat` lists what is wrapped."""
