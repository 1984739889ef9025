"""Commands that wait for a safe point, and kernels at hand."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.blueprints import families, signature
from services.blueprints.artifact import (
    Characterization,
    DigestMismatchError,
    KernelSignatureError,
    MalformedKernelError,
    Manifest,
    pack,
)
from services.blueprints.digest import sha256
from services.blueprints.spec import Blueprint, Interface, LayerInterface, SlotKind
from services.blueprints.vocabulary import Operation
from services.kasmina.commands import Command, CommandQueue, CommandState
from services.kasmina.errors import CommandConflictError, QueueFullError
from services.kasmina.kernel_cache import KernelCache


def command(number: int, **arguments: str | int) -> Command:
    return Command(f"c{number}", "germinate", arguments or {"slot": "a", "size": number})


def test_commands_are_handed_out_once_in_order_and_settled() -> None:
    queue = CommandQueue(limit=4)
    for number in range(3):
        assert queue.submit(command(number)).state is CommandState.QUEUED
    assert [handed.command_id for handed in queue.drain()] == ["c0", "c1", "c2"]
    assert queue.drain() == []
    receipt = queue.complete("c0", step=7, seed="s1")
    assert (receipt.state, receipt.step, receipt.seed) == (CommandState.APPLIED, 7, "s1")
    assert queue.complete("c1", step=7, error="the slot is locked").state is CommandState.REFUSED
    assert queue.get("c0") == receipt
    assert queue.get("c9") is None


def test_the_same_command_twice_is_one_and_another_under_its_id_is_refused() -> None:
    queue = CommandQueue(limit=4)
    first = queue.submit(command(1))
    assert queue.submit(command(1)) == first
    queue.drain()
    queue.complete("c1", step=1)
    assert queue.submit(command(1)).state is CommandState.APPLIED
    assert queue.drain() == []
    with pytest.raises(CommandConflictError, match="c1"):
        queue.submit(command(1, slot="b"))


def test_only_a_waiting_command_can_be_cancelled() -> None:
    queue = CommandQueue(limit=4)
    queue.submit(command(1))
    queue.submit(command(2))
    assert queue.cancel("c1").state is CommandState.CANCELLED
    assert [handed.command_id for handed in queue.drain()] == ["c2"]
    late = queue.cancel("c2")
    assert late.state is CommandState.QUEUED
    assert late.handed_out
    with pytest.raises(KeyError):
        queue.cancel("c9")


def test_the_queue_and_its_memory_are_bounded() -> None:
    queue = CommandQueue(limit=2, remembered=3)
    queue.submit(command(0))
    queue.submit(command(1))
    with pytest.raises(QueueFullError, match="2 commands"):
        queue.submit(command(2))
    assert queue.refused_full == 1
    for number in range(10):
        queue.submit(command(number))
        queue.drain()
        queue.complete(f"c{number}", step=number)
    assert [number for number in range(10) if queue.get(f"c{number}")] == [7, 8, 9]


def test_many_threads_submit_and_nothing_is_lost_or_doubled() -> None:
    queue = CommandQueue(limit=1000)
    handed: list[str] = []

    def submit() -> None:
        for number in range(100):
            queue.submit(command(number))

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        handed += [one.command_id for one in queue.drain()]
    handed += [one.command_id for one in queue.drain()]
    assert sorted(handed) == sorted(f"c{number}" for number in range(100))


# ------------------------------------------------------------------ kernels

WIDEN = Blueprint("widen", {}, families.FAMILIES["widen"].initialization)


def kernel_file(size: int) -> bytes:
    layer = LayerInterface("a", Operation.LINEAR, (8, 4), (8,), bias=True)
    reader = LayerInterface("b", Operation.LINEAR, (2, 8), (2,), bias=True)
    interface = Interface(SlotKind.WIDTH, (4,), (8,), writers=(layer,), readers=(reader,))
    manifest = Manifest(
        WIDEN, interface, signature.interface_signature(interface), size, 3, Characterization("cpu", 10)
    )
    return pack(manifest, {})


@pytest.fixture
def keys(tmp_path: Path) -> signature.KeyPair:
    return signature.generate_keypair(tmp_path)


def test_a_kernel_is_kept_found_and_unloaded(keys: signature.KeyPair) -> None:
    private, public = keys.private_key, keys.public_key
    cache = KernelCache(1 << 20)
    data = kernel_file(2)
    digest = sha256(data)
    assert cache.stats().hit_ratio is None
    assert cache.stats().load_seconds is None
    assert cache.get(digest) is None
    kernel = cache.put(data, digest, signature.sign(private, digest), public)
    assert kernel.manifest.size == 2
    assert cache.get(digest) is kernel
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.size_bytes) == (1, 1, 1, len(data))
    assert stats.hit_ratio == 0.5
    assert stats.load_seconds is not None
    assert stats.verify_seconds is not None
    assert cache.unload(digest)
    assert not cache.unload(digest)
    assert cache.get(digest) is None
    assert cache.stats().size_bytes == 0


def test_the_least_recently_used_kernel_leaves_first(keys: signature.KeyPair) -> None:
    private, public = keys.private_key, keys.public_key
    files = {size: kernel_file(size) for size in (2, 3, 4)}
    cache = KernelCache(sum(len(data) for data in files.values()) - 1)
    for size in (2, 3):
        cache.put(files[size], sha256(files[size]), signature.sign(private, sha256(files[size])), public)
    assert cache.get(sha256(files[2])) is not None
    cache.put(files[4], sha256(files[4]), signature.sign(private, sha256(files[4])), public)
    assert cache.get(sha256(files[3])) is None
    assert cache.get(sha256(files[2])) is not None
    assert cache.stats().evictions == 1
    tiny = KernelCache(10)
    assert tiny.put(files[2], sha256(files[2]), signature.sign(private, sha256(files[2])), public).manifest.size == 2
    assert tiny.stats().entries == 0


def test_what_is_not_vouched_for_is_never_parsed_nor_kept(keys: signature.KeyPair) -> None:
    private, public = keys.private_key, keys.public_key
    cache = KernelCache(1 << 20)
    data = kernel_file(2)
    digest = sha256(data)
    good = signature.sign(private, digest)
    garbage = b"no kernel at all"
    with pytest.raises(DigestMismatchError):
        cache.put(garbage, digest, good, public)
    with pytest.raises(KernelSignatureError):
        cache.put(garbage, sha256(garbage), good, public)
    with pytest.raises(MalformedKernelError):
        cache.put(garbage, sha256(garbage), signature.sign(private, sha256(garbage)), public)
    assert cache.stats().entries == 0


def test_the_torch_free_half_imports_no_torch() -> None:
    modules = ("lifecycle", "model", "errors", "commands", "kernel_cache")
    code = "import sys\n" + "".join(f"import services.kasmina.{name}\n" for name in modules)
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, timeout=60)
