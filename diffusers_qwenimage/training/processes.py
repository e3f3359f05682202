"""Work that one process does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def on_main_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do `work` in the main process only; all get its result, or its error."""
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except (ValueError, OSError) as error:
            result[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    found: Result = result[0]
    return found
