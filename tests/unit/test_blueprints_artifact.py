"""Kernels as files: whatever happens to the bytes, the answer is the kernel or a typed error."""

from __future__ import annotations

import contextlib
import json
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from services.blueprints import artifact, signature
from services.blueprints.artifact import (
    ArtifactError,
    Characterization,
    DigestMismatchError,
    KernelSignatureError,
    MalformedKernelError,
    Manifest,
)
from services.blueprints.digest import JsonValue
from services.blueprints.spec import SpecError
from tests.infrastructure.kernels import WIDEN, WIDTH, SignedKernel, signed_kernel


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def kernel(keys: Path) -> SignedKernel:
    return signed_kernel(keys, latency_seconds=0.001, memory_bytes=1000)


def _rebuilt(kernel: SignedKernel, change: Any) -> bytes:
    """The kernel's file with its header changed by ``change(header)``."""
    (length,) = struct.unpack_from("<Q", kernel.data)
    header = json.loads(kernel.data[8 : 8 + length])
    changed = json.dumps(change(header)).encode()
    return struct.pack("<Q", len(changed)) + changed + kernel.data[8 + length :]


def _with_manifest(kernel: SignedKernel, **changes: JsonValue) -> bytes:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        manifest = {**json.loads(header["__metadata__"]["esper"]), **changes}
        return {**header, "__metadata__": {"esper": json.dumps(manifest)}}

    return _rebuilt(kernel, change)


def test_a_kernel_comes_back_as_it_was_packed(kernel: SignedKernel, keys: Path) -> None:
    key = signature.load_public_key(keys)
    opened = artifact.open_verified(kernel.data, kernel.digest, kernel.signature, key)
    assert opened.manifest == kernel.manifest
    assert opened.manifest.target == "cpu"
    assert opened.tensors["reduce.weight"].shape == (2, 8, 3, 3)
    assert artifact.pack(opened.manifest, opened.tensors) == kernel.data


def test_a_widening_kernel_has_no_tensors(keys: Path) -> None:
    kernel = signed_kernel(keys, blueprint=WIDEN, interface=WIDTH, size=4)
    assert artifact.unpack(kernel.data).tensors == {}


def test_another_digest_signature_or_key_is_refused(kernel: SignedKernel, keys: Path, tmp_path: Path) -> None:
    key = signature.load_public_key(keys)
    with pytest.raises(DigestMismatchError, match=kernel.digest.hex()):
        artifact.verify(kernel.data + b"\0", kernel.digest, kernel.signature, key)
    with pytest.raises(DigestMismatchError, match="32 bytes"):
        artifact.verify(kernel.data, b"", kernel.signature, key)
    with pytest.raises(KernelSignatureError):
        artifact.verify(kernel.data, kernel.digest, b"\0" * 64, key)
    with pytest.raises(KernelSignatureError):
        artifact.verify(kernel.data, kernel.digest, b"", key)
    stranger = signature.generate_keypair(tmp_path).public_key
    with pytest.raises(KernelSignatureError):
        artifact.verify(kernel.data, kernel.digest, kernel.signature, stranger)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_truncated_and_tampered_bytes_are_a_typed_error(kernel: SignedKernel, keys: Path, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(kernel.data) - 1))
    if data.draw(st.booleans()):
        broken = kernel.data[:position]
    else:
        other = bytes([kernel.data[position] ^ data.draw(st.integers(1, 255))])
        broken = kernel.data[:position] + other + kernel.data[position + 1 :]
    with pytest.raises(DigestMismatchError):
        artifact.open_verified(broken, kernel.digest, kernel.signature, signature.load_public_key(keys))
    with contextlib.suppress(MalformedKernelError):
        artifact.unpack(broken)  # what a thief of the key could sign


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda body: struct.pack("<Q", len(body)) + body))
def test_any_bytes_are_a_typed_error(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        artifact.unpack(data)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from([*sorted(Manifest.__dataclass_fields__), "format_version", "family"]), value=_json)
def test_any_manifest_is_a_kernel_or_a_typed_error(kernel: SignedKernel, field: str, value: Any) -> None:
    with contextlib.suppress(MalformedKernelError):
        artifact.unpack(_with_manifest(kernel, **{field: value}))


