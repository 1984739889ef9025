"""The one typed configuration tree of Esper.

Every key has its default, its unit and its meaning here and nowhere else; ``configs/experiment.yaml``
is the annotated template of the same tree and a test keeps the two equal. Unknown keys are errors
(see :mod:`services.chassis.config.loader` for file, line and nearest valid key).
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveSeconds = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, le=65535)]
# Files hold no paths and tuples, only text and lists: these two are made of them.
FilePath = Annotated[Path, Field(strict=False)]
Window = Annotated[tuple[float, float], Field(strict=False)]
Address = Annotated[str, Field(pattern=r"^\S+:\d+$")]
Width = Annotated[int, Field(ge=1)]
# A folder's name and a segment of resource names; `latest` is the link to the newest run.
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
ExportFormat = Literal["safetensors", "torch_export", "onnx"]
FactoryPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class Section(BaseModel):
    """A section of the tree: strict about keys and types, immutable once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)


_S = TypeVar("_S", bound="Section")


def _needs_factory(section: _S) -> _S:
    """A section with ``name: factory`` names the factory, and only that one."""
    values = dict(section)
    named, factory = values["name"] == "factory", values["factory"]
    if named and factory is None:
        raise ValueError("name: factory needs the key factory, package.module:callable")
    if factory is not None and not named:
        raise ValueError("the key factory is set, but name is not factory")
    return section


class RunConfig(Section):
    """The run: its name, its seed, its folders."""

    name: RunName | None = Field(
        default=None, description="Name of the run and of its folder; null: <config file>-<time>-<random>."
    )
    seed: int = Field(
        default=0, ge=0, description="Root of all generators: initialisation, data order, augmentation, controller."
    )
    output_dir: FilePath = Field(default=Path("runs"), description="Run folders are made under here.")
    state_dir: FilePath | None = Field(
        default=None, description="State of the services that may outlive the run; null: inside the run folder."
    )

    @field_validator("name")
    @classmethod
    def _not_the_link(cls, name: str | None) -> str | None:
        if name == "latest":
            raise ValueError("latest is the link to the newest run")
        return name


class DataConfig(Section):
    """What is learned from."""

    name: Literal["digits", "cifar10", "cifar100", "factory"] = Field(default="digits", description="Which data set.")
    data_dir: FilePath | None = Field(
        default=None, description="Folder of the official CIFAR files, or passed to the factory."
    )
    factory: FactoryPath | None = Field(
        default=None,
        description="package.module:callable(data_dir) -> (train_images, train_labels, test_images, test_labels), "
        "for name: factory.",
    )
    validation_ratio: float = Field(
        default=0.1, gt=0, lt=0.5, description="Share of the training set held out for decisions."
    )
    batch_size: int = Field(default=64, ge=1, description="Images per optimizer step.")
    evaluation_batch_size: int = Field(default=512, ge=1, description="Images per forward pass of an evaluation.")
    flip: bool = Field(default=False, description="Mirror images left-right, alternating by epoch.")
    translate: int = Field(default=0, ge=0, description="Random translation of training images, pixels.")
    limit: int | None = Field(default=None, ge=1, description="Use only the first N training images; null: all.")

    @model_validator(mode="after")
    def _factory_is_named(self) -> Self:
        return _needs_factory(self)


class ModelConfig(Section):
    """The host network."""

    name: Literal["cnn", "mlp", "resnet", "vit", "factory"] = Field(default="cnn", description="Which host network.")
    factory: FactoryPath | None = Field(
        default=None, description="package.module:callable(input_shape, classes) -> torch.nn.Module, for name: factory."
    )
    widths: list[Width] = Field(
        default_factory=lambda: [8, 16, 24],
        min_length=1,
        description="Channels per group (cnn) or stage (resnet), features per hidden layer (mlp); vit: features of the "
        "stream, then of the hidden layer of each block.",
    )
    weights: FilePath | None = Field(
        default=None,
        description="Start from this trained checkpoint of the host: .safetensors, or a state dict (weights_only).",
    )

    @model_validator(mode="after")
    def _factory_is_named(self) -> Self:
        return _needs_factory(self)


