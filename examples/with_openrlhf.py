"""OpenRLHF's DPO with fused log-probs, with its own arguments.

deepspeed examples/with_openrlhf.py --model.model_name_or_path ... (in the place of `-m openrlhf.cli.train_dpo`).
"""

import runpy

from fused_dpo.integrations import patch_openrlhf


def main() -> None:
    """Train as the arguments say, and print what the fused head took."""
    patch = patch_openrlhf()
    runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__")  # reads sys.argv
    print(patch.counts)


if __name__ == "__main__":
    main()
