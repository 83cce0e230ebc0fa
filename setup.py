"""What `metaxl_evo` needs and holds. Tool settings are in pyproject.toml, the tested pins in constraints.txt."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class WithConfigs(build_py):
    """Puts the settings files, which stand at the top of the repository, into the package that is built."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "configs", Path(self.build_lib, "metaxl_evo", "configs"), dirs_exist_ok=True)


setup(
    name="metaxl_evo",
    version="0.2.0",  # the only place; at run time: importlib.metadata.version("metaxl_evo")
    description="Meta-learning with Hugging Face models: hypergradients inside the Trainer, cross-lingual NER first",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    cmdclass={"build_py": WithConfigs},
    python_requires=">=3.11",
    package_dir={"": "."},  # an editable install then puts this folder on the path: packages added later are found too
    packages=find_packages(include=["metaxl_evo", "metaxl_evo.*", "vision_tasks", "vision_tasks.*"]),
    package_data={"metaxl_evo": ["py.typed", "experiments/report.html.jinja"], "vision_tasks": ["py.typed"]},
    entry_points={"console_scripts": ["metaxl-evo = metaxl_evo.cli:script"]},
    install_requires=[
        "torch>=2.8",
        "transformers>=5.23,<6",
        "accelerate>=1.12,<2",
        "datasets>=4.0,<6",
        "evaluate>=0.4.2",
        "seqeval>=1.2.2",
        "scikit-learn>=1.3",
        "safetensors>=0.4.3",
        "huggingface_hub>=1.0,<3",
        "tokenizers>=0.21",
        "pyarrow>=21",
        "numpy>=1.26",
        "pandas>=2.2",
        "filelock>=3.15",
        "pillow>=10.1",
        "scipy>=1.11",
        "tqdm>=4.66",
        "pyyaml>=6",
    ],
    extras_require={
        "peft": ["peft>=0.20"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "peft>=0.20",
            "matplotlib>=3.9",  # pictures are made and looked at
            "plotly>=6",
            "jinja2>=3.1",
            "selenium>=4.25",  # the report is opened in a browser, where there is one
            "statsmodels>=0.14",  # an oracle of the comparison
            "ray>=2.40",
            "optuna>=4",
            "cleanlab>=2.7",
            "trl>=1.16",
            "psutil>=5.9",
            "tensorboard>=2.19",  # an example writes its files
            "nbclient>=0.10",  # the notebooks are run
            "nbformat>=5.10",
            "ipykernel>=6.29",
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14", "pre-commit>=4.0", "types-PyYAML>=6.0.12", "uv>=0.5", "pip-licenses>=5"],
        "audit": ["pip-audit>=2.9", "bandit>=1.8"],
        "plot": ["matplotlib>=3.9"],
        "report": ["plotly>=6", "jinja2>=3.1", "matplotlib>=3.9"],
        "ray": ["ray>=2.40"],
        "optuna": ["optuna>=4"],
        "cleanlab": ["cleanlab>=2.7"],  # method confident of weight-text
        "trl": ["trl>=1.16"],  # data_format sft of mix-text
        "demo": ["gradio>=6"],
        "trackers": ["tensorboard>=2.19", "trackio>=0.21"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        # Betty, which configs/benchmark/peers.yaml knows too, is installed by a command of its own (it prints it).
        "peers": ["higher>=0.2.1", "torchopt>=0.7.3"],
    },
)
