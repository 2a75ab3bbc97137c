"""ms-swift's DPO with fused log-probs, with its own arguments.

python examples/with_ms_swift.py --rlhf_type dpo --model ... --dataset ..., or under torchrun for several GPUs, as
`swift rlhf` starts processes of its own, in which nothing is patched.
"""

from fused_dpo.integrations import patch_ms_swift


def main() -> None:
    """Train as the arguments say, and print what the fused head took."""
    patch = patch_ms_swift()
    from swift.pipelines import rlhf_main  # pyright: ignore[reportMissingImports]

    rlhf_main()  # reads sys.argv
    print(patch.counts)


if __name__ == "__main__":
    main()
