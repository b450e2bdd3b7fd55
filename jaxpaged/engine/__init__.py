"""The host side of serving: requests, scheduling, pages, prefix cache; without models and HTTP."""

from jaxpaged.engine.config import EngineConfig
from jaxpaged.engine.engine import Engine
from jaxpaged.engine.prefix_index import PrefixIndex
from jaxpaged.engine.request import (
    ContextError,
    EngineRequest,
    EngineStats,
    GroupStats,
    PoolError,
    QueueFullError,
    RefusedError,
    RequestTimes,
    SampleOutput,
    SlotBusyError,
    TokenLogprobs,
)
from jaxpaged.engine.slot_files import SlotTransfer
from jaxpaged.engine.stats import PoolState, SlotState

__all__ = [
    "ContextError",
    "Engine",
    "EngineConfig",
    "EngineRequest",
    "EngineStats",
    "GroupStats",
    "PoolError",
    "PoolState",
    "PrefixIndex",
    "QueueFullError",
    "RefusedError",
    "RequestTimes",
    "SampleOutput",
    "SlotBusyError",
    "SlotState",
    "SlotTransfer",
    "TokenLogprobs",
]
