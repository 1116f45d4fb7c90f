"""Python processes that begin with the libraries imported: a server that has them forks one for each client.

Importing torch, transformers and PEFT takes a process longer than what most tests have it do. `client` stands in for
the interpreter, of a launcher and, by torchrun's PYTHON_EXEC, of its ranks: arguments, environment, working folder,
streams, signals and the exit code are the client's; this project's own modules are imported anew.

    python tests/support/warm.py serve SOCKET
    python tests/support/warm.py client SOCKET [-u] (-m MODULE | FILE) [ARGUMENTS]
"""

import array
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys

LIBRARIES = (
    *("accelerate.commands.launch", "bitsandbytes", "datasets", "peft", "transformers.models.llama.modeling_llama"),
    *("torch.distributed.fsdp", "torch.distributed.run", "torch.distributed.tensor"),
)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def client(address: str, argv: list[str]) -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps([argv, dict(os.environ), os.getcwd()]).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(request)
    answers = connection.makefile("r")
    pid = int(answers.readline())
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def run(argv: list[str], environment: dict[str, str], folder: str, streams: list[int]) -> None:
    """In the fork: what `python ARGV` does; does not return."""
    import atexit
    import runpy
    import threading
    import traceback

    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, buffering=1, closefd=False) for i, mode in enumerate("rww"))
    for number in FORWARDED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    argv = [argument for i, argument in enumerate(argv) if argument != "-u" or i > 0]
    code = 0
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], folder
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as an interpreter that ends: threads that are no daemons, then what was to run at the exit
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def request_of(connection: socket.socket) -> tuple[list, list[int]]:
    size, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    content, left = b"", int.from_bytes(size, "big")
    while len(content) < left:
        content += connection.recv(left - len(content))
    return json.loads(content), list(streams)


def serve(address: str) -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    parent, children = os.getppid(), {}
    while os.getppid() == parent:
        ready, *_ = select.select([listener, *children], [], [], 0.02)
        if listener in ready:
            connection, _ = listener.accept()
            request, streams = request_of(connection)
            pid = os.fork()
            if pid == 0:
                listener.close()
                for other in (connection, *children):
                    other.close()
                run(*request, streams)
            for descriptor in streams:
                os.close(descriptor)
            children[connection] = pid
            connection.sendall(f"{pid}\n".encode())
        for connection, pid in list(children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # the client was killed
                    connection.sendall(f"{code}\n".encode())
                connection.close()
                del children[connection]
            elif connection in ready and not connection.recv(1):  # the client was killed: so is what it stands for
                os.kill(pid, signal.SIGKILL)
    for pid in children.values():
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        client(sys.argv[2], sys.argv[3:])
