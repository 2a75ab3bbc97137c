"""LLaMA-Factory's DPO with fused log-probs, for its own YAML files.

python examples/with_llama_factory.py my_dpo.yaml, or under torchrun for several GPUs, as `llamafactory-cli` starts
processes of its own, in which nothing is patched.
"""

from fused_dpo.integrations import patch_llama_factory


def main() -> None:
    """Train as the file says, and print what the fused head took."""
    patch = patch_llama_factory()
    from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

    run_exp()  # reads sys.argv: a YAML file, and what overrides it
    print(patch.counts)


if __name__ == "__main__":
    main()
