"""Set before torch is imported: threads that spin while they wait slow down every other process of a small machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