class TaskConfig(Section):
    """What the network is trained for."""

    factory: FactoryPath | None = Field(
        default=None,
        description="package.module:callable() -> services.tolaria.task.Task, an own loss and score; "
        "null: tell the classes of the data apart.",
    )


class OptimizerConfig(Section):
    """How weights are updated; the schedule is warm-up, then linear decay."""

    name: Literal["sgd", "adamw"] = Field(default="sgd", description="Which rule.")
    learning_rate: float = Field(default=0.1, gt=0, description="Peak rate.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Nesterov momentum (sgd).")
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 penalty (sgd) or decoupled decay (adamw).")
    warmup_ratio: Ratio = Field(
        default=0.1, description="Share of the schedule for the linear warm-up; then linear decay to 0."
    )
    newborn_warmup_steps: int = Field(
        default=0, ge=0, description="Linear warm-up of a newborn parameter group, steps."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Clip each parameter group's gradient norm; null: never."
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the target's weight spread over all classes; training only."
    )


class TrainingConfig(Section):
    """The training loop."""

    epochs: int = Field(default=30, ge=1, description="Passes over the training set; the length of the schedule.")
    optimizer: OptimizerConfig = OptimizerConfig()
    device: Literal["cpu", "cuda", "auto"] = Field(
        default="auto", description="Where the network is; auto: a GPU where there is one."
    )
    threads: int = Field(default=1, ge=1, description="Threads of torch in the training process; results depend on it.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Autocast precision of forward and backward."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Evaluate and export an exponential moving average of the weights with this decay per step; "
        "null: the weights as they are.",
    )
    checkpoint_every_epochs: int = Field(default=1, ge=1, description="Epochs between two checkpoints.")
    checkpoint_keep: int = Field(default=5, ge=1, description="Newest checkpoints kept.")
    max_restarts: int = Field(
        default=3, ge=0, description="How often the supervisor resumes a training process that died."
    )


class BudgetConfig(Section):
    """Exactly one limit may be set: as a multiple of the host's own cost, or absolute."""

    flops: float | None = Field(default=None, gt=1.0, description="Final forward FLOPs, as a multiple of the host's.")
    parameters: float | None = Field(default=None, gt=1.0, description="Final parameters, as a multiple of the host's.")
    latency: float | None = Field(
        default=None,
        gt=1.0,
        description="Final time of a training step, as a multiple of the host's; measured before the first step.",
    )
    flops_absolute: float | None = Field(default=None, gt=0, description="Final forward FLOPs of one sample.")
    parameters_absolute: float | None = Field(default=None, gt=0, description="Final parameters.")
    latency_ms: float | None = Field(default=None, gt=0, description="Final time of a training step, milliseconds.")

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        named = self._set()
        if len(named) != 1:
            found = f"; here are {' and '.join(named)}" if named else ""
            raise ValueError(f"set exactly one of {', '.join(type(self).model_fields)}{found} (null switches one off)")
        return self

    def _set(self) -> list[str]:
        return [name for name, value in self if value is not None]

    @property
    def key(self) -> str:
        """The limit that is set."""
        return self._set()[0]

    @property
    def kind(self) -> Literal["flops", "parameters", "latency"]:
        """What it counts."""
        if self.key.startswith("flops"):
            return "flops"
        return "latency" if self.key.startswith("latency") else "parameters"

    @property
    def multiple(self) -> float | None:
        """The limit as a multiple of the host's cost; None if it is absolute."""
        return next((value for value in (self.flops, self.parameters, self.latency) if value is not None), None)

    @property
    def absolute(self) -> float | None:
        """The limit in FLOPs, parameters or milliseconds; None if it is a multiple."""
        limits = (self.flops_absolute, self.parameters_absolute, self.latency_ms)
        return next((value for value in limits if value is not None), None)

    def __str__(self) -> str:
        """In words, as part of a sentence."""
        if self.multiple is None:
            unit = {"flops": "FLOPs per sample", "parameters": "parameters", "latency": "ms per training step"}
            return f"{self.absolute:,.12g} {unit[self.kind]}"
        what = {"flops": "FLOPs", "parameters": "parameters", "latency": "time per training step"}
        return f"{self.multiple:g} times the host's {what[self.kind]}"


