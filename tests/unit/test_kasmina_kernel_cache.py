"""Kernels at hand: verified first, least recently used ones leave first."""

from __future__ import annotations

import subprocess
import sys
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
from services.kasmina.kernel_cache import KernelCache

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


def test_a_file_at_hand_is_verified_and_parsed_when_it_is_needed(keys: signature.KeyPair) -> None:
    private, public = keys.private_key, keys.public_key
    cache = KernelCache(1 << 20)
    data = kernel_file(2)
    digest = sha256(data)
    with pytest.raises(DigestMismatchError):
        cache.hold(b"another file", digest, signature.sign(private, digest), public)
    assert digest not in cache
    cache.hold(data, digest, signature.sign(private, digest), public)
    assert digest in cache
    assert cache.stats().verify_seconds is None, "whoever holds it does not pay for that"
    kernel = cache.get(digest)
    assert kernel is not None
    assert kernel.manifest.size == 2
    assert cache.get(digest) is kernel, "once is enough"
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.size_bytes) == (2, 0, 1, len(data))
    assert stats.verify_seconds is not None


def test_a_file_at_hand_that_is_not_vouched_for_is_never_parsed_nor_given(keys: signature.KeyPair) -> None:
    private, public = keys.private_key, keys.public_key
    cache = KernelCache(1 << 20)
    garbage = b"no kernel at all"
    digest = sha256(garbage)
    cache.hold(garbage, digest, signature.sign(private, sha256(b"something else")), public)
    with pytest.raises(KernelSignatureError):
        cache.get(digest)
    assert cache.get(digest) is None, "kept no longer"
    cache.hold(garbage, digest, signature.sign(private, digest), public)
    with pytest.raises(MalformedKernelError):
        cache.get(digest)
    assert cache.stats().size_bytes == 0


def test_the_torch_free_half_imports_no_torch() -> None:
    modules = ("lifecycle", "model", "errors", "kernel_cache")
    code = "import sys\n" + "".join(f"import services.kasmina.{name}\n" for name in modules)
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, timeout=60)
