"""Files and batches, put together."""

from server.serving.batch_desk import BatchDesk
from server.serving.batch_life import BatchKeeping
from server.serving.batch_plan import InputLimits
from server.serving.batch_work import LineParts
from server.serving.batches import BatchRunner, Runners
from server.serving.file_desk import FileDesk, FileRules


class Batching:
    """The two desks that clients come to, and the runner behind them."""

    def __init__(
        self, keeping: BatchKeeping, rules: FileRules, lines: LineParts, limits: InputLimits, who: Runners
    ) -> None:
        self.runner = BatchRunner(keeping, lines, limits, who)
        self.files = FileDesk(keeping, rules)
        self.batches = BatchDesk(keeping, self.files, self.runner.look)