class EvaluationConfig(Section):
    """How the worth of a seed is judged."""

    threshold: float = Field(
        default=0.0,
        description="A seed stays if its contribution (points of validation accuracy) lies above, with its interval.",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="Of the interval around a contribution.")
    min_epochs: int = Field(default=2, ge=0, description="Epochs between grafting and the first counterfactual.")
    doubtful: Literal["plan", "cull"] = Field(
        default="plan",
        description="A seed whose interval says neither, twice. plan: it stays if it did good on the sample and all "
        "seeds of its decision together are proven; cull: it goes.",
    )
    cull: Literal["remove", "rewind"] = Field(
        default="remove",
        description="How a culled seed leaves after grafting. remove: the network goes on without it. rewind: back to "
        "its graft, and the steps since then are made again without it; only removed where that would undo another "
        "seed.",
    )


class BlendConfig(Section):
    """How the share alpha of a branch goes from 0 to 1."""

    schedule: Literal["fixed", "performance", "drift", "gradient"] = Field(
        default="fixed",
        description="fixed: a ramp over blend_steps. performance: held while the training loss rises beyond its noise. "
        "drift: slowed so that the span's output changes little per step. gradient: held while more of the branch "
        "would raise the loss.",
    )
    max_steps: int = Field(
        default=500, ge=1, description="A seed whose alpha is not 1 after this many steps is culled (all but fixed)."
    )
    noise: float = Field(
        default=2.0, gt=0, description="performance: a rise by this many standard errors of the loss is one."
    )
    drift: float = Field(
        default=0.02, gt=0, description="drift: largest change of the span's output per step, relative to its norm."
    )


class GrowthConfig(Section):
    """Whether, when and how far the network grows."""

    enabled: bool = Field(default=True, description="false: the host is trained as it is.")
    policy: str = Field(
        default="utilization", description="Policy that Tamiyo runs for this run: a name, or policies/<p>@<version>."
    )
    window: Window = Field(default=(0.05, 0.3), description="Share of the schedule in which decisions are made.")
    decisions: int = Field(
        default=3, ge=1, description="Decisions, evenly spread over the window (at epoch boundaries)."
    )
    budget: BudgetConfig = BudgetConfig(flops=2.5)
    max_factor: float = Field(
        default=2.0, gt=1.0, description="A layer grows at most to this multiple of its width per decision."
    )
    slots: list[str] | None = Field(
        default=None, description="Only these slots may grow (module paths, * allowed); null: all found."
    )
    blueprints: list[str] | None = Field(
        default=None, description="Only these blueprint ids or tags; null: all active."
    )
    health_samples: int = Field(default=512, ge=16, description="Images per health measurement.")
    health_every_epochs: int = Field(
        default=1, ge=1, description="Epochs between two health measurements inside the window."
    )
    decision_deadline_seconds: PositiveSeconds = Field(
        default=0.5, description="Tamiyo answers within this or there is no adaptation."
    )
    wait_for_kernel: bool = Field(
        default=False,
        description="Benchmarks only: hold the step until the kernel is there; compile time cannot change the result.",
    )
    start_wait_seconds: float = Field(
        default=60.0,
        ge=0,
        description="With model.weights and a window from 0: how long the first step waits for the first kernels.",
    )
    kernel_timeout_epochs: int = Field(
        default=5, ge=1, description="A germinated seed without a kernel is cancelled after this many epochs."
    )
    isolation_steps: int = Field(default=100, ge=0, description="Steps a branch learns isolated (TRAINING).")
    blend_steps: int = Field(default=50, ge=1, description="Steps of the alpha ramp of a branch (GRAFTING).")
    blend: BlendConfig = BlendConfig()
    stabilization_steps: int = Field(
        default=20, ge=0, description="Steps a blended branch stays frozen while normalisation settles (STABILIZATION)."
    )
    fine_tuning_steps: int = Field(
        default=50, ge=0, description="Steps a branch trains with the host after it was judged (FINE_TUNING)."
    )
    embargo_epochs: int = Field(default=3, ge=0, description="Epochs a slot rests after a cull.")
    evaluation: EvaluationConfig = EvaluationConfig()
    kernel_cache_bytes: int = Field(default=64 * 2**20, ge=0, description="Bound of Kasmina's kernel cache, bytes.")

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Self:
        start, end = self.window
        if not 0 <= start < end <= 1:
            raise ValueError(f"window: {start:g} to {end:g} is no part of the schedule; give 0 <= start < end <= 1")
        return self

    @model_validator(mode="after")
    def _blending_can_end(self) -> Self:
        if self.blend.schedule != "fixed" and self.blend.max_steps <= self.blend_steps:
            raise ValueError(
                f"blend.max_steps: {self.blend.max_steps} steps are not enough for a ramp of {self.blend_steps}; "
                "give more, or fewer blend_steps"
            )
        return self


