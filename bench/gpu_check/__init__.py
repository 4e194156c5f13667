# SPDX-License-Identifier: Apache-2.0
"""What bench/gpu_check.sh runs. Nothing here is imported by the product."""
