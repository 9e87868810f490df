# SPDX-License-Identifier: Apache-2.0
"""VideoLLaMA2.1-7B-AV (https://arxiv.org/abs/2406.07476), the paper's main model."""
