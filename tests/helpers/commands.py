"""Commands as a user runs them, but from a process that has the large libraries imported already.

Every command of nnU-Net and ours imports torch, seaborn and the like for seven seconds. Here one process imports them
once and forks for each command; the child runs the very script of the environment's bin folder to its end. Libraries
that look at nnU-Net's variables when they are imported are left to the child. The workers of commands are forked, too,
instead of spawned, which is safe as long as torch and ITK have a single thread. What hangs on the start of Python
itself is tested by tests/test_discovery.py with processes of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "torch", "torch._dynamo", "torch.utils.data", "torchvision", "matplotlib.pyplot", "seaborn", "pandas", "nibabel",
    "scipy.stats", "scipy.ndimage", "skimage.morphology", "sklearn.model_selection", "timm.layers", "lightning_fabric",
    "safetensors.torch", "batchgeneratorsv2.transforms.base.basic_transform", "rich.progress", "SimpleITK",
    "dynamic_network_architectures.architectures.unet",
)  # fmt: skip
SINGLE = {"OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
OF_THE_START = ("PYTHON", "MKL_", "OPENBLAS_", "LD_")
"""Variables that count when a process starts: a command that is given another one starts by itself."""


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code (negative: the signal that ended it) and output, stdout before stderr, of a command.

    Args:
        command: a script of this environment and its arguments, or any other program.
    """
    script = Path(sys.executable).with_name(command[0])
    changed = {name for name in {*environment, *os.environ} if environment.get(name) != os.environ.get(name)}
    if not script.is_file() or any(name.startswith(OF_THE_START) for name in changed):
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        return done.returncode, done.stdout + done.stderr
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        request = {"argv": [str(script), *command[1:]], "environment": environment, "cwd": os.getcwd(),
                   "outputs": outputs}  # fmt: skip
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_server())
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            code = int(connection.makefile().read())
        return code, "".join(Path(path).read_text(encoding="utf-8") for path in outputs)


_address: str | None = None


def _server() -> str:
    """The address of the server of this process, which is started when it is first asked for."""
    global _address
    if _address is None:
        _address = os.path.join(tempfile.mkdtemp(prefix="commands"), "socket")
        command = [sys.executable, __file__, _address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | SINGLE)
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of commands did not start")
    return _address


def serve(address: str) -> dict:
    """Fork for every request; returns, in the child, what it is to run. Ends with the process that started it."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.collect()
    gc.freeze()  # what is there stays shared with the children
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none of the waiting processes is waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(5)
        print("ready", flush=True)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                listener.close()
                return _wait_for_child(connection)
            connection.close()
    shutil.rmtree(Path(address).parent)
    sys.exit()


def _wait_for_child(connection: socket.socket) -> dict:
    """Fork once more: the child gets the request, this process tells the exit code."""
    request = json.loads(connection.makefile().read())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        connection.close()
        return request
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(str(code).encode())
    os._exit(0)


def become(request: dict) -> NoReturn:
    """Be the command that was asked for, down to variables, folder and outputs, and end as it ends."""
    os.environ.clear()
    os.environ.update(request["environment"] | SINGLE)
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    end_with(lambda: runpy.run_path(sys.argv[0], run_name="__main__"), request["outputs"])


def end_with(function: Callable[[], object], outputs: Sequence[str | Path]) -> NoReturn:
    """Do the one thing that is left for this process, which was forked, and end as Python ends.

    Args:
        outputs: files to which stdout and stderr are appended, perhaps the same one.
    """
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    sys.modules["torch"].set_num_threads = lambda number: None
    for number, path in zip((1, 2), outputs, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    code: object = None
    try:
        function()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not (code is None or isinstance(code, int)):
        print(code, file=sys.stderr)
        code = 1
    # What Python does at its end, but for taking all the libraries apart, which takes seconds after a fork
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    become(serve(sys.argv[1]))
