"""Kernels at hand: verified, then parsed, when they are needed; least recently used ones unloaded beyond a bound."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from statistics import median

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints import artifact
from services.blueprints.artifact import Kernel

_LATENCIES_KEPT = 1024


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the cache did so far.

    Attributes:
        hits: Lookups that found their kernel.
        misses: Lookups that did not.
        evictions: Kernels unloaded to make room.
        entries: Kernels at hand.
        size_bytes: Bytes of their files.
        limit_bytes: Bound of those.
        load_seconds: Median time of the last lookups that hit; ``None`` before the first.
        verify_seconds: Median time to verify and parse of the last kernels opened; ``None`` before the first.
    """

    hits: int
    misses: int
    evictions: int
    entries: int
    size_bytes: int
    limit_bytes: int
    load_seconds: float | None
    verify_seconds: float | None

    @property
    def hit_ratio(self) -> float | None:
        """Hits per lookup, 0..1; ``None`` before the first lookup."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A file that is at hand, its signature neither verified nor a byte of it parsed."""

    data: bytes
    signature: bytes
    public_key: Ed25519PublicKey


class KernelCache:
    """A thread-safe LRU of kernels by the digest of their file; none leaves it unverified.

    Args:
        max_bytes: Bound on the sum of the files' sizes. A single larger kernel is returned but not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kernels: OrderedDict[bytes, tuple[Kernel | _Sealed, int]] = OrderedDict()
        self._bytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0
        self._load_seconds: deque[float] = deque(maxlen=_LATENCIES_KEPT)
        self._verify_seconds: deque[float] = deque(maxlen=_LATENCIES_KEPT)

    def put(self, data: bytes, digest: bytes, signature: bytes, public_key: Ed25519PublicKey) -> Kernel:
        """Verify a kernel's file, parse it, and keep it at hand.

        Args:
            data: The file.
            digest: SHA-256 that was promised, 32 bytes.
            signature: Ed25519 over the digest.
            public_key: Whom we trust.

        Raises:
            ArtifactError: It is not what was promised, nobody trusted vouches for it, or it is no kernel. Nothing of
                it was parsed in the first two cases, and nothing is kept.
        """
        start = time.perf_counter()
        kernel = artifact.open_verified(data, digest, signature, public_key)
        elapsed = time.perf_counter() - start
        with self._lock:
            self._verify_seconds.append(elapsed)
            self._keep(digest, kernel, len(data))
        return kernel

    def hold(self, data: bytes, digest: bytes, signature: bytes, public_key: Ed25519PublicKey) -> None:
        """Keep a kernel's file at hand, to be verified and parsed by the first :meth:`get` of it.

        For whoever may be beside the thread that computes: verifying and parsing is some hundred microseconds of
        Python, which would be taken from whatever step is under way.

        Args:
            data: The file.
            digest: SHA-256 that was promised, 32 bytes.
            signature: Ed25519 over the digest.
            public_key: Whom we trust.

        Raises:
            DigestMismatchError: It is not what was promised.
        """
        artifact.verify_digest(data, digest)
        with self._lock:
            self._keep(digest, _Sealed(data, signature, public_key), len(data))

    def get(self, digest: bytes) -> Kernel | None:
        """The kernel with this digest, if it is at hand.

        Raises:
            ArtifactError: It was at hand, but nobody trusted vouches for it, or it is no kernel; it is kept no longer.
        """
        start = time.perf_counter()
        with self._lock:
            found = self._kernels.get(digest)
            if found is None:
                self._misses += 1
                return None
            self._kernels.move_to_end(digest)
            self._hits += 1
        kernel, _ = found
        if isinstance(kernel, _Sealed):
            self.unload(digest)
            kernel = self.put(kernel.data, digest, kernel.signature, kernel.public_key)
        with self._lock:
            self._load_seconds.append(time.perf_counter() - start)
        return kernel

    def __contains__(self, digest: bytes) -> bool:
        """Whether it is at hand; counts as no lookup."""
        with self._lock:
            return digest in self._kernels

    def unload(self, digest: bytes) -> bool:
        """Let go of a kernel; says whether it was at hand."""
        with self._lock:
            return self._forget(digest)

    def _keep(self, digest: bytes, kernel: Kernel | _Sealed, size: int) -> None:
        self._forget(digest)
        if size <= self._max_bytes:
            self._kernels[digest] = (kernel, size)
            self._bytes += size
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._kernels)))
            self._evictions += 1

    def _forget(self, digest: bytes) -> bool:
        found = self._kernels.pop(digest, None)
        if found is None:
            return False
        self._bytes -= found[1]
        return True

    def stats(self) -> CacheStats:
        """What it did so far."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                entries=len(self._kernels),
                size_bytes=self._bytes,
                limit_bytes=self._max_bytes,
                load_seconds=median(self._load_seconds) if self._load_seconds else None,
                verify_seconds=median(self._verify_seconds) if self._verify_seconds else None,
            )
