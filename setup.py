"""What `metaxl_evo` needs and holds. Tool settings are in pyproject.toml, the tested pins in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="metaxl_evo",
    version="0.1.0.dev0",  # the only place; at run time: importlib.metadata.version("metaxl_evo")
    description="Meta-learning with Hugging Face models: hypergradients inside the Trainer, cross-lingual NER first",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "."},  # an editable install then puts this folder on the path: packages added later are found too
    packages=find_packages(include=["metaxl_evo", "metaxl_evo.*", "vision_tasks", "vision_tasks.*"]),
    package_data={"metaxl_evo": ["py.typed", "experiments/report.html.jinja"], "vision_tasks": ["py.typed"]},
    entry_points={"console_scripts": ["metaxl-evo = metaxl_evo.cli:script"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.23,<6",
        "accelerate>=1.10,<2",
        "datasets>=4.0,<6",
        "evaluate>=0.4.2",
        "seqeval>=1.2.2",
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
            "psutil>=5.9",
        ],
        "dev": ["ruff>=0.9", "mypy>=1.14", "pre-commit>=4.0", "types-PyYAML>=6.0.12"],
        "audit": ["pip-audit>=2.9", "bandit>=1.8"],
        "plot": ["matplotlib>=3.9"],
        "report": ["plotly>=6", "jinja2>=3.1", "matplotlib>=3.9"],
        "ray": ["ray>=2.40"],
        # Betty, which configs/benchmark/peers.yaml knows too, is installed by a command of its own (it prints it).
        "peers": ["higher>=0.2.1", "torchopt>=0.7.3"],
    },
)