class ExportConfig(Section):
    """What a run leaves of its grown network, in export/ of the run folder."""

    formats: list[ExportFormat] = Field(
        default=["safetensors"],
        description="safetensors: weights, the table of growth and the file that rebuilds the network; torch_export: "
        "model.pt2 besides; onnx: model.onnx besides, which needs the packages onnx, onnxscript and onnxruntime.",
    )
    timeout_seconds: PositiveSeconds = Field(
        default=300.0, description="torch_export and onnx are given up when both together take longer."
    )

    @field_validator("formats")
    @classmethod
    def _made_of_the_first(cls, formats: list[ExportFormat]) -> list[ExportFormat]:
        if len(set(formats)) < len(formats):
            raise ValueError("a format is named twice")
        if formats and "safetensors" not in formats:
            raise ValueError("the other formats are made of the safetensors export: name safetensors, too")
        return formats


class GovernorConfig(Section):
    """What counts as unstable, and what is done about it."""

    enabled: bool = Field(default=True, description="false: divergence is not looked for.")
    window_steps: int = Field(default=50, ge=10, description="Steps of the running loss statistics.")
    spike_sigmas: float = Field(
        default=8.0, gt=0, description="A loss this many robust deviations above the median of the window is unstable."
    )
    patience_steps: int = Field(
        default=5, ge=1, description="Unstable steps in a row that make a divergence; NaN is one at once."
    )
    max_rollbacks: int = Field(default=3, ge=0, description="Then the run ends with its reason.")
    rate_scale: float = Field(
        default=0.5, gt=0, le=1, description="Learning rate factor after a rollback with no seed to blame."
    )


class DiagnoseConfig(Section):
    """What train.py --diagnose does before it measures."""

    epochs: int = Field(
        default=5,
        ge=0,
        description="Epochs of training without growth, a schedule of their own; 0 measures model.weights as they are.",
    )


class TlsConfig(Section):
    """Certificates of servers and clients (PEM files)."""

    certificate: FilePath | None = Field(default=None, description="Certificate chain; null: no TLS.")
    key: FilePath | None = Field(default=None, description="Private key of the certificate.")
    ca: FilePath | None = Field(
        default=None, description="Trust root of clients; with require_client_certificate of servers too (mTLS)."
    )
    require_client_certificate: bool = Field(
        default=False, description="Servers refuse clients whose certificate ca does not vouch for."
    )

    @model_validator(mode="after")
    def _files_belong_together(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both or none")
        if self.require_client_certificate and self.ca is None:
            raise ValueError("require_client_certificate needs ca, the trust root of clients")
        return self


class ServiceConfig(Section):
    """What all services have in common."""

    address: Address | None = Field(
        default=None, description="host:port of a running service; null: train.py starts one."
    )
    port: Port = Field(default=0, description="Port to listen on; 0: any free one.")


class S3Config(Section):
    """Artifacts in a store with the S3 protocol; credentials come from the environment, never from here."""

    bucket: str | None = Field(
        default=None,
        pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
        description="Bucket, which must be there; null: artifacts are files in artifacts_dir.",
    )
    prefix: str = Field(
        default="", pattern=r"^([\w.=-]+/)*[\w.=-]*$", description="Folder in the bucket, if others use it, too."
    )
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^/?#@]+/?$",
        description="Where the store is; null: at Amazon. Beyond loopback it needs https, or insecure.",
    )
    region: str | None = Field(default=None, description="Region; null: AWS_REGION of the environment, else us-east-1.")


