# SPDX-License-Identifier: Apache-2.0
"""The installed benchmark: expert kernels beside this machine's own limits and beside their peers.

Times mean nothing alone: memory bandwidth of a shared machine halves and doubles within minutes.
So every sample of every contender stands between two probes of the limits in the same process, on
the same threads; contenders take turns on the same routing; and medians are reported, as shares of
the limits and as ratios to the peers.
"""
