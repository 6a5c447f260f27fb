"""两台机器之间的信道：连上之后，先互相证明知道同一个密钥。

密钥自己不上线：各出一个随机数，各用 HMAC-SHA256 证明。每一步长度固定、限时，证明不了就断开，一个字节的帧也不收。之后的内容不加密也不防篡改（校验和只防出错）：
要这些就走自己的加密网络。不是回环地址而没有密钥，拒绝监听也拒绝连接。
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import suppress
from ipaddress import ip_address

from deepseek_export.errors import DsxError

_MAGIC = b"DSXA\x01"
_NONCE = _PROOF = 32
#: 应的一方，每一步至多等几秒。
STEP_S = 5.0


def listen(host: str, secret: bytes) -> socket.socket:
    """在 ``host`` 上监听，端口由系统挑。

    Args:
        host: IP 地址。
        secret: 密钥；回环地址上可以是空的。

    Raises:
        DsxError: ``DSX-E749``，不是回环地址而没有密钥。
        OSError: 地址用不了。
    """
    _require_secret(host, secret)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=8)
    return listening


def accept(listening: socket.socket, secret: bytes, seconds: float) -> socket.socket:
    """等一个证明得了自己的连上来；证明不了的断开，接着等。

    Args:
        listening: :func:`listen` 的结果。
        secret: 密钥。
        seconds: 至多等多少秒。

    Raises:
        DsxError: ``DSX-E749``，到时还没有。
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        listening.settimeout(left)
        try:
            stream, _ = listening.accept()
        except TimeoutError:
            break
        try:
            _prove_server(stream, secret)
            return stream
        except (OSError, DsxError):
            stream.close()
    raise DsxError("DSX-E749", f"{seconds:g} 秒内没有证明得了自己的连上来", "核对两端的密钥与网络")


def connect(address: tuple[str, int], secret: bytes, seconds: float) -> socket.socket:
    """连到 ``address``，互相证明；连上与等对方应各至多 ``seconds`` 秒。

    Raises:
        DsxError: ``DSX-E749``，连不上，或对方证明不了自己、不认这里的密钥。
    """
    host, port = address
    _require_secret(host, secret)
    where = f"{host}:{port}"
    try:
        stream = socket.create_connection((host, port), timeout=seconds)
    except OSError as error:
        raise DsxError("DSX-E749", f"连不上 {where}：{error}", "核对地址、防火墙，对方起来了没有") from error
    try:
        _prove_client(stream, secret, where, seconds)
    except OSError as error:
        stream.close()
        raise DsxError("DSX-E749", f"{where} 断开了：{error}", "核对两端的密钥") from error
    except DsxError:
        stream.close()
        raise
    return stream


def _prove_server(stream: socket.socket, secret: bytes) -> None:
    stream.settimeout(STEP_S)
    mine = secrets.token_bytes(_NONCE)
    stream.sendall(_MAGIC + mine)
    said = _exactly(stream, _NONCE + _PROOF)
    theirs, proof = said[:_NONCE], said[_NONCE:]
    if not hmac.compare_digest(proof, _proof(secret, b"client", mine, theirs)):
        raise DsxError("DSX-E749", "对方的密钥不对", "核对两端的密钥")
    stream.sendall(_proof(secret, b"server", mine, theirs))


def _prove_client(stream: socket.socket, secret: bytes, where: str, seconds: float) -> None:
    stream.settimeout(seconds)  # 对方监听着，还没有开始应
    said = _exactly(stream, len(_MAGIC) + _NONCE)
    if said[: len(_MAGIC)] != _MAGIC:
        raise DsxError("DSX-E749", f"{where} 不是这一版 dsx 的 stage", "核对地址与两端的版本")
    theirs, mine = said[len(_MAGIC) :], secrets.token_bytes(_NONCE)
    stream.sendall(mine + _proof(secret, b"client", theirs, mine))
    if not hmac.compare_digest(_exactly(stream, _PROOF), _proof(secret, b"server", theirs, mine)):
        raise DsxError("DSX-E749", f"{where} 的密钥不对", "核对两端的密钥")


def _proof(secret: bytes, role: bytes, server: bytes, client: bytes) -> bytes:
    return hmac.digest(secret, role + server + client, "sha256")


def _exactly(stream: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        block = stream.recv(size - len(found))
        if not block:
            raise ConnectionResetError("对方关了")
        found += block
    return found


def _require_secret(host: str, secret: bytes) -> None:
    loopback = False
    with suppress(ValueError):
        loopback = ip_address(host).is_loopback
    if not loopback and not secret:
        raise DsxError("DSX-E749", f"{host} 不是本机，而没有密钥", "给一个密钥（secret），或只用回环地址")
