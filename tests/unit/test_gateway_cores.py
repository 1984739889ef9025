"""The gateways' memory is bounded: what is over is kept for those who ask again, the oldest goes first."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from esper.kasmina.v1 import adaptation_pb2
from esper.kasmina.v1 import execution_link_service_pb2 as execution
from esper.tolaria.v1 import run_pb2
from esper.tolaria.v1 import training_link_service_pb2 as training
from services.chassis.errors import EsperError, Reason
from services.kasmina import gateway as kasmina
from services.tolaria import gateway as tolaria

_RUN = "runs/r"


def applied(command_id: str) -> execution.AttachRequest:
    result = execution.CommandResult(command_id=command_id, state=adaptation_pb2.ADAPTATION_STATE_APPLIED)
    return execution.AttachRequest(result=result)


def cull(command_id: str) -> adaptation_pb2.AdaptationCommand:
    return adaptation_pb2.AdaptationCommand(
        command_id=command_id, run=_RUN, cull=adaptation_pb2.Cull(seed=f"{_RUN}/seeds/s")
    )


def test_the_oldest_adaptations_that_are_over_are_forgotten() -> None:
    gateway = kasmina.KasminaGateway(command_limit=5)
    gateway.attach(_RUN, 1)
    gateway.apply(cull("waits"))
    for number in range(kasmina._KEPT_ADAPTATIONS + 2):
        gateway.apply(cull(str(number)))
        gateway.take(_RUN, applied(str(number)))
    for gone in ("0", "1"):
        with pytest.raises(EsperError) as caught:
            gateway.adaptation(_RUN, gone)
        assert caught.value.reason is Reason.ADAPTATION_NOT_FOUND
    assert gateway.adaptation(_RUN, "2").state == adaptation_pb2.ADAPTATION_STATE_APPLIED
    # What still waits is never forgotten, however old.
    assert gateway.adaptation(_RUN, "waits").state == adaptation_pb2.ADAPTATION_STATE_QUEUED


async def test_the_oldest_commands_that_were_answered_are_forgotten() -> None:
    gateway = tolaria.TolariaGateway(command_limit=5)
    gateway.links.attach(_RUN, 1)
    told = run_pb2.Run(name=_RUN, state=run_pb2.RUN_STATE_TRAINING)
    gateway.take(_RUN, training.AttachRequest(run=told))

    async def command(name: str, *, answer: bool = True, checkpoint: str = "") -> None:
        order = training.RunCommand(command_id=name, kind=training.RUN_COMMAND_KIND_PAUSE, checkpoint=checkpoint)
        waiting = asyncio.ensure_future(gateway.command(_RUN, order, remaining=0 if not answer else 60))
        await asyncio.sleep(0)
        if answer:
            result = training.RunCommandResult(command_id=name)
            gateway.take(_RUN, training.AttachRequest(result=result))
        await waiting

    with pytest.raises(EsperError) as caught:
        await command("waits", answer=False)
    assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    for number in range(tolaria._KEPT_COMMANDS + 2):
        await command(str(number))
    # The first is a new command again, the last is still known with its content.
    await command("0", checkpoint="another")
    for known in ("waits", str(tolaria._KEPT_COMMANDS)):
        with pytest.raises(EsperError) as caught:
            await command(known, answer=False, checkpoint="another")
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
    # An answer that comes twice is one answer.
    with suppress(EsperError):
        gateway.take(_RUN, training.AttachRequest(result=training.RunCommandResult(command_id="2")))
    await command("2", answer=False)