@settings(max_examples=200, deadline=None)
@given(entry=_json)
def test_any_table_of_tensors_is_a_kernel_or_a_typed_error(kernel: SignedKernel, entry: Any) -> None:
    with pytest.raises(MalformedKernelError):
        artifact.unpack(_rebuilt(kernel, lambda header: {**header, "reduce.weight": entry}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format_version": 2}, "manifest.format_version"),
        ({"format_version": True}, "manifest.format_version"),
        ({"blueprint_digest": "0" * 64}, "manifest.blueprint_digest"),
        ({"interface_signature": "0" * 64}, "manifest.interface_signature"),
        ({"size": 0}, "manifest.size"),
        ({"size": 2**16 + 1}, "manifest.size"),
        ({"initialization": 3}, "manifest.initialization"),
        ({"initialization": {"rule": "kaiming_normal", "scale": 1.0}}, "manifest.initialization.seed"),
        ({"initialization": {"rule": "kaiming_normal", "scale": 1.0, "seed": -1}}, "manifest.initialization.seed"),
        ({"characterization": {}}, "manifest.characterization"),
        ({"more": 1}, "manifest"),
    ],
)
def test_a_wrong_manifest_is_refused_by_the_name_of_its_field(
    kernel: SignedKernel, changes: dict[str, JsonValue], field: str
) -> None:
    with pytest.raises(MalformedKernelError, match=rf"^{field}: "):
        artifact.unpack(_with_manifest(kernel, **changes))


def test_a_manifest_must_be_an_object() -> None:
    with pytest.raises(SpecError, match="manifest"):
        Manifest.from_json([])


@pytest.mark.parametrize("target", ["", 3, "a\nb", "x" * 513])
def test_a_target_is_a_name(target: JsonValue) -> None:
    with pytest.raises(SpecError, match=r"characterization\.target"):
        Characterization.from_json({**Characterization("cpu", 1).to_json(), "target": target})


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b"[]",
        b'{"__metadata__":{"esper":3}}',
        b'{"__metadata__":[]}',
        b"{}",
        b'{"__metadata__":{"esper":"{}"},"t":{"dtype":"F64"}}',
        b'{"__metadata__":{"esper":"NaN"}}',
        b'{"__metadata__":{"esper":"1e999"}}',
        json.dumps({"__metadata__": {"esper": "{}"}, **{f"t{i}": {} for i in range(257)}}).encode(),
    ],
)
def test_a_hostile_header_is_a_typed_error(header: bytes) -> None:
    with pytest.raises(MalformedKernelError):
        artifact.unpack(struct.pack("<Q", len(header)) + header)


def test_a_header_that_claims_more_than_there_is_allocates_nothing() -> None:
    with pytest.raises(MalformedKernelError, match="claims"):
        artifact.unpack(struct.pack("<Q", 2**63) + b"{}")


def test_values_that_are_not_finite_are_refused(kernel: SignedKernel) -> None:
    tensors = dict(artifact.unpack(kernel.data).tensors)
    tensors["reduce.bias"] = np.array([np.nan, 0], np.float32)
    with pytest.raises(MalformedKernelError, match=r"reduce\.bias"):
        artifact.unpack(artifact.pack(kernel.manifest, tensors))


