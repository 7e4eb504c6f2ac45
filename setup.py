"""Package metadata; the versions that were tested stand in requirements.txt."""

from setuptools import find_packages, setup

setup(
    name="guided-diffusion-segmentation",
    version="0.1.0",
    description="Diffusion-based medical image segmentation: train, draw ensembles, fuse, score",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["guided_diffusion*"]),
    package_data={"guided_diffusion.report": ["report.html"]},
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26,<3",
        "nibabel>=5.3,<6",
        "scikit-image>=0.24,<1",
        "scipy>=1.11,<2",
        "pillow>=10.1",
        "tqdm>=4.65,<5",
    ],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6", "ruff", "mypy", "types-tqdm"],
        "plot": ["matplotlib>=3.8"],
        "tensorboard": ["tensorboard>=2.14"],
        "visdom": ["visdom==0.2.4", "tornado>=6.2,<6.6"],
    },
)
