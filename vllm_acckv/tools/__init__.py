# SPDX-License-Identifier: Apache-2.0
"""Builders of tiny checkpoints and media files for tests and trials without downloads."""
