"""The five files are imported from the repository's root; one thread, so that times and sums do not depend on cores."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

torch.set_num_threads(1)