class UrzaConfig(ServiceConfig):
    """Blueprint and kernel library."""

    database_url: str | None = Field(default=None, description="SQLAlchemy URL; null: SQLite in the state folder.")
    artifacts_dir: FilePath | None = Field(
        default=None, description="Folder of the artifacts; null: in the state folder."
    )
    s3: S3Config = S3Config()

    @model_validator(mode="after")
    def _one_store(self) -> Self:
        if self.artifacts_dir is not None and self.s3.bucket is not None:
            raise ValueError("artifacts_dir and s3.bucket: artifacts are kept in one place; set one of them")
        return self


class TezzeretConfig(ServiceConfig):
    """Compiler."""

    workers: int = Field(default=1, ge=1, description="Worker processes.")
    queue_limit: int = Field(default=64, ge=1, description="Jobs waiting; one more is refused.")
    job_timeout_seconds: PositiveSeconds = Field(default=60.0, description="A compile job that takes longer fails.")
    worker_memory_bytes: int = Field(
        default=3 * 2**30, ge=2**28, description="Resident set at which a worker is ended."
    )


class TamiyoConfig(ServiceConfig):
    """Policy."""

    database_url: str | None = Field(default=None, description="SQLAlchemy URL; null: SQLite in the state folder.")
    decision_log_limit: int = Field(default=10_000, ge=100, description="Decisions kept.")


class KafkaConfig(Section):
    """The Kafka cluster behind Oona."""

    bootstrap_servers: list[Address] = Field(
        default_factory=lambda: ["127.0.0.1:9092"], min_length=1, description="host:port of some of its brokers."
    )
    topic_prefix: str = Field(
        default="", pattern=r"^[A-Za-z0-9._-]*$", description="Put before every topic name, to share a broker."
    )
    replication_factor: int = Field(default=1, ge=1, description="Copies of each topic that Oona creates.")


class OonaConfig(ServiceConfig):
    """Event bus."""

    backend: Literal["embedded", "kafka"] = Field(
        default="embedded", description="A durable log in the state folder, or a Kafka cluster."
    )
    kafka: KafkaConfig = KafkaConfig()
    partitions: int = Field(
        default=4, ge=1, le=64, description="Of each topic; order is kept per key, so within one of them."
    )
    retention_bytes: int = Field(default=256 * 2**20, ge=2**20, description="Embedded log: bytes kept per topic.")
    max_delivery_attempts: int = Field(default=5, ge=1, description="Then an event goes to the dead letters.")


class KasminaConfig(ServiceConfig):
    """Gateway to the execution layer."""

    command_queue_limit: int = Field(
        default=256, ge=1, description="Commands of a run that wait for a safe point; one more is refused."
    )


class TolariaConfig(ServiceConfig):
    """Gateway to the training process."""

    command_queue_limit: int = Field(
        default=256, ge=1, description="Commands of a run that wait for a safe point; one more is refused."
    )


