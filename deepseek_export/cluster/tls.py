"""两台机器之间的信道加密：TLS 1.3，两头都要证书（mTLS），由同一个 CA 签。

先按 :mod:`.handshake` 证明知道密钥，再在同一条连接上握手，之后才有帧。只看证书是不是 ``ca`` 签的，不看名字：stage 放到哪台机器由 Ray 定，所以 ``ca`` 要
是专给这件事用的。三个文件在每台机器的同样路径上，各机器的证书可以不同。
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_export.errors import DsxError
from deepseek_export.paths import open_regular

#: 一次写进 TLS 的至多这么多字节：写不完的整段要重写，段小，等的时候才看得到进展。
_SLICE = 1 << 16


@dataclass(frozen=True)
class TlsFiles:
    """PEM 文件的路径。

    Attributes:
        cert, key: 自己的证书（链）与私钥，私钥不加密。
        ca: 对方的证书要由它签。
    """

    cert: str
    key: str
    ca: str


def secured(
    stream: socket.socket, files: TlsFiles | None, server_side: bool, seconds: float
) -> socket.socket:
    """在连好的 ``stream`` 上握手；没有给证书就原样。``stream`` 从此归返回的那个。

    Args:
        stream: 连好的套接字。
        files: 证书；``None`` 不加密。
        server_side: 应的一方。
        seconds: 握手每一步至多多少秒。

    Raises:
        DsxError: ``DSX-E756``，证书文件用不了；``DSX-E749``，对方的证书不对，或没有握成。
    """
    if files is None:
        return stream
    context = _context(files, server_side)
    stream.settimeout(seconds)
    try:
        return context.wrap_socket(stream, server_side=server_side)
    except OSError as error:
        stream.close()
        reason = getattr(error, "verify_message", "") or getattr(error, "reason", None) or str(error)
        todo = "核对两端的 --tls-cert、--tls-key、--tls-ca：都要给，证书由同一个 CA 签，没有过期"
        raise DsxError("DSX-E749", f"TLS 没有握成：{reason}", todo) from error


def check_tls(files: TlsFiles | None) -> None:
    """证书文件能不能用；起 stage 之前就该查。

    Raises:
        DsxError: ``DSX-E756``。
    """
    if files is not None:
        _context(files, True)


def _context(files: TlsFiles, server_side: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.sslsocket_class = _Stream
    if server_side:
        context.num_tickets = 0  # 发的一方从不读：会话票据没有人收
    what = files.cert
    try:
        for what in (files.cert, files.key, files.ca):
            open_regular(Path(what)).close()  # OpenSSL 会等在管道上
        what = files.cert
        context.load_cert_chain(files.cert, files.key, password=_encrypted)
        what = files.ca
        context.load_verify_locations(files.ca)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        todo = "给 PEM 文件：证书与它的私钥是一对，私钥不加密，每台机器上在同样的路径"
        raise DsxError("DSX-E756", f"{what}：{reason}", todo) from error
    return context


def _encrypted() -> str:
    """私钥加了密：没有地方问密码。"""
    raise ValueError("私钥是加密的")


class _Stream(ssl.SSLSocket):
    """不阻塞的时候与普通的套接字一样：要等就是 ``BlockingIOError``。"""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        try:
            return super().recv_into(buffer, nbytes, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def send(self, data: Any, flags: int = 0) -> int:
        try:
            return super().send(memoryview(data)[:_SLICE], flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error
