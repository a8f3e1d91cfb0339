"""What can be watched while something trains: TensorBoard (`tensorboard --logdir results`) and DVCLive (`dvc plots show`)."""

from __future__ import annotations

import shutil
from pathlib import Path


class Live:
    """Both logs of one training, in <folder>/tensorboard and <folder>/dvclive; a resumed run goes on in them."""

    def __init__(self, folder: str | Path, resume: bool = True):
        for name in () if resume else ("tensorboard", "dvclive"):
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
        from dvclive import Live as DVCLive
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(Path(folder) / "tensorboard"))
        self.dvc = DVCLive(str(Path(folder) / "dvclive"), save_dvc_exp=False, dvcyaml=None, report=None, resume=True)

    def log(self, step: int, figures: dict):
        """One step's figures; None is left out."""
        self.dvc.step = step
        for name, value in figures.items():
            if value is not None:
                self.board.add_scalar(name, value, step)
                self.dvc.log_metric(name, value)

    def close(self):
        self.board.close()
        self.dvc.end()
