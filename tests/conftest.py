import os
import signal
import sys

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # models are local folders
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it, and their children

if sys.platform == "win32":  # these send POSIX signals and lock files
    collect_ignore = ["test_resume.py", "test_rlhf.py", "test_studies.py"]

settings.register_profile("same examples every time", deadline=None, derandomize=True)
settings.load_profile("same examples every time")
torch.set_num_threads(1)
