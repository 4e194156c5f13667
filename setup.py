# SPDX-License-Identifier: Apache-2.0
"""Builds the native module with CMake; CMakeLists.txt says what it is made of.

Environment: EXPERTYARD_CUDA=ON|OFF|AUTO, EXPERTYARD_CUDA_ARCHS="90a-real;120-real",
EXPERTYARD_BUILD_DIR, MAX_JOBS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_TORCH = """expertyard: no PyTorch in this environment, and none is downloaded on the quiet. First
  pip install "torch>=2.11"
and then
  pip install --no-build-isolation ."""


def site_packages() -> list[Path]:
    # Under pip's build isolation sys.path is the overlay; sysconfig still names the environment
    # that is installed into.
    found = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    found += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [Path(p) for p in dict.fromkeys(found)]


def find_torch() -> Path:
    for site in site_packages():
        if (site / "torch/include/torch/csrc/stable/library.h").exists():
            return site / "torch"
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    sys.exit(NO_TORCH)


def find_nvcc() -> tuple[str, str | None] | None:
    """The compiler, and the folder of its libraries if it would not find them by itself."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path, None
    for site in site_packages():
        for wheel in sorted(site.glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(wheel), str(wheel.parents[1] / "lib")  # nvcc itself looks in lib64
    return None


class CMakeBuild(build_ext):
    def run(self) -> None:
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("EXPERTYARD_BUILD_DIR", ROOT / "build" / tag))
        env = dict(os.environ)
        scripts = sysconfig.get_path("scripts")
        env["PATH"] = os.pathsep.join([scripts, env.get("PATH", "")])
        cmake = shutil.which("cmake", path=env["PATH"])
        if cmake is None:
            sys.exit("expertyard: cmake is needed to build: pip install cmake ninja")

        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DEXPERTYARD_TORCH_DIR={find_torch()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        pybind11 = importlib.util.find_spec("pybind11")
        if pybind11 and pybind11.origin:
            where = Path(pybind11.origin).parent / "share/cmake/pybind11"
            configure.append(f"-Dpybind11_DIR={where}")
        if nvcc := find_nvcc():
            compiler, libraries = nvcc
            configure.append(f"-DCMAKE_CUDA_COMPILER={compiler}")
            if libraries:
                paths = [libraries, env.get("LIBRARY_PATH", "")]
                env["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        for name in ("EXPERTYARD_CUDA", "EXPERTYARD_CUDA_ARCHS"):
            if os.environ.get(name):
                configure.append(f"-D{name}={os.environ[name]}")
        if shutil.which("ninja", path=env["PATH"]):
            configure += ["-G", "Ninja"]

        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        inplace = self.inplace or self.editable_mode
        prefix = ROOT / "python" if inplace else Path(self.build_lib).resolve()
        self.quietly([cmake, "-S", str(ROOT), "-B", str(build), *configure], env)
        self.quietly([cmake, "--build", str(build), "--parallel", jobs], env)
        self.quietly([cmake, "--install", str(build), "--prefix", str(prefix)], env)

    def quietly(self, command: list[str], env: dict[str, str]) -> None:
        """Runs a command; its output is shown if it fails, or if the build is verbose."""
        quiet = not self.verbose
        out = subprocess.PIPE if quiet else None
        done = subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            if quiet:
                print(done.stdout, file=sys.stderr)
            sys.exit(f"expertyard: {' '.join(command[:2])} ... failed ({done.returncode})")

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "expertyard").glob("_C*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("expertyard._C", [])], cmdclass={"build_ext": CMakeBuild})
