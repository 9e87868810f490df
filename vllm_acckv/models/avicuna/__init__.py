# SPDX-License-Identifier: Apache-2.0
"""AVicuna: Vicuna with one token per picture and per window of sound."""