def test_packing_is_bounded(kernel: SignedKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MalformedKernelError, match="256 tensors"):
        artifact.pack(kernel.manifest, {str(index): np.zeros(1, np.float32) for index in range(257)})
    wrong: Any = {"a": np.zeros(1, np.float64)}
    with pytest.raises(MalformedKernelError, match="float64"):
        artifact.pack(kernel.manifest, wrong)
    many = (replace(WIDTH.readers[0], path="p" * 500),) * 1000
    with pytest.raises(MalformedKernelError, match="manifest"):
        artifact.pack(replace(kernel.manifest, interface=replace(WIDTH, readers=many)), {})
    monkeypatch.setattr(artifact, "MAX_ARTIFACT_BYTES", artifact.MAX_HEADER_BYTES)
    with pytest.raises(MalformedKernelError, match="at most"):
        artifact.pack(kernel.manifest, {"a": np.zeros(1, np.float32)})
    monkeypatch.setattr(artifact, "MAX_ARTIFACT_BYTES", 100)
    with pytest.raises(MalformedKernelError, match="more than the 100"):
        artifact.unpack(kernel.data)


# Keys.


def test_keys_are_made_once_and_private(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    first, second = signature.generate_keypair(folder), signature.generate_keypair(folder)
    word = signature.sign(first.private_key, b"d" * 32)
    signature.verify(second.public_key, b"d" * 32, word)
    signature.verify(signature.load_public_key(folder), b"d" * 32, word)
    assert sorted(path.name for path in folder.iterdir()) == ["tezzeret.key", "tezzeret.pub"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_lost_public_key_is_made_from_the_private_one(tmp_path: Path) -> None:
    before = signature.generate_keypair(tmp_path).public_key.public_bytes_raw()
    (tmp_path / "tezzeret.pub").unlink()
    signature.generate_keypair(tmp_path)
    assert signature.load_public_key(tmp_path).public_bytes_raw() == before


def test_two_processes_that_make_keys_at_once_agree(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, services; from services.blueprints.signature import generate_keypair;"
        "print(generate_keypair(pathlib.Path(sys.argv[1])).public_key.public_bytes_raw().hex())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)
    ]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert {process.returncode for process in processes} == {0}


def test_the_other_process_may_win(tmp_path: Path) -> None:
    signature._install(tmp_path / "tezzeret.key", b"theirs")
    signature._install(tmp_path / "tezzeret.key", b"ours")
    assert (tmp_path / "tezzeret.key").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_unreadable_keys_are_a_typed_error(tmp_path: Path) -> None:
    for load in (signature.load_private_key, signature.load_public_key):
        with pytest.raises(signature.SignatureError, match="cannot read"):
            load(tmp_path)
    (tmp_path / "tezzeret.key").write_bytes(b"junk")
    (tmp_path / "tezzeret.pub").write_bytes(b"junk")
    for load in (signature.load_private_key, signature.load_public_key):
        with pytest.raises(signature.SignatureError, match="cannot read"):
            load(tmp_path)
    other = generate_private_key(SECP256R1())
    (tmp_path / "tezzeret.key").write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "tezzeret.pub").write_bytes(
        other.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for load in (signature.load_private_key, signature.load_public_key):
        with pytest.raises(signature.SignatureError, match="no Ed25519"):
            load(tmp_path)


def test_an_attestation_vouches_for_one_status_of_one_kernel(tmp_path: Path) -> None:
    pair = signature.generate_keypair(tmp_path)
    word = signature.attest_status(pair.private_key, b"d" * 32, "VALIDATED")
    signature.verify_status(pair.public_key, b"d" * 32, "VALIDATED", word)
    for digest, status in ((b"e" * 32, "VALIDATED"), (b"d" * 32, "RETIRED"), (b"d" * 31, "VALIDATED")):
        with pytest.raises(signature.SignatureError):
            signature.verify_status(pair.public_key, digest, status, word)
    with pytest.raises(signature.SignatureError):
        signature.verify(pair.public_key, b"d" * 32, word)


def test_the_torch_free_half_is_free_of_torch() -> None:
    code = (
        "import sys, services, services.blueprints.wire, services.blueprints.families, services.blueprints.artifact;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
