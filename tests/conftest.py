"""Tests import the five files from the repository's root, and use one thread of a CPU: only there
the same command gives the same bytes. For a GPU there is gpu_check.py."""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402

torch.set_num_threads(1)
