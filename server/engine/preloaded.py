"""What the processes of an engine import, imported once by the fork server that they are copied from.

Only what is known to leave the GPUs alone: a process that has opened one cannot be copied.
"""

import logging
from contextlib import suppress
from importlib import import_module
from typing import Any

from server.engine.processes import end_with_parent, meeting_place

end_with_parent()
with suppress(ImportError):  # it finds the words of the command line only before anybody has changed the environment
    import_module("setproctitle").setproctitle("VLLM::ForkServer")

logging.disable(logging.WARNING)  # the server says the same things when it imports them
import_module("vllm.v1.engine.core")
for kind in ("uniproc", "multiproc"):
    executor: Any = import_module(f"vllm.v1.executor.{kind}_executor")
    executor.get_file_store_init_method = meeting_place
if import_module("vllm.platforms").current_platform.is_cpu():
    import_module("vllm.v1.worker.cpu_worker")
logging.disable(logging.NOTSET)
