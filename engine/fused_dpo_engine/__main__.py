"""`python -m fused_dpo_engine`: the command `fused-dpo`."""

import sys

from fused_dpo_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
