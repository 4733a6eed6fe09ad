import os
import sys

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # models are local folders

if sys.platform == "win32":  # these send POSIX signals and lock files
    collect_ignore = ["test_rlhf.py", "test_studies.py"]

settings.register_profile("same examples every time", deadline=None, derandomize=True)
settings.load_profile("same examples every time")
torch.set_num_threads(1)
