"""The stages every server of Esper has, in their order."""

from services.chassis.config.schema import ServicesConfig
from services.chassis.interceptors import access_log, error_mapping, ids, tracing
from services.chassis.interceptors.calls import CallInterceptor
from services.chassis.interceptors.limits import ConcurrencyLimit, DeadlineCap
from services.chassis.telemetry import Telemetry


def standard_interceptor(config: ServicesConfig, telemetry: Telemetry) -> CallInterceptor:
    """One interceptor with all stages; one per server, because the concurrency limit counts per server."""
    return CallInterceptor(
        [
            ids.stage,
            tracing.stage(telemetry),
            access_log.stage,
            error_mapping.stage,
            DeadlineCap(config.max_deadline_seconds),
            ConcurrencyLimit(config.max_concurrent_rpcs),
        ]
    )
