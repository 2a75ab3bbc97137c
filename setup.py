"""Where the packages live; everything else is in pyproject.toml.

`kernels/` and `engine/` are source roots, as `src/` is elsewhere. They hold no `__init__.py`: an importable top-level
package called `kernels` would shadow the Hugging Face package of that name, which transformers imports. Packages are
found by their `__init__.py`, so a new folder is in the wheel without being named here.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("kernels"), *find_packages("engine")],
    package_dir={"fused_dpo": "kernels/fused_dpo", "fused_dpo_engine": "engine/fused_dpo_engine"},
    package_data={"fused_dpo": ["py.typed"], "fused_dpo_engine": ["py.typed"]},
)
