"""A small ssh server for tests: one public key may log in, commands run in bash as this user.

    python tests/slurm/ssh_server.py PORT HOST_KEY AUTHORIZED_KEY     (private key file, public key file)

Files can be fetched by SFTP, not written.
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
from pathlib import Path

import paramiko


class Session(paramiko.ServerInterface):
    def __init__(self, authorized: str) -> None:
        self.authorized = authorized

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if key.get_base64() == self.authorized else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_channel_env_request(self, channel: paramiko.Channel, name: bytes, value: bytes) -> bool:
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=execute, args=(channel, command.decode()), daemon=True).start()
        return True


class Files(paramiko.SFTPServerInterface):
    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(Path(path).stat())
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    lstat = stat

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        handle = paramiko.SFTPHandle(flags)
        try:
            handle.readfile = io.BytesIO(Path(path).read_bytes())  # type: ignore[attr-defined]
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        return handle


def execute(channel: paramiko.Channel, command: str) -> None:
    """Runs `command`, its three streams being the channel's."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(["bash", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
    assert process.stdin
    assert process.stdout
    assert process.stderr

    def feed() -> None:
        assert process.stdin
        try:
            while data := channel.recv(32768):
                process.stdin.write(data)
        except BrokenPipeError:
            return  # the command has ended without reading all
        process.stdin.close()

    def drain_errors() -> None:
        assert process.stderr
        while data := process.stderr.read(32768):
            channel.sendall_stderr(data)

    threading.Thread(target=feed, daemon=True).start()
    errors = threading.Thread(target=drain_errors)
    errors.start()
    while data := process.stdout.read(32768):
        channel.sendall(data)
    errors.join()
    channel.send_exit_status(process.wait())
    channel.close()


def main() -> None:
    port, host_key, authorized = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_text().split()[1]
    with socket.create_server(("127.0.0.1", port)) as listener:
        print("listening", flush=True)
        while True:
            connection, _ = listener.accept()
            transport = paramiko.Transport(connection)
            transport.add_server_key(paramiko.Ed25519Key(filename=host_key))
            transport.set_subsystem_handler("sftp", paramiko.SFTPServer, Files)
            transport.start_server(server=Session(authorized), event=threading.Event())


if __name__ == "__main__":
    main()