class ServicesConfig(Section):
    """The mesh."""

    host: str = Field(
        default="127.0.0.1",
        description="Interface the started services listen on; other than loopback needs tls or insecure.",
    )
    insecure: bool = Field(default=False, description="Allow a non-loopback interface without TLS.")
    tls: TlsConfig = TlsConfig()
    startup_timeout_seconds: PositiveSeconds = Field(
        default=30.0, description="A service that is not serving by then counts as failed."
    )
    rpc_timeout_seconds: PositiveSeconds = Field(default=5.0, description="Deadline of a call that names none.")
    max_deadline_seconds: PositiveSeconds = Field(default=3600.0, description="Servers cut longer deadlines to this.")
    max_concurrent_rpcs: int = Field(default=256, ge=1, description="Per server; more are answered RESOURCE_EXHAUSTED.")
    drain_seconds: PositiveSeconds = Field(default=5.0, description="Grace for calls under way on SIGTERM.")
    restart_backoff_seconds: PositiveSeconds = Field(
        default=0.2, description="First wait before a crashed service is restarted; doubles up to 5 s."
    )
    max_restarts: int = Field(
        default=10, ge=0, description="Per service; then it stays down and the run goes on without."
    )
    urza: UrzaConfig = UrzaConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    tamiyo: TamiyoConfig = TamiyoConfig()
    oona: OonaConfig = OonaConfig()
    kasmina: KasminaConfig = KasminaConfig()
    tolaria: TolariaConfig = TolariaConfig()

    @model_validator(mode="after")
    def _clients_trust_servers(self) -> Self:
        # Services call each other: with a certificate alone, every one of these calls would fail.
        if self.tls.certificate is not None and self.tls.ca is None:
            raise ValueError(
                "tls: certificate without ca: nobody would trust the servers; set ca to the PEM file of the authority "
                "that signed it, or to the certificate itself if it is self-signed"
            )
        return self

    @model_validator(mode="after")
    def _safe_listener(self) -> Self:
        if not is_loopback(self.host) and self.tls.certificate is None and not self.insecure:
            raise ValueError(f"host: {self.host} is not loopback; configure tls, or set insecure: true to accept that")
        return self

    @model_validator(mode="after")
    def _safe_artifacts(self) -> Self:
        url = urlsplit(self.urza.s3.endpoint_url or "")
        if url.scheme == "http" and not is_loopback(url.hostname or "") and not self.insecure:
            raise ValueError(
                f"urza.s3.endpoint_url: {url.hostname} is not loopback; use https, or set insecure: true to accept that"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether ``host`` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class TelemetryConfig(Section):
    """Traces, logs and events."""

    traces: Literal["file", "otlp", "off"] = Field(
        default="file", description="file: OTLP JSON lines in the run folder."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="host:port of an OTLP/gRPC collector, for traces: otlp."
    )
    queue_size: int = Field(default=8192, ge=128, description="Spans waiting for export; more are dropped and counted.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe records that the services and the training process log."
    )
    log_max_bytes: int = Field(
        default=16 * 2**20,
        ge=2**16,
        description="Length at which a log of the run folder is set aside as NAME.log.1 and begins anew.",
    )
    log_files: int = Field(
        default=4, ge=1, le=100, description="Logs kept for each process, the one being written among them."
    )
    event_queue_size: int = Field(
        default=4096,
        ge=16,
        description="Events waiting in the training process for Oona; more are dropped and counted.",
    )
    step_times: bool = Field(
        default=False, description="Write how long each training step took to step_times.jsonl in the run folder."
    )

    @model_validator(mode="after")
    def _otlp_has_an_endpoint(self) -> Self:
        if self.traces == "otlp" and self.otlp_endpoint is None:
            raise ValueError("traces: otlp needs otlp_endpoint, host:port of the collector")
        return self


class EsperConfig(Section):
    """The root of the tree."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    growth: GrowthConfig = GrowthConfig()
    governor: GovernorConfig = GovernorConfig()
    export: ExportConfig = ExportConfig()
    diagnose: DiagnoseConfig = DiagnoseConfig()
    compare: list[Literal["host", "bigger", "uniform"]] = Field(
        default_factory=list,
        description="Controls trained after the run: host (without growth; with model.weights: trained on), bigger "
        "(the final shape from scratch), uniform (grown at the same moments to the same cost, all layers alike).",
    )
    compare_at: Literal["epochs", "flops"] = Field(
        default="epochs",
        description="How long host and bigger train: as many epochs as the run, or until they have spent as many FLOPs "
        "as it, those of growth included.",
    )
    services: ServicesConfig = ServicesConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _a_task_smooths_itself(self) -> Self:
        if self.task.factory is not None and self.training.optimizer.label_smoothing:
            raise ValueError(
                "training.optimizer.label_smoothing belongs to the default task: with task.factory set it to 0"
            )
        return self

    @field_validator("compare")
    @classmethod
    def _each_control_once(cls, controls: list[str]) -> list[str]:
        if len(set(controls)) < len(controls):
            raise ValueError("a control is named twice")
        return controls
