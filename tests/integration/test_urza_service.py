"""Urza as it runs: the real process, real sockets, and a kill -9 in the middle of an upload."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esper.common.v1 import common_pb2
from esper.urza.v1 import blueprint_pb2, kernel_pb2
from esper.urza.v1 import blueprint_service_pb2 as pb
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from services.blueprints import families, signature, wire
from services.blueprints.digest import sha256
from services.blueprints.spec import Interface, SlotKind
from services.chassis.config.schema import S3Config
from services.chassis.errors import RemoteError, from_rpc_error
from services.chassis.ids import new_id
from tests.infrastructure.kernels import BOTTLENECK, SPAN, WIDEN, WIDTH, SignedKernel, signed_kernel
from tests.infrastructure.s3 import S3Store

_ROOT = Path(__file__).resolve().parents[2]
_CHUNK = 2**20
_SECONDS = 20.0

pytestmark = [pytest.mark.fast, pytest.mark.timeout(120)]


@dataclass
class Urza:
    """A running service and a client of it."""

    process: subprocess.Popen[str]
    address: str
    stub: BlueprintServiceStub
    keys: Path

    def status(self, kernel: kernel_pb2.Kernel, status: str, **changes: Any) -> pb.SetKernelStatusRequest:
        key = signature.load_private_key(self.keys)
        request = pb.SetKernelStatusRequest(
            name=kernel.name,
            status=kernel_pb2.KernelStatus.Value(f"KERNEL_STATUS_{status}"),
            reason="measured",
            attestation=signature.attest_status(key, kernel.digest.value, status),
            request_id=new_id(),
        )
        request.MergeFrom(pb.SetKernelStatusRequest(**changes))
        return request

    def upload(self, kernel: SignedKernel, **changes: Any) -> kernel_pb2.Kernel:
        return self.stub.UploadKernel(iter(messages(kernel, **changes)), timeout=_SECONDS).kernel

    def validated(self, kernel: SignedKernel) -> kernel_pb2.Kernel:
        uploaded = self.upload(kernel)
        return self.stub.SetKernelStatus(self.status(uploaded, "VALIDATED"), timeout=_SECONDS).kernel


def header(kernel: SignedKernel, **changes: Any) -> pb.UploadKernelRequest:
    message = pb.UploadKernelHeader(
        blueprint=f"blueprints/{kernel.manifest.blueprint.id}",
        digest=wire.digest_to_proto(kernel.digest),
        signature=kernel.signature,
        size_bytes=len(kernel.data),
    )
    message.MergeFrom(pb.UploadKernelHeader(**changes))
    return pb.UploadKernelRequest(header=message)


def messages(kernel: SignedKernel, **changes: Any) -> list[pb.UploadKernelRequest]:
    offset: int = changes.get("offset_bytes", 0)
    chunks = [kernel.data[start : start + _CHUNK] for start in range(offset, len(kernel.data), _CHUNK)]
    return [header(kernel, **changes), *(pb.UploadKernelRequest(chunk=chunk) for chunk in chunks)]


@contextlib.contextmanager
def running(folder: Path, *more: str, **settings: Any) -> Iterator[Urza]:
    """The service on the state of ``folder``; killed at the end unless it has ended by then."""
    signature.generate_keypair(folder / "state" / "keys")
    config = folder / "config.yaml"
    config.write_text(json.dumps({"services": {"urza": settings}, "telemetry": {"traces": "off"}}))
    command = [sys.executable, "-m", "services.urza", "--config", str(config), "--run-dir", str(folder), *more]
    with (
        (folder / "urza.log").open("ab") as log,
        subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (folder / "urza.log").read_text()
            address = json.loads(line)["address"]
            with grpc.insecure_channel(address) as channel:
                yield Urza(process, address, BlueprintServiceStub(channel), folder / "state" / "keys")
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(_SECONDS) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def urza(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urza]:
    with running(tmp_path_factory.mktemp("urza")) as service:
        yield service


def refusal(call: Callable[[], object]) -> RemoteError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        threading.Event().wait(0.01)


def create(family: str = "residual_bottleneck", **parameters: Any) -> pb.CreateBlueprintRequest:
    values = {name: blueprint_pb2.ParameterValue(integer=value) for name, value in parameters.items()}
    return pb.CreateBlueprintRequest(
        spec=blueprint_pb2.BlueprintSpec(family=family, parameters=values), request_id=new_id()
    )


# Blueprints.


def test_it_is_healthy_and_has_the_built_in_blueprints(urza: Urza) -> None:
    with grpc.insecure_channel(urza.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="esper.urza.v1.BlueprintService"), timeout=_SECONDS
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    names = {b.name for b in urza.stub.ListBlueprints(pb.ListBlueprintsRequest(tags=["builtin"])).blueprints}
    assert names == {f"blueprints/{blueprint.id}" for blueprint in families.builtin_blueprints()}
    assert names >= {f"blueprints/{WIDEN.id}", f"blueprints/{BOTTLENECK.id}"}
    got = urza.stub.GetBlueprint(pb.GetBlueprintRequest(name=f"blueprints/{BOTTLENECK.id}")).blueprint
    assert got.spec.parameters["reduction"].integer == 4
    assert got.spec.parameters["activation"].text == "gelu"
    assert got.spec.initialization.rule == "kaiming_normal"
    assert got.digest == wire.digest_to_proto(BOTTLENECK.digest)
    assert got.state == blueprint_pb2.BLUEPRINT_STATE_ACTIVE
    assert not got.HasField("archive_time")


def test_defaults_are_filled_in_and_content_decides_identity(urza: Urza) -> None:
    request = create()
    again = urza.stub.CreateBlueprint(request)
    assert not again.created, "the built-in one spelled with its defaults"
    assert again.blueprint.name == f"blueprints/{BOTTLENECK.id}"
    request = create(reduction=2)
    request.tags.extend(["wide"])
    request.parent = again.blueprint.name
    made = urza.stub.CreateBlueprint(request)
    assert made.created
    assert urza.stub.CreateBlueprint(request) == made, "the same request, the same answer"
    assert list(made.blueprint.tags) == ["wide"]
    lineage = urza.stub.GetLineage(pb.GetLineageRequest(name=made.blueprint.name))
    assert [b.name for b in lineage.ancestors] == [again.blueprint.name]
    below = urza.stub.GetLineage(pb.GetLineageRequest(name=again.blueprint.name))
    assert made.blueprint.name in {b.name for b in below.descendants}


def test_initialization_is_part_of_the_content(urza: Urza) -> None:
    request = create(reduction=5)
    request.spec.initialization.rule = "zero_output"
    first = urza.stub.CreateBlueprint(request).blueprint
    assert first.spec.initialization.scale == 1.0
    request.spec.initialization.scale = 0.5
    request.request_id = new_id()
    assert urza.stub.CreateBlueprint(request).blueprint.name != first.name
    request.spec.initialization.rule = ""
    request.request_id = new_id()
    assert refusal(lambda: urza.stub.CreateBlueprint(request)).metadata["field"] == "spec.initialization.rule"


def test_bad_blueprints_are_refused_with_reason_and_field(urza: Urza) -> None:
    def refused(change: Callable[[pb.CreateBlueprintRequest], object]) -> tuple[str, str]:
        request = create()
        change(request)
        error = refusal(lambda: urza.stub.CreateBlueprint(request))
        return str(error.reason), error.metadata["field"]

    def value(**kind: Any) -> Callable[[pb.CreateBlueprintRequest], object]:
        return lambda r: r.spec.parameters["reduction"].MergeFrom(blueprint_pb2.ParameterValue(**kind))

    assert refused(lambda r: r.ClearField("spec")) == ("REQUIRED_FIELD", "spec")
    assert refused(lambda r: r.spec.ClearField("family")) == ("REQUIRED_FIELD", "spec.family")
    assert refused(lambda r: setattr(r.spec, "family", "no")) == ("UNKNOWN_FAMILY", "spec.family")
    assert refused(value()) == ("BLUEPRINT_INVALID", "spec.parameters.reduction")
    assert refused(value(number=1.5)) == ("BLUEPRINT_INVALID", "spec.parameters.reduction")
    assert refused(value(number=float("nan"))) == ("BLUEPRINT_INVALID", "spec.parameters.reduction")
    assert refused(value(flag=True)) == ("BLUEPRINT_INVALID", "spec.parameters.reduction")
    assert refused(value(text="4")) == ("BLUEPRINT_INVALID", "spec.parameters.reduction")
    assert refused(lambda r: r.ClearField("request_id"))[0] == "REQUIRED_FIELD"
    assert refused(lambda r: setattr(r, "parent", "b/1")) == ("INVALID_NAME", "parent")


def test_a_request_id_belongs_to_one_request(urza: Urza) -> None:
    request = create(reduction=6)
    urza.stub.CreateBlueprint(request)
    request.display_name = "other"
    assert refusal(lambda: urza.stub.CreateBlueprint(request)).reason == "REQUEST_ID_REUSED"


def test_lists_come_in_pages_bound_to_their_filter(urza: Urza) -> None:
    for reduction in range(20, 25):
        request = create(reduction=reduction)
        request.tags.append("paged")
        urza.stub.CreateBlueprint(request)
    names, token = [], ""
    while True:
        page = urza.stub.ListBlueprints(pb.ListBlueprintsRequest(tags=["paged"], page_size=2, page_token=token))
        names += [b.name for b in page.blueprints]
        token = page.next_page_token
        if not token:
            break
        other = pb.ListBlueprintsRequest(tags=["wide"], page_token=token)
        assert refusal(partial(urza.stub.ListBlueprints, other)).reason == "INVALID_PAGE_TOKEN"
    assert len(names) == len(set(names)) == 5
    bad = pb.ListBlueprintsRequest(page_token="bm9uZQ==")
    assert refusal(lambda: urza.stub.ListBlueprints(bad)).reason == "INVALID_PAGE_TOKEN"


def test_archiving_hides_a_blueprint(urza: Urza) -> None:
    made = urza.stub.CreateBlueprint(create(reduction=40)).blueprint
    request = pb.ArchiveBlueprintRequest(name=made.name, etag="r9", request_id=new_id())
    assert refusal(lambda: urza.stub.ArchiveBlueprint(request)).reason == "ETAG_MISMATCH"
    request.etag, request.request_id = "junk", new_id()
    assert refusal(lambda: urza.stub.ArchiveBlueprint(request)).reason == "ETAG_MISMATCH"
    request.etag, request.request_id = made.etag, new_id()
    archived = urza.stub.ArchiveBlueprint(request).blueprint
    assert archived.state == blueprint_pb2.BLUEPRINT_STATE_ARCHIVED
    assert archived.HasField("archive_time")
    assert archived.etag != made.etag
    again = pb.ArchiveBlueprintRequest(name=made.name, request_id=new_id())
    assert urza.stub.ArchiveBlueprint(again).blueprint == archived
    shown = urza.stub.ListBlueprints(pb.ListBlueprintsRequest(page_size=1000))
    assert made.name not in {b.name for b in shown.blueprints}
    shown = urza.stub.ListBlueprints(pb.ListBlueprintsRequest(page_size=1000, include_archived=True))
    assert made.name in {b.name for b in shown.blueprints}


def test_a_watch_is_snapshot_bookmark_changes_and_resumes(urza: Urza) -> None:
    def kinds(stream: Any, count: int) -> list[pb.WatchBlueprintsResponse]:
        return [next(stream) for _ in range(count)]

    watch = urza.stub.WatchBlueprints(
        pb.WatchBlueprintsRequest(family="residual_bottleneck", tags=["watched"]), timeout=_SECONDS
    )
    (bookmark,) = kinds(watch, 1)
    assert bookmark.change == common_pb2.CHANGE_TYPE_BOOKMARK
    urza.stub.CreateBlueprint(create(reduction=50))  # not watched
    request = create(reduction=51)
    request.tags.append("watched")
    made = urza.stub.CreateBlueprint(request).blueprint
    urza.stub.ArchiveBlueprint(pb.ArchiveBlueprintRequest(name=made.name, request_id=new_id()))
    added, modified = kinds(watch, 2)
    assert (added.change, added.blueprint) == (common_pb2.CHANGE_TYPE_ADDED, made)
    assert modified.change == common_pb2.CHANGE_TYPE_MODIFIED
    assert modified.blueprint.state == blueprint_pb2.BLUEPRINT_STATE_ARCHIVED
    assert bookmark.revision < added.revision < modified.revision
    watch.cancel()
    resumed = urza.stub.WatchBlueprints(
        pb.WatchBlueprintsRequest(resume_token=added.resume_token, tags=["watched"]), timeout=_SECONDS
    )
    assert next(resumed).revision == modified.revision
    resumed.cancel()
    fresh = urza.stub.WatchBlueprints(pb.WatchBlueprintsRequest(tags=["watched"]), timeout=_SECONDS)
    assert [item.change for item in kinds(fresh, 2)] == [
        common_pb2.CHANGE_TYPE_SNAPSHOT,
        common_pb2.CHANGE_TYPE_BOOKMARK,
    ]
    fresh.cancel()


# Kernels.


def test_a_kernel_goes_in_and_comes_out(urza: Urza) -> None:
    kernel = signed_kernel(urza.keys, latency_seconds=0.25, memory_bytes=5000, seed=11)
    stored = urza.upload(kernel, tags=["first"])
    assert stored.name == f"blueprints/{BOTTLENECK.id}/kernels/{kernel.id}"
    assert stored.status == kernel_pb2.KERNEL_STATUS_UPLOADED
    assert stored.cost.latency == Duration(nanos=250_000_000)
    assert stored.cost.memory_bytes == 5000
    assert wire.interface_from_proto(stored.interface) == SPAN
    assert urza.upload(kernel) == stored, "told again"
    assert urza.stub.UploadKernel(iter([header(kernel)])).kernel == stored, "not even chunks are needed"
    assert urza.stub.GetKernel(pb.GetKernelRequest(name=stored.name)).kernel == stored
    answers = list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name)))
    assert answers[0].header == stored
    assert b"".join(answer.chunk for answer in answers[1:]) == kernel.data
    part = list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name, offset_bytes=1000)))
    assert b"".join(answer.chunk for answer in part[1:]) == kernel.data[1000:]
    end = list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name, offset_bytes=len(kernel.data))))
    assert [answer.WhichOneof("part") for answer in end] == ["header"]
    beyond = pb.DownloadKernelRequest(name=stored.name, offset_bytes=10**9)
    assert refusal(lambda: list(urza.stub.DownloadKernel(beyond))).metadata["field"] == "offset_bytes"


def test_bad_uploads_are_refused(urza: Urza, tmp_path: Path) -> None:
    kernel = signed_kernel(urza.keys, seed=12)
    first, *chunks = messages(kernel)

    def refused(*sent: pb.UploadKernelRequest) -> RemoteError:
        return refusal(lambda: urza.stub.UploadKernel(iter(sent), timeout=_SECONDS))

    assert refused().metadata["field"] == "header"
    assert refused(*chunks).metadata["field"] == "header"
    for field in ("digest", "signature", "blueprint"):
        bad = header(kernel)
        bad.header.ClearField(field)
        assert refused(bad).metadata["field"] == f"header.{field}"
    short = header(kernel, digest=common_pb2.Digest(algorithm=common_pb2.DIGEST_ALGORITHM_SHA256, value=b"x"))
    assert refused(short).metadata["field"] == "header.digest.value"
    assert refused(first, first).metadata["field"] == "chunk"
    assert refused(first, pb.UploadKernelRequest(chunk=b"x" * (2**20 + 1))).metadata["field"] == "chunk"
    assert refused(first, *chunks, *chunks).reason == "UPLOAD_OFFSET_MISMATCH"
    stranger = signed_kernel(tmp_path, seed=12)
    assert refused(*messages(stranger)).reason == "SIGNATURE_INVALID"
    wrong = signature.sign(signature.load_private_key(urza.keys), sha256(b"other"))
    lie = header(kernel, digest=wire.digest_to_proto(sha256(b"other")), signature=wrong)
    lie.header.signature = wrong
    assert refused(lie, *chunks).reason == "DIGEST_MISMATCH"
    early = refused(first)
    assert (early.reason, early.metadata["committed_bytes"]) == ("UPLOAD_OFFSET_MISMATCH", "0")


def test_two_uploads_of_one_artifact_do_not_mix(urza: Urza) -> None:
    kernel = signed_kernel(urza.keys, seed=13)
    first, chunk = messages(kernel)
    release = threading.Event()

    def slow() -> Iterator[pb.UploadKernelRequest]:
        yield first
        yield pb.UploadKernelRequest(chunk=chunk.chunk[:100])
        release.wait(_SECONDS)
        yield pb.UploadKernelRequest(chunk=chunk.chunk[100:])

    upload = urza.stub.UploadKernel.future(slow(), timeout=_SECONDS)
    digest = pb.GetUploadRequest(digest=wire.digest_to_proto(kernel.digest))
    until(lambda: urza.stub.GetUpload(digest).committed_bytes == 100)
    assert refusal(lambda: urza.upload(kernel)).reason == "UPLOAD_IN_PROGRESS"
    release.set()
    stored = upload.result().kernel
    answer = urza.stub.GetUpload(digest)
    assert (answer.committed_bytes, answer.kernel) == (len(kernel.data), stored)


def test_a_caller_who_hangs_up_leaves_what_has_arrived(urza: Urza) -> None:
    kernel = signed_kernel(urza.keys, seed=14)
    first, chunk = messages(kernel)
    release = threading.Event()

    def broken() -> Iterator[pb.UploadKernelRequest]:
        yield first
        yield pb.UploadKernelRequest(chunk=chunk.chunk[:100])
        release.wait(_SECONDS)

    upload = urza.stub.UploadKernel.future(broken(), timeout=_SECONDS)
    digest = pb.GetUploadRequest(digest=wire.digest_to_proto(kernel.digest))
    until(lambda: urza.stub.GetUpload(digest).committed_bytes == 100)
    upload.cancel()
    release.set()

    def resumed() -> bool:
        try:
            urza.upload(kernel, offset_bytes=100)
        except grpc.RpcError as error:  # until the server has noticed that the caller is gone
            if from_rpc_error(error).reason != "UPLOAD_IN_PROGRESS":
                raise
            return False
        return True

    until(resumed)
    assert urza.stub.GetUpload(digest).committed_bytes == len(kernel.data)


def test_kernels_are_listed_and_queried(urza: Urza) -> None:
    fast = urza.upload(signed_kernel(urza.keys, seed=21, target="t", latency_seconds=0.1, memory_bytes=10), tags=["q"])
    slow = urza.upload(signed_kernel(urza.keys, seed=22, target="t", latency_seconds=0.9, memory_bytes=90), tags=["q"])
    blind = urza.upload(signed_kernel(urza.keys, seed=23, target="t"), tags=["q", "r"])

    def found(**query: Any) -> list[str]:
        return [k.name for k in urza.stub.QueryKernels(pb.QueryKernelsRequest(target="t", **query)).kernels]

    assert found() == found(tags=["q"]) == [fast.name, slow.name, blind.name]
    assert found(tags=["q", "r"]) == [blind.name]
    assert found(max_latency=Duration(seconds=2)) == [fast.name, slow.name]
    assert found(max_latency=Duration(nanos=500_000_000)) == [fast.name]
    assert found(max_memory_bytes=50) == [fast.name]
    assert found(max_parameters=0, max_flops=10**9) == []
    assert found(blueprint=f"blueprints/{WIDEN.id}") == []
    assert found(family="residual_bottleneck", interface_signature=fast.interface_signature) == found()
    assert found(statuses=[kernel_pb2.KERNEL_STATUS_VALIDATED]) == []
    assert refusal(lambda: found(max_flops=-1)).metadata["field"] == "max_flops"
    assert refusal(lambda: found(statuses=[0])).metadata["field"] == "statuses[0]"
    everything = urza.stub.ListKernels(pb.ListKernelsRequest(parent="blueprints/-", page_size=1000)).kernels
    own = urza.stub.ListKernels(pb.ListKernelsRequest(parent=f"blueprints/{BOTTLENECK.id}", page_size=1000)).kernels
    assert {k.name for k in own} <= {k.name for k in everything}
    assert {fast.name, slow.name, blind.name} <= {k.name for k in own}
    unknown = pb.ListKernelsRequest(parent="blueprints/none")
    assert refusal(lambda: urza.stub.ListKernels(unknown)).reason == "UNKNOWN_BLUEPRINT"
    page = urza.stub.QueryKernels(pb.QueryKernelsRequest(target="t", page_size=2))
    rest = urza.stub.QueryKernels(pb.QueryKernelsRequest(target="t", page_token=page.next_page_token))
    assert [k.name for k in (*page.kernels, *rest.kernels)] == found()


def test_resolution_finds_the_best_or_says_why_not(urza: Urza) -> None:
    request = pb.ResolveKernelRequest(
        blueprint=f"blueprints/{WIDEN.id}", interface=wire.interface_to_proto(WIDTH), size=4, target="cpu"
    )
    assert refusal(lambda: urza.stub.ResolveKernel(request)).reason == "NO_KERNEL"
    kernel = signed_kernel(urza.keys, blueprint=WIDEN, interface=WIDTH, size=4, seed=1)
    uploaded = urza.upload(kernel)
    error = refusal(lambda: urza.stub.ResolveKernel(request))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NO_VALIDATED_KERNEL")
    urza.stub.SetKernelStatus(urza.status(uploaded, "VALIDATED"))
    assert urza.stub.ResolveKernel(request).kernel.name == uploaded.name
    request.init_seed = 1
    request.interface_signature = uploaded.interface_signature  # in place of the interface
    assert urza.stub.ResolveKernel(request).kernel.name == uploaded.name
    request.init_seed = 2
    assert refusal(lambda: urza.stub.ResolveKernel(request)).reason == "NO_KERNEL"
    for field in ("interface_signature", "size", "target"):
        bad = pb.ResolveKernelRequest()
        bad.CopyFrom(request)
        bad.ClearField(field)
        expected = "place" if field == "interface_signature" else field
        assert refusal(partial(urza.stub.ResolveKernel, bad)).metadata["field"] == expected
    bad.interface.dtype = "int4"
    assert refusal(lambda: urza.stub.ResolveKernel(bad)).metadata["field"] == "interface.kind"


def test_only_the_validator_moves_a_kernel_through_its_statuses(urza: Urza) -> None:
    kernel = urza.upload(signed_kernel(urza.keys, seed=31))
    set_status = urza.stub.SetKernelStatus
    stolen = urza.status(kernel, "VALIDATED")
    stolen.attestation = b"x" * 64
    assert refusal(lambda: set_status(stolen)).reason == "SIGNATURE_INVALID"
    bad = urza.status(kernel, "REJECTED")
    bad.reason = ""
    assert refusal(lambda: set_status(bad)).metadata["field"] == "reason"
    bad.attestation, bad.reason = b"", "x"
    assert refusal(lambda: set_status(bad)).metadata["field"] == "attestation"
    bad.status = 0  # type: ignore[assignment]  # unset, which mypy does not count as a status
    assert refusal(lambda: set_status(bad)).metadata["field"] == "status"
    bad.status = 99  # type: ignore[assignment]  # as a newer client could send
    assert refusal(lambda: set_status(bad)).reason == "INVALID_FIELD"
    stale = urza.status(kernel, "VALIDATED", etag="r7")
    assert refusal(lambda: set_status(stale)).reason == "ETAG_MISMATCH"
    request = urza.status(kernel, "VALIDATED", etag=kernel.etag)
    validated = set_status(request).kernel
    assert validated.status == kernel_pb2.KERNEL_STATUS_VALIDATED
    assert set_status(request).kernel == validated
    assert refusal(lambda: set_status(urza.status(kernel, "REJECTED"))).reason == "KERNEL_STATUS_CONFLICT"
    nobody = pb.GetKernelRequest(name=f"blueprints/{WIDEN.id}/kernels/{kernel.name.rpartition('/')[2]}")
    assert refusal(lambda: urza.stub.GetKernel(nobody)).reason == "KERNEL_NOT_FOUND"


def test_outcomes_are_told_and_counted(urza: Urza) -> None:
    kernel = urza.validated(signed_kernel(urza.keys, seed=41))

    def tell(seed: str, result: str, worth: common_pb2.Interval | None = None) -> kernel_pb2.KernelOutcomes:
        outcome = kernel_pb2.KernelOutcome(
            seed=seed,
            result=kernel_pb2.KernelOutcomeResult.Value(f"KERNEL_OUTCOME_RESULT_{result}"),
            contribution=worth,
        )
        request = pb.RecordKernelOutcomeRequest(name=kernel.name, outcome=outcome, request_id=new_id())
        return urza.stub.RecordKernelOutcome(request).kernel.outcomes

    worth = common_pb2.Interval(value=1.5, low=1, high=2, confidence_ratio=0.95, samples=100)
    first = tell("runs/r/seeds/1", "CULLED")
    assert (first.culled, first.HasField("mean_contribution")) == (1, False)
    second = tell("runs/r/seeds/1", "FOSSILIZED", worth)
    assert (second.culled, second.fossilized, second.mean_contribution) == (0, 1, 1.5)
    assert tell("runs/r/seeds/2", "ROLLED_BACK").rolled_back == 1
    nan = common_pb2.Interval(value=float("nan"), low=0, high=1)
    assert refusal(lambda: tell("runs/r/seeds/3", "CULLED", nan)).metadata["field"] == "outcome.contribution"
    assert refusal(lambda: tell("", "CULLED")).metadata["field"] == "outcome.seed"
    assert refusal(lambda: tell("a\nb", "CULLED")).metadata["field"] == "outcome.seed"
    assert refusal(lambda: tell("s", "UNSPECIFIED")).metadata["field"] == "outcome.result"
    request = pb.RecordKernelOutcomeRequest(
        name=kernel.name, outcome=kernel_pb2.KernelOutcome(seed="s"), request_id=new_id()
    )
    request.outcome.result = 99  # type: ignore[assignment]  # as a newer client could send
    assert refusal(lambda: urza.stub.RecordKernelOutcome(request)).metadata["field"] == "outcome.result"


# The process.


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_upload_loses_nothing_that_was_told(tmp_path: Path) -> None:
    wide = Interface(SlotKind.SPAN, (256, 2, 2), (256, 2, 2))
    kernel_keys = tmp_path / "state" / "keys"
    with running(tmp_path) as urza:
        port = urza.address.rpartition(":")[2]
        kernel = signed_kernel(kernel_keys, interface=wide, size=512)
        small = urza.validated(signed_kernel(kernel_keys))
        made = urza.stub.CreateBlueprint(create(reduction=2)).blueprint
        first, *chunks = messages(kernel)
        assert len(chunks) > 4, "the kernel is large enough to be cut in the middle"
        release = threading.Event()

        def cut() -> Iterator[pb.UploadKernelRequest]:
            yield from (first, *chunks[:3])
            release.wait(_SECONDS)

        upload = urza.stub.UploadKernel.future(cut(), timeout=_SECONDS)
        digest = pb.GetUploadRequest(digest=wire.digest_to_proto(kernel.digest))
        until(lambda: urza.stub.GetUpload(digest).committed_bytes == 3 * _CHUNK)
        urza.process.kill()
        urza.process.wait(_SECONDS)
        with pytest.raises(grpc.RpcError):
            upload.result()
        release.set()
    with running(tmp_path, "--port", port) as urza:
        assert urza.address.endswith(f":{port}")
        assert urza.stub.GetBlueprint(pb.GetBlueprintRequest(name=made.name)).blueprint == made
        assert urza.stub.GetKernel(pb.GetKernelRequest(name=small.name)).kernel == small
        committed = urza.stub.GetUpload(digest).committed_bytes
        assert committed == 3 * _CHUNK
        stored = urza.upload(kernel, offset_bytes=committed)
        answers = list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name)))
        assert sha256(b"".join(answer.chunk for answer in answers[1:])) == kernel.digest


def test_open_watches_end_when_it_drains(tmp_path: Path) -> None:
    with running(tmp_path) as urza:
        watch = urza.stub.WatchBlueprints(pb.WatchBlueprintsRequest(), timeout=_SECONDS)
        while next(watch).change != common_pb2.CHANGE_TYPE_BOOKMARK:
            pass
        urza.process.send_signal(signal.SIGTERM)
        assert list(watch) == []
        assert urza.process.wait(_SECONDS) == 0


@pytest.mark.slow
def test_it_runs_on_postgresql(tmp_path: Path, postgres_url: str) -> None:
    with running(tmp_path, database_url=postgres_url) as urza:
        kernel = urza.validated(signed_kernel(urza.keys))
    with running(tmp_path, database_url=postgres_url) as urza:
        assert urza.stub.GetKernel(pb.GetKernelRequest(name=kernel.name)).kernel == kernel
    assert not (tmp_path / "state" / "urza" / "library.sqlite").exists()


@pytest.mark.slow
def test_its_kernels_may_be_in_a_bucket(tmp_path: Path, s3: S3Config, s3_store: S3Store) -> None:
    settings = s3.model_dump()
    with running(tmp_path, s3=settings) as urza:
        kernel = signed_kernel(urza.keys)
        stored = urza.upload(kernel)
        urza.process.kill()
        urza.process.wait(_SECONDS)
    (file,) = [path for path in (s3_store.folder / s3.prefix).rglob("*") if path.is_file()]
    assert file.read_bytes() == kernel.data
    assert not (tmp_path / "state" / "urza" / "artifacts").exists()
    with running(tmp_path, s3=settings) as urza:
        answers = list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name)))
        assert b"".join(answer.chunk for answer in answers[1:]) == kernel.data
        file.write_bytes(b"x" * len(kernel.data))
        damaged = refusal(lambda: list(urza.stub.DownloadKernel(pb.DownloadKernelRequest(name=stored.name))))
        assert damaged.reason == "DIGEST_MISMATCH", "what somebody did to the bucket is never given out"


def test_a_bucket_that_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    s3 = {"bucket": "none", "endpoint_url": "http://127.0.0.1:1"}
    config.write_text(json.dumps({"services": {"urza": {"s3": s3}}}))
    command = [sys.executable, "-m", "services.urza", "--config", str(config), "--run-dir", str(tmp_path)]
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    ended = subprocess.run(
        command, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **keys}
    )
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert "services.urza.s3 cannot be used" in ended.stderr


@pytest.mark.parametrize("url", ["nosuch://x", "postgresql+psycopg://nobody@127.0.0.1:1/none"])
def test_a_database_that_cannot_be_had_is_one_clear_line(tmp_path: Path, url: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"services": {"urza": {"database_url": url}}}))
    command = [sys.executable, "-m", "services.urza", "--config", str(config), "--run-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 3
    assert "Traceback" not in ended.stderr
    assert "cannot start" in ended.stderr


def test_the_process_is_free_of_torch(tmp_path: Path) -> None:
    code = (
        "import sys, services.urza.__main__;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'services.tezzeret', 'services.kasmina')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=False).returncode == 0
