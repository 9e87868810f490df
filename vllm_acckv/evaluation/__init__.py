# SPDX-License-Identifier: Apache-2.0
"""What compression costs in quality: questions about clips, and how right the answers are."""
