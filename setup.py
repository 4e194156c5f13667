# SPDX-License-Identifier: Apache-2.0
"""Builds the native module with CMake; CMakeLists.txt says what it is made of.

Environment: EXPERTYARD_CUDA=ON|OFF|AUTO, EXPERTYARD_BUILD_DIR, MAX_JOBS;
EXPERTYARD_CUDA_ARCHS="90a-real;120-real" or "all" (default: those of this machine's cards; all
where there is none).
"""

import importlib.util
import os
import re
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


def cuda_archs() -> str | None:
    """CMake's names of the architectures to compile for; None: all that csrc/cuda knows.

    Code for sm_80 runs on sm_86 too, so a card that is not known gets the nearest below it.
    """
    asked = os.environ.get("EXPERTYARD_CUDA_ARCHS")
    if asked:
        return None if asked == "all" else asked
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    text = (ROOT / "csrc/cuda/CMakeLists.txt").read_text(encoding="utf-8")
    known = sorted({int(name) for name in re.findall(r"\b(\d+)a?-real\b", text)})
    found = set()
    for major, minor in re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE):
        card = int(major + minor)
        if below := [arch for arch in known if arch <= card and arch // 10 == card // 10]:
            found.add(below[-1])
    return ";".join("90a-real" if arch == 90 else f"{arch}-real" for arch in sorted(found)) or None


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
        if os.environ.get("EXPERTYARD_CUDA"):
            configure.append(f"-DEXPERTYARD_CUDA={os.environ['EXPERTYARD_CUDA']}")
        archs = cuda_archs()
        configure.append(f"-DEXPERTYARD_CUDA_ARCHS={archs}" if archs else "-UEXPERTYARD_CUDA_ARCHS")
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
