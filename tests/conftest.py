import os
import signal
import sys

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # models are local folders
for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
    if signal.getsignal(number) is signal.SIG_IGN:  # by `nohup` or a shell's `&`: scripts that are tested inherit that
        signal.signal(number, lambda *_: None)  # and this they do not

if sys.platform == "win32":  # these send POSIX signals and lock files
    collect_ignore = ["test_resume.py", "test_rlhf.py", "test_studies.py"]

settings.register_profile("same examples every time", deadline=None, derandomize=True)
settings.load_profile("same examples every time")
torch.set_num_threads(1)
