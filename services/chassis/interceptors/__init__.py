"""What happens around every call a server answers, whatever its kind.

Each concern is a *stage*: an asynchronous context manager around one call (see :mod:`.calls`). Outermost first:
ids (:mod:`.ids`), tracing (:mod:`.tracing`), access log (:mod:`.access_log`), error mapping (:mod:`.error_mapping`),
deadline cap and concurrency limit (:mod:`.limits`). So the log and the span see the status the client gets.
"""

from services.chassis.interceptors._standard import standard_interceptor
from services.chassis.interceptors.calls import Call, CallInterceptor, Stage

__all__ = ["Call", "CallInterceptor", "Stage", "standard_interceptor"]
