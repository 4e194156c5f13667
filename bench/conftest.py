# SPDX-License-Identifier: Apache-2.0
"""Every benchmark's JSON names the machine and the versions that a figure needs beside it."""

from expertyard.bench.report import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["expertyard"] = machine()


def pytest_addoption(parser):
    parser.addoption("--shapes", default="small", help="of expertyard.bench.shapes, with commas")
    parser.addoption("--formats", default="bf16,int8,int4,fp8,mxfp4", help="with commas")
    parser.addoption("--peers", default="all", help="all, or none")
    parser.addoption("--tokens", default="1,16,256", help="tokens of a call, with commas")
