"""``python -m smi_kernels.aot``."""

import sys

from smi_kernels.aot.gate import main

if __name__ == "__main__":
    sys.exit(main())
