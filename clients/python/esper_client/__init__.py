"""Client of the Esper mesh for asynchronous Python: dataclasses and stubs generated with betterproto2.

>>> async with Mesh.from_file("runs/latest/addresses.json") as mesh:
...     answer = await mesh.blueprints.list_blueprints(urza.ListBlueprintsRequest(), timeout=5.0)

``common``, ``events``, ``kasmina``, ``oona``, ``tamiyo``, ``tezzeret``, ``tolaria`` and ``urza`` hold the messages
of the contracts (``esper.<component>.v1``). Stubs are made by ``Mesh``; one that is not there is made from a channel:
``oona.EventServiceStub(mesh.channel("oona"))``. Calls raise ``grpclib.exceptions.GRPCError``; `reason_of` tells its
row of the platform's error table. Give every call a ``timeout``: there is none by default.
"""

from esper_client._gen.esper.common import v1 as common
from esper_client._gen.esper.events import v1 as events
from esper_client._gen.esper.kasmina import v1 as kasmina
from esper_client._gen.esper.oona import v1 as oona
from esper_client._gen.esper.tamiyo import v1 as tamiyo
from esper_client._gen.esper.tezzeret import v1 as tezzeret
from esper_client._gen.esper.tolaria import v1 as tolaria
from esper_client._gen.esper.urza import v1 as urza
from esper_client._mesh import Mesh, reason_of

__all__ = [
    "Mesh",
    "reason_of",
    "common",
    "events",
    "kasmina",
    "oona",
    "tamiyo",
    "tezzeret",
    "tolaria",
    "urza",
]
