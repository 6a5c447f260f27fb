"""specs/cluster 的 CLUSTER-53：两台机器之间的信道加密，两头都核对证书。"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import trustme

from deepseek_export.cli.options import cluster_settings
from deepseek_export.cluster.host import spawn
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.stage import CLOSED, StageSpec
from deepseek_export.cluster.tls import TlsFiles, check_tls, secured
from deepseek_export.cluster.wire import Channel, Frame
from deepseek_export.errors import DsxError
from tests.engines import refused

pytestmark = pytest.mark.contract


def issued(folder: Path, ca: trustme.CA, name: str, **options: object) -> TlsFiles:
    """``ca`` 签的一份。"""
    one = ca.issue_cert(name, **options)  # type: ignore[arg-type]
    files = TlsFiles(*(str(folder / f"{name}.{part}") for part in ("cert", "key", "ca")))
    one.cert_chain_pems[0].write_to_path(files.cert)
    one.private_key_pem.write_to_path(files.key)
    ca.cert_pem.write_to_path(files.ca)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[TlsFiles]:
    """同一个 CA 的两份，与另一个 CA 的一份。"""
    folder, ours = tmp_path_factory.mktemp("tls"), trustme.CA()
    return [
        issued(folder, ours, "one.example"),
        issued(folder, ours, "two.example"),
        issued(folder, trustme.CA(), "stranger.example"),
    ]


def both(server: TlsFiles | None, client: TlsFiles | None, seconds: float = 20) -> list[object]:
    """两头各握各的；得到套接字，或错误。"""
    ends = socket.create_server(("127.0.0.1", 0))
    going = socket.create_connection(ends.getsockname())
    coming, _ = ends.accept()
    ends.close()

    def shake(stream: socket.socket, one: TlsFiles | None, server_side: bool) -> object:
        try:
            return secured(stream, one, server_side, seconds)
        except DsxError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(shake, coming, server, True), pool.submit(shake, going, client, False)]
        return [one.result() for one in found]


def channels(server: TlsFiles | None, client: TlsFiles | None) -> tuple[Channel, Channel]:
    coming, going = both(server, client)
    assert isinstance(coming, socket.socket)
    assert isinstance(going, socket.socket)
    return Channel(coming, "", 10), Channel(going, "", 10)


def test_frames_cross_an_encrypted_channel(files):
    """CLUSTER-53：大的小的帧、心跳照样过；线上看不到内容。"""
    coming, going = channels(files[0], files[1])
    big = np.arange(5_000_000, dtype=np.float32)
    sent = [Frame({"op": "a"}), Frame({"op": "big"}, {"x": big}), Frame({"op": "b"}, {"y": big[:7]})]

    def send() -> None:
        for frame in sent:
            going.send(frame)

    thread = threading.Thread(target=send)
    thread.start()
    for frame in sent:
        got = coming.receive()
        assert got.meta == frame.meta
        assert {name: a.tobytes() for name, a in got.arrays.items()} == {
            name: a.tobytes() for name, a in frame.arrays.items()
        }
    thread.join()
    for number in range(5):
        going.send(Frame({"op": "n", "n": number}))
    found: list[Frame] = []
    while len(found) < 5:
        found += coming.drain()
    assert [one.meta["n"] for one in found] == list(range(5))
    going.close()
    refused("DSX-E742", coming.receive)
    coming.close()


def test_the_wire_shows_nothing(files):
    """CLUSTER-53：没有证书时线上读得到内容，有了就读不到。"""
    marker = "床前明月光-marker"

    def seen(server: TlsFiles | None, client: TlsFiles | None) -> bytes:
        coming, going = both(server, client)
        assert isinstance(coming, socket.socket)
        assert isinstance(going, socket.socket)
        sender = Channel(going, "", 5)
        sender.send(Frame({"op": marker}))
        raw = socket.socket(fileno=coming.detach())
        raw.settimeout(10)
        try:
            return raw.recv(4096)
        finally:
            raw.close()
            sender.close()

    assert b"marker" in seen(None, None)
    assert b"marker" not in seen(files[0], files[1])


@pytest.mark.parametrize(("server", "client"), [(0, 2), (2, 0)])
def test_a_stranger_is_refused_by_both(files, server, client):
    """CLUSTER-53：证书由别的 CA 签的，应的与连的都不认。"""
    coming, going = both(files[server], files[client])
    errors = [one for one in (coming, going) if isinstance(one, DsxError)]
    assert errors
    assert {error.code for error in errors} == {"DSX-E749"}
    if isinstance(going, socket.socket):  # 连的一方先握完；应的一方一看不对就断
        refused("DSX-E742", Channel(going, "", 10).receive)


@pytest.mark.parametrize(("server", "client"), [(0, None), (None, 0)])
def test_one_side_without_tls_is_refused(files, server, client):
    """CLUSTER-53：一头加密、一头不加密，握不成，限时说清。"""
    found = both(*(None if one is None else files[one] for one in (server, client)), seconds=0.5)
    (error,) = (one for one in found if isinstance(one, DsxError))
    assert error.code == "DSX-E749"


def test_files_that_cannot_be_used(files, tmp_path):
    """CLUSTER-53：读不了、不是一对、不是 PEM，起之前就说；三个要给全，要配 ``--ray``。"""
    check_tls(None)
    check_tls(files[0])
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate", encoding="utf-8")
    none, pipe = str(tmp_path / "none"), tmp_path / "pipe.pem"
    os.mkfifo(pipe)
    for bad in (
        {"cert": none},
        {"key": files[1].key},
        {"ca": none},
        {"ca": str(broken)},
        {"cert": str(broken)},
        {"key": str(tmp_path)},
        *({name: str(pipe)} for name in ("cert", "key", "ca")),
    ):
        refused("DSX-E756", check_tls, replace(files[0], **bad))
    refused("DSX-E756", lambda: ClusterSettings(tls=files[0]))
    paths = tuple(map(Path, astuple(files[0])))
    assert cluster_settings(1, "auto", "pack", paths).tls == files[0]  # type: ignore[arg-type]
    refused("DSX-E756", lambda: cluster_settings(1, "auto", "pack", (paths[0], None, None)))
    refused("DSX-E756", lambda: cluster_settings(1, None, "pack", paths))  # type: ignore[arg-type]


def test_an_encrypted_key_is_refused(files, tmp_path):
    """CLUSTER-53：私钥加了密的，没有地方问密码：拒绝，不停下来等。"""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(Path(files[0].key).read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    refused("DSX-E756", check_tls, replace(files[0], key=str(locked)))


def test_a_stage_shakes_hands_on_both_sides(files, tmp_path):
    """CLUSTER-53：stage 进程在继承来的两条连接上握手，之后照常：bundle 打不开，原因也经过它说回来。"""
    first, up = socket.socketpair()
    down, last = socket.socketpair()
    spec = StageSpec(
        bundle=str(tmp_path / "none"),
        index=0,
        count=1,
        backend="ort",
        threads=1,
        silence_s=5.0,
        start_s=60.0,
        upstream=up.fileno(),
        downstream=down.fileno(),
        parent=os.getpid(),
        tls=astuple(files[1]),
    )
    process = spawn(spec)
    up.close()
    down.close()
    try:
        mine = secured(first, files[0], False, 60)
        theirs = Channel(secured(last, files[0], True, 60), "", 60)
        told = theirs.receive()
        assert told.meta["op"] == "fatal"
        assert told.meta["code"].startswith("DSX-E4")
        assert process.wait(60) == CLOSED
        mine.close()
        theirs.close()
    finally:
        process.kill()
        process.wait()
