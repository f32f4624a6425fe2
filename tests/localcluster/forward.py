"""A port of this machine's loopback that leads into a cluster's network namespace.

    python -m tests.localcluster.forward LISTEN_PORT TARGET_PID TARGET_ADDRESS TARGET_PORT

The listening socket is made first and stays in this machine's namespace; the process then joins the target's, so that
every connection it opens starts there.
"""

import asyncio
import ctypes
import os
import socket
import sys

CLONE_NEWNET = 0x40000000


def join_network_namespace(pid: int) -> None:
    """setns(2); Python offers it only from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot join the network namespace of process {pid}")
    finally:
        os.close(descriptor)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:  # the other side was faster to close
        writer.close()


async def serve(listener: socket.socket, address: str, port: int, target: int) -> None:
    """Forward until the target, a pidfd, has ended: a port must not outlive what is behind it."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(target, ended.set)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(address, port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, target_writer), _copy(target_reader, writer))
        for stream in (writer, target_writer):
            stream.close()

    server = await asyncio.start_server(connected, sock=listener)
    await ended.wait()
    server.close()
    os._exit(0)  # connections that are still open lead nowhere


def main() -> None:
    listen_port, pid, address, port = sys.argv[1:]
    listener = socket.create_server(("127.0.0.1", int(listen_port)))
    target = os.pidfd_open(int(pid))
    join_network_namespace(int(pid))
    asyncio.run(serve(listener, address, int(port), target))


if __name__ == "__main__":
    main()
