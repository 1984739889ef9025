"""What Kasmina's gateway knows: the last picture each training process pushed, and the commands it passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1.common_pb2 import ChangeType
from esper.kasmina.v1 import adaptation_pb2, execution_link_service_pb2, kasmina_service_pb2, seed_pb2, topology_pb2
from services.chassis.errors import EsperError, Reason, not_found
from services.chassis.idempotency import digest_of
from services.chassis.link import Link, LinkRegistry
from services.chassis.watch import WatchHub

AttachResponse = execution_link_service_pb2.AttachResponse
_QUEUED = adaptation_pb2.ADAPTATION_STATE_QUEUED
_ALL_RUNS = ("", "runs/-")
# Adaptations that are over and kept for those who ask; per run, the oldest go first.
_KEPT_ADAPTATIONS = 1000


@dataclass
class Picture:
    """The state of one run as its training process last told it."""

    run: str
    incarnation: int = 0
    topology: topology_pb2.Topology | None = None
    seeds: dict[str, seed_pb2.Seed] = field(default_factory=dict)
    health: kasmina_service_pb2.HealthReport | None = None
    cache: kasmina_service_pb2.CacheStats | None = None
    adaptations: dict[str, adaptation_pb2.Adaptation] = field(default_factory=dict)


class KasminaGateway:
    """Pictures by run, the watches on their seeds, and the ledger of commands. For one event loop."""

    def __init__(self, *, command_limit: int) -> None:
        self.links: LinkRegistry[AttachResponse] = LinkRegistry(command_limit)
        self.hub: WatchHub[seed_pb2.Seed] = WatchHub()
        self._pictures: dict[str, Picture] = {}

    def attach(self, run: str, incarnation: int) -> Link[AttachResponse]:
        """A training process of ``run`` is here: its run is known from now on.

        What an older process told is forgotten (the newer one may have resumed from a checkpoint before it), and the
        newer one tells all of its own. Adaptations stay.

        Raises:
            EsperError: RUN_ALREADY_ATTACHED.
        """
        link = self.links.attach(run, incarnation)
        known = self._pictures.setdefault(run, Picture(run, incarnation))
        if known.incarnation != incarnation:
            self._pictures[run] = Picture(run, incarnation, adaptations=known.adaptations)
            for seed in known.seeds.values():
                self.hub.publish(seed, ChangeType.CHANGE_TYPE_DELETED)
        return link

    def take(self, run: str, message: execution_link_service_pb2.AttachRequest) -> None:
        """Take over what a training process pushed."""
        picture = self._pictures[run]
        match message.WhichOneof("message"):
            case "topology":
                picture.topology = message.topology
            case "seed":
                self._take_seed(picture, message.seed)
            case "health":
                picture.health = message.health
            case "cache":
                picture.cache = message.cache
            case "result":
                self._take_result(picture, message.result)
            case _:
                pass  # a second hello, or a kind of message that a newer training process knows

    def _take_seed(self, picture: Picture, seed: seed_pb2.Seed) -> None:
        known = picture.seeds.get(seed.name)
        if known == seed:
            return  # the full state after a reconnect repeats what has not changed
        picture.seeds[seed.name] = seed
        change = ChangeType.CHANGE_TYPE_ADDED if known is None else ChangeType.CHANGE_TYPE_MODIFIED
        self.hub.publish(seed, change)

    def _take_result(self, picture: Picture, result: execution_link_service_pb2.CommandResult) -> None:
        self.links.answered(picture.run, result.command_id)
        adaptation = picture.adaptations.get(result.command_id)
        if adaptation is None:
            return
        adaptation.state = result.state
        adaptation.seed = result.seed
        if result.HasField("applied_step"):
            adaptation.applied_step = result.applied_step
        if result.error_reason:
            adaptation.error.reason, adaptation.error.message = result.error_reason, result.error_message
        self._forget_old(picture)

    @staticmethod
    def _forget_old(picture: Picture) -> None:
        over = [name for name, adaptation in picture.adaptations.items() if adaptation.state != _QUEUED]
        for name in over[: max(len(over) - _KEPT_ADAPTATIONS, 0)]:
            del picture.adaptations[name]

    def picture(self, run: str) -> Picture:
        """The picture of a run.

        Raises:
            EsperError: RUN_NOT_FOUND.
        """
        if run not in self._pictures:
            raise not_found("run", run, reason=Reason.RUN_NOT_FOUND)
        return self._pictures[run]

    def topology(self, run: str) -> topology_pb2.Topology:
        """The network of a run; RUN_NOT_FOUND also while its process has not told of it yet."""
        picture = self.picture(run)
        if picture.topology is None:
            raise not_found("run", run, reason=Reason.RUN_NOT_FOUND, hint="it has attached but not told of its network")
        return picture.topology

    def health(self, run: str) -> kasmina_service_pb2.HealthReport:
        """The newest health of a run.

        Raises:
            EsperError: RUN_NOT_FOUND, HEALTH_NOT_MEASURED.
        """
        report = self.picture(run).health
        if report is None:
            raise not_found("health report", run, reason=Reason.HEALTH_NOT_MEASURED)
        return report

    def seeds(self, run: str, keep: Callable[[seed_pb2.Seed], bool] = lambda seed: True) -> list[seed_pb2.Seed]:
        """Seeds of a run, or of all (``runs/-`` or empty), in birth order."""
        pictures: Iterable[Picture] = self._pictures.values() if run in _ALL_RUNS else [self.picture(run)]
        return [seed for picture in pictures for seed in picture.seeds.values() if keep(seed)]

    def seed(self, run: str, name: str) -> seed_pb2.Seed:
        """One seed.

        Raises:
            EsperError: RUN_NOT_FOUND, SEED_NOT_FOUND.
        """
        seed = self.picture(run).seeds.get(name)
        if seed is None:
            raise not_found("seed", name, reason=Reason.SEED_NOT_FOUND)
        return seed

    def apply(self, command: adaptation_pb2.AdaptationCommand) -> adaptation_pb2.Adaptation:
        """Queue a command for the next safe point; the same command again is the same adaptation.

        Raises:
            EsperError: RUN_NOT_FOUND, COMMAND_QUEUE_FULL, REQUEST_ID_REUSED.
        """
        picture = self.picture(command.run)
        if (known := picture.adaptations.get(command.command_id)) is not None:
            if digest_of(known.command) != digest_of(command):
                raise EsperError(
                    f"command_id {command.command_id!r} was used for another command: choose a new one",
                    reason=Reason.REQUEST_ID_REUSED,
                )
            return known
        self.links.send(command.run, command.command_id, AttachResponse(apply=command))
        now = Timestamp()
        now.GetCurrentTime()
        adaptation = adaptation_pb2.Adaptation(
            name=f"{command.run}/adaptations/{command.command_id}", command=command, state=_QUEUED, create_time=now
        )
        picture.adaptations[command.command_id] = adaptation
        return adaptation

    def adaptation(self, run: str, command_id: str) -> adaptation_pb2.Adaptation:
        """One adaptation.

        Raises:
            EsperError: RUN_NOT_FOUND, ADAPTATION_NOT_FOUND.
        """
        found = self.picture(run).adaptations.get(command_id)
        if found is None:
            name = f"{run}/adaptations/{command_id}"
            raise not_found("adaptation", name, reason=Reason.ADAPTATION_NOT_FOUND)
        return found

    def cancel(self, run: str, command_id: str) -> adaptation_pb2.Adaptation:
        """Withdraw an adaptation; cancelling twice is cancelling once.

        The training process has the last word: when it applied the command first, its result says so. The withdrawal
        is sent again after a reconnect until then, as the command may have been received before.

        Raises:
            EsperError: RUN_NOT_FOUND, ADAPTATION_NOT_FOUND, ADAPTATION_ALREADY_APPLIED.
        """
        found = self.adaptation(run, command_id)
        if found.state == adaptation_pb2.ADAPTATION_STATE_APPLIED:
            raise EsperError(
                f"{found.name} was applied at step {found.applied_step}: cull its seed {found.seed}",
                reason=Reason.ADAPTATION_ALREADY_APPLIED,
            )
        if found.state == _QUEUED:
            self.links.withdraw(run, command_id, AttachResponse(cancel=command_id))
            found.state = adaptation_pb2.ADAPTATION_STATE_CANCELLED
        return found

    def prefetch(self, run: str, kernel: str) -> bool:
        """Ask the training process for a kernel ahead of need; False when it is not attached.

        Raises:
            EsperError: RUN_NOT_FOUND, COMMAND_QUEUE_FULL.
        """
        return self.links.hint(self.picture(run).run, AttachResponse(prefetch=kernel))

    def watches(self, run: str) -> Callable[[seed_pb2.Seed], bool]:
        """Whether a seed is of ``run``, or of any (``runs/-`` or empty)."""
        return lambda seed: run in _ALL_RUNS or seed.name.startswith(f"{run}/")
